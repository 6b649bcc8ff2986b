"""Hugging Face weights in and out: Llama, Mistral, Qwen2 and Qwen3 by their tensors' names.

NumPy only: a state dict is a mapping from names to arrays, however it was read. Nothing is computed
with the values beyond transposing, so out(in(x)) is x bit for bit.

    Hugging Face                         ours (layers stacked)            as stored there -> here
    model.embed_tokens.weight            embed/embedding                  [V, D]
    model.layers.I.input_layernorm       layers/attention_norm/scale      [D]
      .self_attn.{q,k,v}_proj            layers/attention/{query,key,..}  [N*H, D] -> [L, D, N, H]
      .self_attn.{q,k}_norm              layers/attention/{query,key}_norm [H]
      .self_attn.o_proj                  layers/attention/out             [D, N*H] -> [L, N, H, D]
      .post_attention_layernorm          layers/mlp_norm/scale            [D]
      .mlp.{gate,up,down}_proj           layers/mlp/{gate,up,down}        [out, in] -> [L, in, out]
    model.norm.weight                    final_norm/scale                 [D]
    lm_head.weight (untied only)         head/kernel                      [V, D] -> [D, V]

Both rotate the same halves of a head (RoPE "half and half"), so no row is permuted. Our vocabulary
may be padded past theirs: the added rows are zeros, and are cut off again on the way out.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from lcl.models import DecoderConfig

# A buffer that old files carry along with the weights; it follows from the config.
_IGNORED_SUFFIX = "rotary_emb.inv_freq"
_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


@dataclasses.dataclass(frozen=True)
class _Weight:
    """One of our parameters and the name or names it has there.

    Attributes:
      name: their name; holds "{i}" where there is one tensor a layer.
      path: the keys of our parameter tree.
      shape: ours, without the layers axis.
      num_inputs: how many leading axes of ours are contracted; 0 for vectors and the embedding
        table, which keep their order. Theirs is then [outputs, inputs], both flattened.
      vocab_axis: our axis that may be padded.
    """

    name: str
    path: tuple[str, ...]
    shape: tuple[int, ...]
    num_inputs: int = 0
    vocab_axis: int | None = None

    @property
    def per_layer(self) -> bool:
        return "{i}" in self.name

    def their_shape(self, vocab_size: int) -> tuple[int, ...]:
        shape = list(self.shape)
        if self.vocab_axis is not None:
            shape[self.vocab_axis] = vocab_size
        if self.num_inputs:
            return math.prod(shape[self.num_inputs :]), math.prod(shape[: self.num_inputs])
        return tuple(shape) if self.vocab_axis is not None else (math.prod(shape),)

    def to_ours(self, theirs: np.ndarray) -> np.ndarray:
        ours = np.asarray(theirs, dtype=np.float32)
        ours = ours.T if self.num_inputs else ours
        if self.vocab_axis is None:
            return ours.reshape(self.shape)
        added = [(0, want - have) for want, have in zip(self.shape, ours.shape, strict=True)]
        return np.pad(ours, added)

    def to_theirs(self, ours: np.ndarray, vocab_size: int) -> np.ndarray:
        outputs_by_inputs = self.their_shape(vocab_size)
        if self.vocab_axis is not None:
            ours = np.take(ours, range(vocab_size), axis=self.vocab_axis)
        if self.num_inputs:
            ours = ours.reshape(outputs_by_inputs[::-1]).T
        return np.ascontiguousarray(ours.reshape(outputs_by_inputs))


def from_hf_state_dict(
    config: DecoderConfig, state_dict: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    """A Hugging Face state dict as our parameter tree.

    Args:
      config: the decoder that the weights are for; see `config_from_hf`.
      state_dict: their names to arrays, of any float dtype that NumPy (with ml_dtypes) knows.

    Returns:
      The tree of `lcl.models.init_params`, float32 NumPy arrays.

    Raises:
      ValueError: a tensor that is missing, unknown or of another shape, named.

    Example:
      >>> from lcl.models import DecoderConfig
      >>> config = DecoderConfig(8, num_layers=1, embed_dim=4, mlp_dim=4, num_heads=2)
      >>> from_hf_state_dict(config, {})
      Traceback (most recent call last):
      ...
      ValueError: the checkpoint has no tensor 'model.embed_tokens.weight' (12 of 12 are missing)
    """
    weights = list(_weights(config))
    expected = {name for weight in weights for name in _names(weight, config.num_layers)}
    missing = [n for w in weights for n in _names(w, config.num_layers) if n not in state_dict]
    if missing:
        raise ValueError(
            f"the checkpoint has no tensor {missing[0]!r} "
            f"({len(missing)} of {len(expected)} are missing)"
        )
    _check_nothing_is_lost(config, state_dict, expected)
    vocab_size = len(state_dict["model.embed_tokens.weight"])
    if vocab_size > config.vocab_size:
        raise ValueError(
            f"the checkpoint has {vocab_size} tokens and DecoderConfig.vocab_size = "
            f"{config.vocab_size}: raise it to {vocab_size} or more"
        )
    params: dict[str, Any] = {}
    for weight in weights:
        arrays = []
        for name in _names(weight, config.num_layers):
            theirs, want = state_dict[name], weight.their_shape(vocab_size)
            if tuple(theirs.shape) != want:
                raise ValueError(
                    f"{name!r} has shape {tuple(theirs.shape)} and the config gives {want}"
                )
            arrays.append(weight.to_ours(theirs))
        _set(params, weight.path, np.stack(arrays) if weight.per_layer else arrays[0])
    return params


def to_hf_state_dict(
    config: DecoderConfig, params: Mapping[str, Any], *, vocab_size: int | None = None
) -> dict[str, np.ndarray]:
    """Our parameter tree as a Hugging Face state dict; the inverse of `from_hf_state_dict`.

    Works on anything shaped like the parameters: gradients and moments too.

    Args:
      config: the decoder's.
      params: the tree of `lcl.models.init_params`; arrays that NumPy can read.
      vocab_size: their vocabulary, without our padding. None: config.vocab_size.

    Returns:
      Their names to arrays, in the dtype of ours; no lm_head.weight if the embeddings are tied.

    Raises:
      ValueError: a vocab_size above the config's.
    """
    vocab_size = config.vocab_size if vocab_size is None else vocab_size
    if not 0 < vocab_size <= config.vocab_size:
        raise ValueError(
            f"vocab_size = {vocab_size} must be in 1..{config.vocab_size}, the model's rows"
        )
    state_dict = {}
    for weight in _weights(config):
        ours = np.asarray(_get(params, weight.path))
        for i, name in enumerate(_names(weight, config.num_layers)):
            one = ours[i] if weight.per_layer else ours
            state_dict[name] = weight.to_theirs(one, vocab_size)
    return state_dict


def config_from_hf(hf_config: Mapping[str, Any], **changes: Any) -> DecoderConfig:
    """A Hugging Face config.json as a DecoderConfig.

    Args:
      hf_config: the JSON object; both today's `rope_parameters` and the older `rope_theta` with
        `rope_scaling` are understood.
      **changes: fields of DecoderConfig to set otherwise, such as dtype or a padded vocab_size.

    Returns:
      The config of the same model.

    Raises:
      ValueError: a model type, activation, RoPE kind or attention that the decoder lacks.

    Example:
      >>> llama = dict(
      ...     model_type="llama",
      ...     vocab_size=100,
      ...     hidden_size=32,
      ...     intermediate_size=48,
      ...     num_hidden_layers=2,
      ...     num_attention_heads=4,
      ...     rope_theta=10000.0,
      ... )
      >>> config_from_hf(llama, vocab_size=128).head_dim
      8
    """
    from lcl.attention import Mask
    from lcl.models import DecoderConfig

    family = hf_config.get("model_type")
    if family not in _FAMILIES:
        raise ValueError(
            f"model_type {family!r} is not supported; one of {', '.join(_FAMILIES)} is"
        )
    _require(hf_config, "hidden_act", "silu")
    _require(hf_config, "partial_rotary_factor", 1.0)
    bias = bool(hf_config.get("attention_bias"))
    window = hf_config.get("sliding_window") if family == "mistral" else None
    if family != "mistral":
        _require(hf_config, "use_sliding_window", False)
    fields = dict(
        vocab_size=hf_config["vocab_size"],
        num_layers=hf_config["num_hidden_layers"],
        embed_dim=hf_config["hidden_size"],
        mlp_dim=hf_config["intermediate_size"],
        num_heads=hf_config["num_attention_heads"],
        num_kv_heads=hf_config.get("num_key_value_heads"),
        head_dim=hf_config.get("head_dim"),
        context_length=hf_config.get("max_position_embeddings", 8192),
        rope=_rope_from_hf(hf_config),
        norm_eps=hf_config.get("rms_norm_eps", 1e-6),
        tie_embeddings=bool(hf_config.get("tie_word_embeddings", False)),
        qk_norm=family == "qwen3",
        attention_bias=bias or family == "qwen2",
        attention_out_bias=bias,
        mlp_bias=bool(hf_config.get("mlp_bias")),
        mask=Mask(causal=True, window=window),
    )
    return DecoderConfig(**{**fields, **changes})


def _weights(config: DecoderConfig) -> Iterator[_Weight]:
    """Every parameter of the decoder, in Hugging Face's order."""
    D, F, V = config.embed_dim, config.mlp_dim, config.vocab_size
    N, K, H = config.num_heads, config.num_kv_heads, config.head_dim
    yield _Weight("model.embed_tokens.weight", ("embed", "embedding"), (V, D), vocab_axis=0)

    def dense(theirs: str, ours: str, inputs: tuple, outputs: tuple, bias: bool):
        prefix, path = f"model.layers.{{i}}.{theirs}", ("layers", *ours.split("/"))
        yield _Weight(f"{prefix}.weight", (*path, "kernel"), inputs + outputs, len(inputs))
        if bias:
            yield _Weight(f"{prefix}.bias", (*path, "bias"), outputs)

    def norm(theirs: str, ours: str, size: int):
        path = ("layers", *ours.split("/"), "scale")
        yield _Weight(f"model.layers.{{i}}.{theirs}.weight", path, (size,))

    yield from dense("self_attn.q_proj", "attention/query", (D,), (N, H), config.attention_bias)
    yield from dense("self_attn.k_proj", "attention/key", (D,), (K, H), config.attention_bias)
    yield from dense("self_attn.v_proj", "attention/value", (D,), (K, H), config.attention_bias)
    yield from dense("self_attn.o_proj", "attention/out", (N, H), (D,), config.attention_out_bias)
    if config.qk_norm:
        yield from norm("self_attn.q_norm", "attention/query_norm", H)
        yield from norm("self_attn.k_norm", "attention/key_norm", H)
    yield from dense("mlp.gate_proj", "mlp/gate", (D,), (F,), config.mlp_bias)
    yield from dense("mlp.up_proj", "mlp/up", (D,), (F,), config.mlp_bias)
    yield from dense("mlp.down_proj", "mlp/down", (F,), (D,), config.mlp_bias)
    yield from norm("input_layernorm", "attention_norm", D)
    yield from norm("post_attention_layernorm", "mlp_norm", D)
    yield _Weight("model.norm.weight", ("final_norm", "scale"), (D,))
    if not config.tie_embeddings:
        yield _Weight("lm_head.weight", ("head", "kernel"), (D, V), num_inputs=1, vocab_axis=1)


