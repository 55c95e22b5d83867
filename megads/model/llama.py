"""The Llama family (Touvron et al. 2023; Grattafiori et al. 2024): rotary positions, RMSNorm, SwiGLU, no biases,
untied head, grouped queries.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from megads.checkpoint.hf_names import Family, require
from megads.config.model import ModelConfig
from megads.model.family import ModelFamily
from megads.model.hugging_face import IGNORED, PREFIX, TRUNK_ROWS, refuse_experts, sizes_from, sizes_to

FFN_MULTIPLE = 256


def swiglu_width(hidden: int) -> int:
    """8/3 hidden, rounded up to a multiple of 256 (Touvron et al. 2023, section 2.2)."""
    return -(-(8 * hidden) // (3 * FFN_MULTIPLE)) * FFN_MULTIPLE


def _to_hugging_face(model: ModelConfig) -> dict[str, Any]:
    refuse_experts(model)
    return {
        "architectures": ["LlamaForCausalLM"],
        **sizes_to(model),
        "attention_bias": False,
        "mlp_bias": False,
    }


def _from_hugging_face(config: Mapping[str, Any]) -> dict[str, Any]:
    require(config, "attention_bias", allowed=(False,), default=False)
    require(config, "mlp_bias", allowed=(False,), default=False)
    return sizes_from(config)


LLAMA = ModelFamily(
    hugging_face=Family(
        model_type="llama",
        rows=TRUNK_ROWS,
        ignored=IGNORED,
        prefix=PREFIX,
        to_config=_to_hugging_face,
        from_config=_from_hugging_face,
    ),
    defaults=MappingProxyType({"norm_eps": 1e-6, "rope_theta": 10000.0, "tied": False}),
    ffn=swiglu_width,
)
