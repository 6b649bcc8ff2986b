"""The sizes and choices of a decoder, checked when they are written down."""

from __future__ import annotations

import dataclasses
import difflib
import operator

from lcl.attention import BlockSizes, Mask
from lcl.attention.api import IMPLEMENTATIONS
from lcl.attention.layouts import LAYOUTS
from lcl.models.remat import REMAT_POLICIES
from lcl.models.rope import Rope

DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """A Llama-family decoder: pre-RMSNorm, RoPE, grouped queries, SwiGLU.

    With qk_norm it is Qwen3's block, with attention_bias Qwen2's, with neither Llama's.

    Attributes:
      vocab_size: V, rows of the embedding table. At least the tokenizer's size; larger is padding
        (a multiple of 128 suits every accelerator).
      num_layers: L.
      embed_dim: D, the width of the residual stream.
      mlp_dim: F, the width of the gated feed-forward layer.
      num_heads: N, query heads.
      num_kv_heads: K, key/value heads, a divisor of N (1 = MQA). None: N (MHA).
      head_dim: H, even (RoPE turns pairs). None: D / N.
      context_length: the longest document the model is meant for, in tokens. Nothing is sized by
        it (RoPE needs no table); the run checks its rows and the FLOP counts against it.
      rope: the kind of rotary embedding; see `lcl.models.rope`.
      norm_eps: added to the mean square in every RMSNorm.
      tie_embeddings: the head is the embedding table, transposed.
      qk_norm: RMSNorm of every query and key head, over head_dim, before RoPE.
      attention_bias: biases on query, key and value.
      attention_out_bias: a bias on the attention's output projection.
      mlp_bias: biases on the feed-forward layer's three projections.
      dtype: what the matmuls compute in, "float32" or "bfloat16". Parameters, norms, softmax, RoPE
        and the loss are float32 either way.
      residual_dtype: what the residual stream is kept in between blocks. "bfloat16" halves the
        activations that a very long row keeps, at the cost of rounding at every addition.
      gradient_dtype: what devices that hold other tokens send to sum the gradients of kernels and
        norms. "bfloat16" is half the bytes (MaxText's way), at the cost of rounding each device's
        part; parameters and moments are float32 either way.
      scan_layers: one layer compiled once and looped over; False unrolls. The parameters are
        stacked over layers either way, and the numbers are the same.
      remat: what a layer keeps for its backward pass; a name of `lcl.models.remat`.
      mask: which earlier tokens a query sees, within its document; see `lcl.attention.Mask`.
      attention: which implementation `lcl.attention.attend` uses.
      attention_soft_cap: c in c * tanh(scores / c), before the mask (Gemma 2); None: no cap.
      attention_blocks: block sizes of the TPU kernel; None: it chooses by the row.
      context_layout: how rows are permuted where a context axis splits them. Not yours to set: a
        run takes it from `MeshConfig.context_layout`, and permutes its batches to match.
      init_scale: multiplies every initial standard deviation; see `lcl.models.decoder`.

    Raises:
      ValueError: sizes that do not fit each other, or an unknown name.

    Example:
      >>> config = DecoderConfig(
      ...     vocab_size=384, num_layers=2, embed_dim=64, mlp_dim=192, num_heads=4
      ... )
      >>> config.num_kv_heads, config.head_dim
      (4, 16)
    """

    vocab_size: int
    num_layers: int
    embed_dim: int
    mlp_dim: int
    num_heads: int
    num_kv_heads: int = None  # type: ignore[assignment]  # an int once constructed
    head_dim: int = None  # type: ignore[assignment]  # likewise
    context_length: int = 8192
    rope: Rope = dataclasses.field(default_factory=Rope)
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    qk_norm: bool = False
    attention_bias: bool = False
    attention_out_bias: bool = False
    mlp_bias: bool = False
    dtype: str = "float32"
    residual_dtype: str = "float32"
    gradient_dtype: str = "float32"
    scan_layers: bool = True
    remat: str = "none"
    mask: Mask = dataclasses.field(default_factory=Mask)
    attention: str = "auto"
    attention_soft_cap: float | None = None
    attention_blocks: BlockSizes | None = None
    context_layout: str = "contiguous"
    init_scale: float = 1.0

    def __post_init__(self) -> None:
        # The field is what the caller wrote or the default that follows from the other sizes.
        if self.num_kv_heads is None:
            object.__setattr__(self, "num_kv_heads", self.num_heads)
        for name in ("vocab_size", "num_layers", "embed_dim", "mlp_dim", "num_heads"):
            self._check_count(name)
        self._check_count("num_kv_heads")
        self._check_count("context_length")
        if self.head_dim is None:
            if self.embed_dim % self.num_heads:
                raise ValueError(
                    f"DecoderConfig.num_heads = {self.num_heads} does not divide embed_dim = "
                    f"{self.embed_dim}: change one of them or set head_dim"
                )
            object.__setattr__(self, "head_dim", self.embed_dim // self.num_heads)
        self._check_count("head_dim")
        if self.head_dim % 2:
            raise ValueError(
                f"DecoderConfig.head_dim = {self.head_dim} must be even: RoPE turns pairs"
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"DecoderConfig.num_kv_heads = {self.num_kv_heads} must divide num_heads = "
                f"{self.num_heads}"
            )
        if not isinstance(self.rope, Rope):
            raise ValueError(
                f"DecoderConfig.rope = {self.rope!r} must be a Rope, such as Rope(theta=500000.0)"
            )
        if not isinstance(self.mask, Mask):
            raise ValueError(
                f"DecoderConfig.mask = {self.mask!r} must be a Mask, such as Mask(causal=True)"
            )
        for name in ("norm_eps", "init_scale"):
            if not getattr(self, name) > 0:
                raise ValueError(f"DecoderConfig.{name} = {getattr(self, name)!r} must be above 0")
        if self.attention_soft_cap is not None and not self.attention_soft_cap > 0:
            raise ValueError(
                f"DecoderConfig.attention_soft_cap = {self.attention_soft_cap!r} must be above 0, "
                "or None for no cap"
            )
        _check_choice("dtype", self.dtype, DTYPES)
        _check_choice("residual_dtype", self.residual_dtype, DTYPES)
        _check_choice("gradient_dtype", self.gradient_dtype, DTYPES)
        _check_choice("attention", self.attention, IMPLEMENTATIONS)
        _check_choice("context_layout", self.context_layout, LAYOUTS)
        _check_choice("remat", self.remat, tuple(REMAT_POLICIES))

    def _check_count(self, name: str) -> None:
        value = getattr(self, name)
        try:
            whole = operator.index(value)
        except TypeError:
            whole = 0
        if isinstance(value, bool) or whole < 1:
            raise ValueError(f"DecoderConfig.{name} = {value!r} must be a whole number, at least 1")


def num_parameters(config: DecoderConfig) -> int:
    """Number of parameters, counted from the sizes alone.

    Args:
      config: the decoder.

    Returns:
      Elements in all parameter arrays, vocabulary padding included.

    Example:
      >>> num_parameters(DecoderConfig(384, num_layers=2, embed_dim=64, mlp_dim=192, num_heads=4))
      155968
    """
    d, f = config.embed_dim, config.mlp_dim
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    attention = d * (q + 2 * kv) + q * d
    attention += (q + 2 * kv) * config.attention_bias + d * config.attention_out_bias
    attention += 2 * config.head_dim * config.qk_norm
    mlp = 3 * d * f + (2 * f + d) * config.mlp_bias
    layers = config.num_layers * (attention + mlp + 2 * d)
    tables = config.vocab_size * d * (1 if config.tie_embeddings else 2)
    return tables + layers + d


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value in choices:
        return
    close = difflib.get_close_matches(str(value), choices, n=1)
    hint = f" (nearest: {close[0]!r})" if close else ""
    raise ValueError(f"DecoderConfig.{name} = {value!r} must be one of {', '.join(choices)}{hint}")
