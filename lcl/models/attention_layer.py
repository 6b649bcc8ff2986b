"""The attention layer: projections, q/k norm and RoPE around `lcl.attention.attend`.

Shapes: B batch, T row length, D model, N heads, K key/value heads, H head dim, R = H/2.
"""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lcl.attention import attend
from lcl.models.config import DecoderConfig
from lcl.models.layers import Dense, RMSNorm
from lcl.models.rope import apply_rope


class RowInputs(NamedTuple):
    """What every layer is told about the rows; computed once per step, outside the layer loop.

    Attributes:
      cos_BTR: cosine of every pair's RoPE angle, float32.
      sin_BTR: sine of the same.
      segment_ids_BT: int32, 0 = padding, 1.. = document in the row; None: one document.
      row_index_BT: int32, the token's place in the original row, which is what causality compares;
        None: 0, 1, 2, ...
    """

    cos_BTR: jax.Array
    sin_BTR: jax.Array
    segment_ids_BT: jax.Array | None
    row_index_BT: jax.Array | None


class AttentionLayer(nn.Module):
    """Grouped-query self-attention with RoPE.

    Attributes:
      config: the decoder's.
      out_init_scale: of the output projection.
    """

    config: DecoderConfig
    out_init_scale: float

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, rows: RowInputs, head_mask_N: jax.Array | None = None
    ) -> jax.Array:
        """[B, T, D] (already normalised) -> [B, T, D], in the residual stream's dtype."""
        config = self.config
        dtype = jnp.dtype(config.dtype)
        q_BTNH = self._project(x_BTD, "query", config.num_heads, "heads")
        k_BTKH = self._project(x_BTD, "key", config.num_kv_heads, "kv_heads")
        v_BTKH = self._project(x_BTD, "value", config.num_kv_heads, "kv_heads")
        if config.qk_norm:
            q_BTNH = self._head_norm("query_norm")(q_BTNH)
            k_BTKH = self._head_norm("key_norm")(k_BTKH)
        q_BTNH = apply_rope(q_BTNH, rows.cos_BTR, rows.sin_BTR).astype(dtype)
        k_BTKH = apply_rope(k_BTKH, rows.cos_BTR, rows.sin_BTR).astype(dtype)
        if self.is_initializing():
            # Attention has no parameters: initialising a model of any context costs no attention.
            context_BTNH = q_BTNH
        else:
            context_BTNH = attend(
                q_BTNH,
                k_BTKH,
                v_BTKH,
                mask=config.mask,
                segment_ids_BT=rows.segment_ids_BT,
                row_index_BT=rows.row_index_BT,
                layout=config.context_layout,
                impl=config.attention,
                soft_cap=config.attention_soft_cap,
                head_mask_N=head_mask_N,
                block_sizes=config.attention_blocks,
            )
        context_BTNH = checkpoint_name(context_BTNH.astype(dtype), "context")
        out_BTD = Dense(
            in_shape=(config.num_heads, config.head_dim),
            out_shape=(config.embed_dim,),
            axes=("heads", "head_dim", "embed"),
            dtype=dtype,
            out_dtype=jnp.dtype(config.residual_dtype),
            gradient_dtype=jnp.dtype(config.gradient_dtype),
            use_bias=config.attention_out_bias,
            init_scale=self.out_init_scale,
            name="out",
        )(context_BTNH)
        return checkpoint_name(out_BTD, "out_proj")

    def _project(self, x_BTD: jax.Array, name: str, num_heads: int, axis: str) -> jax.Array:
        """One of query, key, value: [B, T, D] -> [B, T, num_heads, H], tagged `<name>_proj`."""
        config = self.config
        y_BTNH = Dense(
            in_shape=(config.embed_dim,),
            out_shape=(num_heads, config.head_dim),
            axes=("embed", axis, "head_dim"),
            dtype=jnp.dtype(config.dtype),
            out_dtype=jnp.dtype(config.dtype),
            gradient_dtype=jnp.dtype(config.gradient_dtype),
            use_bias=config.attention_bias,
            init_scale=config.init_scale,
            name=name,
        )(x_BTD)
        y_BTNH = nn.with_logical_constraint(
            y_BTNH,
            ("batch", "sequence", f"activation_{axis}", "activation_head_dim"),
        )
        return checkpoint_name(y_BTNH, f"{name}_proj")

    def _head_norm(self, name: str) -> RMSNorm:
        config = self.config
        return RMSNorm(
            config.head_dim,
            axis="head_dim",
            eps=config.norm_eps,
            dtype=jnp.float32,
            gradient_dtype=jnp.dtype(config.gradient_dtype),
            name=name,
        )
