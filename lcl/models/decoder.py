"""The decoder: tokens in, hidden states or logits out. Pure Flax linen: init and apply.

    tokens -> embed -> [ x + attention(norm(x)) -> x + mlp(norm(x)) ] * L -> norm -> head -> logits

**Parameters** are float32, and the layers' are stacked under one name (leading axis `layers`):

    embed/embedding           [V, D]           final_norm/scale            [D]
    layers/attention_norm/scale [L, D]         head/kernel                 [D, V]  (untied only)
    layers/attention/query/kernel [L, D, N, H] layers/mlp_norm/scale       [L, D]
    layers/attention/key/kernel   [L, D, K, H] layers/mlp/gate/kernel      [L, D, F]
    layers/attention/value/kernel [L, D, K, H] layers/mlp/up/kernel        [L, D, F]
    layers/attention/out/kernel   [L, N, H, D] layers/mlp/down/kernel      [L, F, D]

and, by choice, `bias` beside a kernel and attention/{query,key}_norm/scale [L, H].

**Initialisation.** Every kernel is a normal cut at three deviations with deviation 1/sqrt(fan-in),
which keeps the scale of what passes through (LeCun et al. 1998; the cut as in torchtitan). The two
projections that write to the residual stream (attention/out and mlp/down) are smaller by
1/sqrt(2L), so that the sum of 2L of them does not grow with depth (GPT-2, Radford et al. 2019,
section 2.3). Embedding and head have 1/sqrt(D): logits then start with deviation 1, tied or not.
A parameter's key follows from the path of its module, so that another module changes no start.

Shapes: B batch, T row length, D model, F mlp, V vocabulary, N heads, K kv heads, H head dim,
L layers, R = H/2.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lcl.models.attention_layer import AttentionLayer, RowInputs
from lcl.models.config import DecoderConfig
from lcl.models.dense import dense_dot
from lcl.models.layers import Embed, GatedMlp, RMSNorm, partitioned, truncated_normal
from lcl.models.remat import remat_policy
from lcl.models.rope import rope_cos_sin

_RESIDUAL_AXES = ("batch", "sequence", "activation_embed")


class DecoderLayer(nn.Module):
    """One layer: x + attention(norm(x)), then x + mlp(norm(x)).

    Attributes:
      config: the decoder's.
    """

    config: DecoderConfig

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, rows: RowInputs, head_mask_N: jax.Array | None = None
    ) -> tuple[jax.Array, None]:
        """The residual stream before and after; the None is the loop's per-layer output."""
        config = self.config
        # Everything below reads the tagged value, so that a policy can say where it waits.
        x_BTD = checkpoint_name(x_BTD, "layer_input")
        dtype, residual_dtype = jnp.dtype(config.dtype), jnp.dtype(config.residual_dtype)
        out_init_scale = config.init_scale / math.sqrt(2 * config.num_layers)

        def norm(name: str) -> RMSNorm:
            return RMSNorm(
                config.embed_dim,
                axis="norm",
                eps=config.norm_eps,
                dtype=dtype,
                gradient_dtype=jnp.dtype(config.gradient_dtype),
                name=name,
            )

        attention = AttentionLayer(config, out_init_scale=out_init_scale, name="attention")
        x_BTD += attention(norm("attention_norm")(x_BTD), rows, head_mask_N)
        x_BTD = nn.with_logical_constraint(x_BTD, _RESIDUAL_AXES)
        mlp = GatedMlp(
            embed_dim=config.embed_dim,
            mlp_dim=config.mlp_dim,
            dtype=dtype,
            out_dtype=residual_dtype,
            use_bias=config.mlp_bias,
            init_scale=config.init_scale,
            out_init_scale=out_init_scale,
            gradient_dtype=jnp.dtype(config.gradient_dtype),
            name="mlp",
        )
        x_BTD += mlp(norm("mlp_norm")(x_BTD))
        return nn.with_logical_constraint(x_BTD, _RESIDUAL_AXES), None


class Head(nn.Module):
    """The untied output projection's kernel, float32 [D, V].

    Attributes:
      config: the decoder's.
    """

    config: DecoderConfig

    @nn.compact
    def __call__(self) -> jax.Array:
        """The kernel itself: the loss multiplies with it chunk by chunk."""
        config = self.config
        return self.param(
            "kernel",
            partitioned(
                truncated_normal(config.init_scale / math.sqrt(config.embed_dim)),
                ("embed", "vocab"),
            ),
            (config.embed_dim, config.vocab_size),
            jnp.float32,
        )


