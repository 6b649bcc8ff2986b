"""Models: pure functions of (parameters, tokens), written in Flax linen."""

from lcl.models.config import DecoderConfig, num_parameters
from lcl.models.decoder import Decoder, abstract_params_with_axes, init_params
from lcl.models.rope import LinearRope, Llama3Rope, Rope

__all__ = [
    "Decoder",
    "DecoderConfig",
    "LinearRope",
    "Llama3Rope",
    "Rope",
    "abstract_params_with_axes",
    "init_params",
    "num_parameters",
]
