"""Promise 1 with latent attention: every layout of DeepSeek-shaped models against one float64 process."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from megads.layers import mla
from megads.parallel import gradient
from megads.parallel.mesh import Mesh
from tests.parity.harness import GLOBAL_BATCH, Case, Model, Outcome, gradient_error, run_case
from tests.parity.test_layouts import check_against

SEQ = 12
LATENT = {
    "q_lora": 20, "kv_lora": 12, "nope_dim": 6, "rope_dim": 4, "v_dim": 5, "init_std": 0.1,
    "rope_scaling": "yarn", "rope_factor": 4.0, "rope_original_positions": 8, "rope_mscale": 1.0,
    "rope_mscale_all_dim": 0.7,
}  # fmt: skip
EXPERTS = {
    "experts": 8, "experts_per_token": 3, "expert_ffn": 16, "shared_experts": 2, "dense_layers": 1, "router": "sigmoid",
    "routed_scaling": 2.5, "expert_groups": 4, "groups_per_token": 2, "balance": "bias", "balance_weight": 0.3,
    "bias_rate": 0.02,
}  # fmt: skip
MODELS = {
    "lora": Model("deepseek_v3", layers=2, seq=SEQ, documents=True, overrides=LATENT),
    "plain": Model("deepseek_v2", layers=2, seq=SEQ, dropout=0.1, overrides={**LATENT, "q_lora": None}),
    "experts": Model("deepseek_v3", layers=3, seq=SEQ, overrides={**LATENT, **EXPERTS, "mtp_layers": 1}),
}
CASES = (
    ("lora", Case(tensor=2, micro=4)),
    ("lora", Case(tensor=2, micro=4, sequence=True, pieces=2, recompute=("norm", "activation"))),
    ("lora", Case(context=2, micro=7)),
    ("lora", Case(context=2, tensor=2, micro=7, sequence=True, context_kind="ulysses", recompute="full")),
    ("plain", Case(context=2, micro=7, context_kind="all_gather", recompute=("attention",))),
    ("plain", Case(tensor=2, pipeline=2, micro=7, sequence=True, recompute=("norm",))),
    ("plain", Case(tensor=4, micro=7)),
    ("experts", Case(pipeline=2, tensor=2, micro=4, sequence=True, schedule="zero_bubble_h1", zero=1)),
    ("experts", Case(pipeline=2, data=2, expert=2, micro=2, schedule="dualpipe_v", chunks=2)),
    ("experts", Case(context=2, tensor=2, expert=2, expert_tensor=1, micro=7, sequence=True)),
)
MORE = tuple(
    (name, Case(context=context, tensor=2, micro=7, sequence=True, context_kind=kind, recompute=recompute))
    for name in MODELS
    for context, kind in ((2, "ring"), (2, "ulysses"), (2, "all_gather"), (3, "ring"))
    for recompute in ("none", ("norm", "activation"))
)


@functools.cache
def reference(name: str) -> Outcome:
    return run_case(MODELS[name], Case(micro=GLOBAL_BATCH), precision="fp64", steps=2)


def check(name: str, case: Case) -> None:
    check_against(
        reference(name),
        run_case(MODELS[name], case, precision="fp64", steps=2),
        loss_bound=1e-12,
        gradient_bound=1e-12,
    )


@pytest.mark.parametrize(("name", "case"), CASES, ids=[f"{name}-{case}" for name, case in CASES])
def test_layout_changes_nothing(name: str, case: Case) -> None:
    check(name, case)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "case"), MORE, ids=[f"{name}-{case}" for name, case in MORE])
def test_every_cut_of_rows(name: str, case: Case) -> None:
    check(name, case)


def test_float32_stays_close() -> None:
    got = run_case(MODELS["lora"], Case(tensor=2, micro=4, sequence=True), precision="fp32", steps=2)
    check_against(reference("lora"), got, loss_bound=1e-6, gradient_bound=1e-5)


def _forget_other_heads(mesh: Mesh) -> None:
    """The gradient of the keys that all heads share is that of this rank's heads (torchtitan pull 1373)."""
    mla.copy_to = lambda x, group: x  # type: ignore[assignment]


def _forget_other_parts(mesh: Mesh) -> None:
    """Gradients of what is whole on every rank are those of its own part of the sequence."""
    gradient.all_reduce_ = lambda t, group: t  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("mutation", "sequence"), [(_forget_other_heads, False), (_forget_other_parts, True)], ids=str
)
def test_a_forgotten_sum_is_seen(mutation: Callable[[Mesh], None], sequence: bool) -> None:
    model = replace(MODELS["lora"], documents=False)
    case = Case(tensor=2, micro=14, sequence=sequence)
    expected = run_case(model, Case(micro=GLOBAL_BATCH), precision="fp64", steps=1)
    try:
        got = run_case(model, case, precision="fp64", steps=1, before=mutation)
    except AssertionError as error:
        assert "disagree" in str(error)
    else:
        assert max(gradient_error(got, expected).values()) > 1e-3
    torch.testing.assert_close(run_case(model, case, precision="fp64", steps=1).losses, expected.losses)
