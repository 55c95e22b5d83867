"""The formula of model flops against a forward that torch counts product by product."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megads.config.model import ModelConfig
from megads.data.sequence import Batch
from megads.model.catalog import describe
from megads.model.decoder import make_blocks
from megads.model.spec import causal_pairs
from megads.ops.registry import force
from megads.parallel.layout import Layout
from megads.parallel.mesh import build_mesh
from megads.parallel.parameter import Scope

SEQ, ROWS = 12, 3
EXPERTS = {"experts": 4, "experts_per_token": 2, "expert_ffn": 16, "balance": "sequence"}
LATENT = {"kv_lora": 10, "nope_dim": 6, "rope_dim": 4, "v_dim": 5}
MODELS: dict[str, dict[str, Any]] = {
    "gpt": {"family": "gpt"},
    "gqa": {"family": "llama", "kv_heads": 2},
    "wide-heads": {"family": "qwen3", "kv_heads": 1, "head_dim": 14},
    "experts": {"family": "qwen3_moe", "kv_heads": 2, "dense_layers": (1,), **EXPERTS},
    "latent": {"family": "deepseek_v2", **LATENT},
    "latent-experts-mtp": {
        "family": "deepseek_v3", "q_lora": 12, **LATENT, **EXPERTS, "balance": "bias", "shared_experts": 1,
        "dense_layers": 1, "expert_groups": 1, "groups_per_token": 1, "mtp_layers": 1,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_the_formula_is_what_torch_counts(name: str) -> None:
    config = ModelConfig(layers=3, hidden=32, heads=4, ffn=40, vocab=61, **MODELS[name])
    spec = describe(config, vocab=61, sequence_length=SEQ)
    scope = Scope(build_mesh(Layout(), 0), torch.float64, 0)
    blocks = make_blocks(scope, spec, stages={0: range(spec.num_blocks)})[0]
    tokens = torch.randint(61, (ROWS, SEQ), generator=torch.Generator().manual_seed(0))
    batch = Batch(
        tokens=tokens,
        labels=tokens,
        mask=torch.ones_like(tokens, dtype=torch.bool),
        positions=torch.arange(SEQ).expand(ROWS, SEQ),
        document_ids=None,
        samples=torch.arange(ROWS),
        step=1,
    ).look_ahead(torch.zeros_like(tokens), depth=max(spec.mtp_depth, 1))
    with force("attention", "plain"), FlopCounterMode(display=False) as counter, torch.no_grad():
        payload: tuple[torch.Tensor, ...] = ()
        for block in blocks:
            payload = block(payload, batch).payload
    whole = spec.flops(ROWS * SEQ, pairs=ROWS * SEQ**2)  # this attention looks at all keys, and hides some
    assert counter.get_total_flops() * 3 == whole


def test_pairs_are_what_a_mask_lets_through() -> None:
    lengths = [5, 1, 9, 2]
    documents = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    sees = (documents[:, None] == documents) & torch.ones(17, 17, dtype=torch.bool).tril()
    assert causal_pairs(lengths) == int(sees.sum())
    assert causal_pairs([17]) == int(torch.ones(17, 17).tril().sum())


def test_a_token_of_a_sequence_has_its_share() -> None:
    spec = describe(ModelConfig(family="llama", layers=3, hidden=32, heads=4), vocab=61, sequence_length=SEQ)
    assert spec.flops_per_token(SEQ) * SEQ == pytest.approx(spec.flops(SEQ, pairs=causal_pairs([SEQ])))