def _names(weight: _Weight, num_layers: int) -> list[str]:
    """Their name of a weight, or one name a layer."""
    if not weight.per_layer:
        return [weight.name]
    return [weight.name.format(i=i) for i in range(num_layers)]


def _check_nothing_is_lost(
    config: DecoderConfig, state_dict: Mapping[str, np.ndarray], expected: set[str]
) -> None:
    """Refuses tensors that we have no place for; a tied head is allowed if it is the embedding."""
    unknown = [n for n in state_dict if n not in expected and not n.endswith(_IGNORED_SUFFIX)]
    if config.tie_embeddings and "lm_head.weight" in unknown:
        embedding = np.asarray(state_dict["model.embed_tokens.weight"])
        if not np.array_equal(np.asarray(state_dict["lm_head.weight"]), embedding):
            raise ValueError(
                "'lm_head.weight' differs from 'model.embed_tokens.weight': the checkpoint is not "
                "tied, set DecoderConfig.tie_embeddings = False"
            )
        unknown.remove("lm_head.weight")
    if unknown:
        raise ValueError(
            f"the model has no place for tensor {unknown[0]!r} ({len(unknown)} of "
            f"{len(state_dict)}): wrong family, number of layers, biases or q/k norm in the config"
        )


def _rope_from_hf(hf_config: Mapping[str, Any]) -> Any:
    from lcl.models import LinearRope, Llama3Rope, Rope

    scaling = hf_config.get("rope_parameters") or hf_config.get("rope_scaling") or {}
    theta = float(scaling.get("rope_theta", hf_config.get("rope_theta", 10_000.0)))
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return Rope(theta=theta)
    if kind == "linear":
        return LinearRope(theta=theta, factor=float(scaling["factor"]))
    if kind == "llama3":
        return Llama3Rope(
            theta=theta,
            factor=float(scaling["factor"]),
            low_freq_factor=float(scaling["low_freq_factor"]),
            high_freq_factor=float(scaling["high_freq_factor"]),
            original_context_length=int(scaling["original_max_position_embeddings"]),
        )
    raise ValueError(f"rope_type {kind!r} is not supported; one of default, linear, llama3 is")


def _require(hf_config: Mapping[str, Any], key: str, only: Any) -> None:
    value = hf_config.get(key, only)
    if value != only:
        raise ValueError(f"{key} = {value!r} is not supported; only {only!r} is")


def _set(tree: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value


def _get(tree: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    node: Any = tree
    for key in path:
        node = node[key]
    return node