class Decoder(nn.Module):
    """A Llama-family language model.

    Attributes:
      config: its sizes and choices.

    Example:
      >>> config = DecoderConfig(384, num_layers=2, embed_dim=64, mlp_dim=192, num_heads=4)
      >>> params = init_params(config, jax.random.key(0))
      >>> Decoder(config).apply({"params": params}, jnp.zeros((1, 8), jnp.int32)).shape
      (1, 8, 384)
    """

    config: DecoderConfig

    def setup(self) -> None:
        """Names the parts; a part makes its parameters when it is first called."""
        config = self.config
        self.embed = Embed(
            config.vocab_size,
            config.embed_dim,
            init_scale=config.init_scale,
            dtype=jnp.dtype(config.residual_dtype),
        )
        self.layers = _stack_of_layers(config)
        self.final_norm = RMSNorm(
            config.embed_dim,
            axis="norm",
            eps=config.norm_eps,
            dtype=jnp.dtype(config.dtype),
            gradient_dtype=jnp.dtype(config.gradient_dtype),
        )
        if not config.tie_embeddings:
            self.head = Head(config)

    def hidden(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array | None = None,
        segment_ids_BT: jax.Array | None = None,
        row_index_BT: jax.Array | None = None,
        head_mask_LN: jax.Array | None = None,
    ) -> jax.Array:
        """Hidden states after the final norm: what the head, and so the loss, reads.

        Args:
          tokens_BT: int32 in [0, V).
          positions_BT: int32 RoPE positions, restarting in each document or not as the data says.
            None: 0, 1, 2, ... along the row.
          segment_ids_BT: int32, 0 = padding, 1.. = document in the row: tokens see only their own
            document. None: the row is one document.
          row_index_BT: int32, each token's place in the original row, for rows whose tokens were
            permuted to balance work; causality compares these. None: as config.context_layout
            places them.
          head_mask_LN: float [L, N], multiplies what each head of each layer gives: 0 switches a
            head off (ablations, retrieval heads). None: all ones.

        Returns:
          [B, T, D] in config.dtype.
        """
        config = self.config
        if positions_BT is None:
            positions_BT = jnp.broadcast_to(
                jnp.arange(tokens_BT.shape[1], dtype=jnp.int32), tokens_BT.shape
            )
        cos_BTR, sin_BTR = rope_cos_sin(config.rope, config.head_dim, positions_BT)
        x_BTD = nn.with_logical_constraint(self.embed(tokens_BT), _RESIDUAL_AXES)
        rows = RowInputs(cos_BTR, sin_BTR, segment_ids_BT, row_index_BT)
        x_BTD, _ = self.layers(x_BTD, rows, head_mask_LN)
        return self.final_norm(x_BTD)

    def __call__(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array | None = None,
        segment_ids_BT: jax.Array | None = None,
        row_index_BT: jax.Array | None = None,
    ) -> jax.Array:
        """Logits, float32 [B, T, V]; arguments as of `hidden`.

        Training does not come here: the loss reads `hidden` and `head_kernel`, so that the logits
        of a long row never exist at once.
        """
        config = self.config
        x_BTD = self.hidden(tokens_BT, positions_BT, segment_ids_BT, row_index_BT)
        kernel_DV = self.embed.embedding.T if config.tie_embeddings else self.head()
        logits_BTV = dense_dot(x_BTD, kernel_DV, compute_dtype=config.dtype)
        return nn.with_logical_constraint(logits_BTV, ("batch", "sequence", "activation_vocab"))

    def head_kernel(self, params: Any) -> jax.Array:
        """The head's kernel in a parameter tree, float32 [D, V]; tied: the transposed table."""
        if self.config.tie_embeddings:
            return params["embed"]["embedding"].T
        return params["head"]["kernel"]


def init_params(config: DecoderConfig, key: jax.Array) -> dict[str, Any]:
    """Fresh parameters, a plain tree of float32 arrays; the same for every mesh.

    Args:
      config: the decoder.
      key: a PRNG key.

    Returns:
      The tree shown at the top of this file. To make it sharded from the start, jit this with
      out_shardings.
    """
    return nn.meta.unbox(_init(config, key))


def abstract_params_with_axes(config: DecoderConfig) -> dict[str, Any]:
    """Shapes, dtypes and logical axes of the parameters, without making any.

    Args:
      config: the decoder.

    Returns:
      The tree of `init_params` with `nn.LogicallyPartitioned` boxes of ShapeDtypeStruct as leaves:
      what `lcl.parallel` turns into shardings, and `flax.linen.meta.unbox` into plain shapes.
    """
    return jax.eval_shape(lambda key: _init(config, key), jax.random.key(0))


def _init(config: DecoderConfig, key: jax.Array) -> dict[str, Any]:
    # Rematerialisation derives keys in a way of its own, and no choice of speed against memory may
    # change where a run starts.
    plain = dataclasses.replace(config, remat="none", scan_layers=True)
    tokens_BT = jnp.zeros((1, 1), jnp.int32)
    return Decoder(plain).init({"params": key}, tokens_BT)["params"]


def _stack_of_layers(config: DecoderConfig) -> nn.Module:
    """The loop over layers: parameters stacked on axis 0, `rows` the same for each."""
    layer: Any = DecoderLayer
    policy = remat_policy(config.remat)
    if policy is not None:
        # In a loop the compiler cannot undo rematerialisation by sharing the forward's values;
        # unrolled it could, unless it is told not to.
        layer = nn.remat(layer, policy=policy, prevent_cse=not config.scan_layers)
    return nn.scan(
        layer,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=(nn.broadcast, 0),
        length=config.num_layers,
        unroll=1 if config.scan_layers else config.num_layers,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )(config)
