"""What a config makes of experts: defaults, costs of the active part, terms of the loss."""

from __future__ import annotations

from typing import Any

import pytest

from megads.config.model import ModelConfig
from megads.errors import CheckpointError
from megads.layers.router import MoESpec
from megads.model.catalog import HUGGING_FACE, describe
from megads.model.spec import DecoderSpec

HIDDEN, FFN, VOCAB, SEQ = 32, 80, 100, 16
DENSE = 3 * HIDDEN * FFN


def make(**keys: Any) -> DecoderSpec:
    config = ModelConfig(family="llama", layers=4, hidden=HIDDEN, heads=4, ffn=FFN, **keys)
    return describe(config, vocab=VOCAB, sequence_length=SEQ)


def experts(**keys: Any) -> MoESpec:
    spec = make(experts=8, **keys).moe
    assert spec is not None
    return spec


def test_a_dense_model_has_no_experts() -> None:
    spec = make()
    assert spec.moe is None and list(spec.expert_layers) == []
    assert [term.name for term in spec.terms] == ["loss"]


def test_what_a_config_leaves_open() -> None:
    assert (experts().ffn, experts(expert_ffn=24).ffn) == (FFN, 24)
    assert (experts().shared_ffn, experts(expert_ffn=24, shared_experts=2).shared_ffn) == (0, 48)
    assert (experts().group_score, experts(router="sigmoid").group_score) == ("max", "top2")
    assert experts(router="sigmoid", group_score="max").group_score == "max"
    weights = {
        balance: experts(balance=balance).balance_weight for balance in ("none", "sequence", "global", "bias")
    }
    assert weights == {"none": 0.0, "sequence": 0.001, "global": 0.001, "bias": 0.0}
    assert experts(balance="bias", balance_weight=1e-4).has_balance_loss


def test_costs_are_of_what_a_token_passes() -> None:
    dense = make()
    spec = make(experts=8, experts_per_token=2, expert_ffn=24, shared_experts=1, dense_layers=1)
    assert list(spec.expert_layers) == [1, 2, 3]
    routed = 3 * HIDDEN * 24 * (2 + 1) + (8 + 2) * HIDDEN  # two and the shared one, the router, the sum
    assert spec.block_costs[1] == dense.block_costs[1]
    assert spec.block_costs[2:5] == tuple(dense.block_costs[2] - DENSE + routed for _ in range(3))
    saved = 6 * 3 * (DENSE - routed)
    assert spec.flops_per_token(SEQ) == dense.flops_per_token(SEQ) - saved


def test_terms_have_the_weights_of_the_config() -> None:
    spec = make(experts=8, balance="sequence", balance_weight=0.02, z_loss=0.003, dense_layers=1)
    found = {term.name: (term.weight, term.unit, term.num_sources, term.is_cut) for term in spec.terms}
    assert found == {
        "loss": (1.0, "label", 1, False),
        "balance_loss": (0.02, "position", 3, True),
        "z_loss": (0.003, "position", 3, True),
    }
    assert [term.name for term in make(experts=8, balance="bias").terms] == ["loss"]


def test_a_dense_family_of_hugging_face_has_no_name_for_it() -> None:
    config = ModelConfig(family="llama", layers=4, hidden=HIDDEN, heads=4, experts=8)
    with pytest.raises(CheckpointError, match=r"no experts[\s\S]*model.experts 8"):
        HUGGING_FACE["llama"].to_config(config)


@pytest.mark.parametrize(("family", "scores"), [("llama", "softmax"), ("deepseek_v3", "sigmoid")])
def test_a_family_says_how_its_routers_score(family: str, scores: str) -> None:
    latent = {"kv_lora": 16, "nope_dim": 8, "rope_dim": 4, "v_dim": 8} if family == "deepseek_v3" else {}
    config = ModelConfig(family=family, layers=2, hidden=32, heads=4, experts=4, **latent)  # type: ignore[arg-type]
    moe = describe(config, vocab=10, sequence_length=8).moe
    assert moe is not None and moe.scores == scores
