"""Promise 1 with Qwen-shaped models: biases of q, k and v, norms of their heads, wide heads, layers with experts."""

from __future__ import annotations

import functools

import pytest

from megads.parallel import gradient
from megads.parallel.mesh import Mesh
from tests.parity.harness import GLOBAL_BATCH, Case, Model, Outcome, gradient_error, run_case
from tests.parity.test_layouts import check_against

EXPERTS = {
    "experts": 8, "experts_per_token": 3, "expert_ffn": 16, "dense_layers": (1,), "balance": "global",
    "balance_weight": 0.1, "init_std": 0.1,
}  # fmt: skip
MODELS = {
    "qwen2": Model("qwen2", layers=2, kv_heads=2, seq=12, tied=True),
    "qwen3": Model("qwen3", layers=2, kv_heads=2, seq=12, documents=True, overrides={"head_dim": 12}),
    "one-kv": Model("qwen3", layers=2, kv_heads=1, seq=12, overrides={"head_dim": 10}),
    "experts": Model("qwen3_moe", layers=3, kv_heads=2, seq=12, overrides={**EXPERTS, "head_dim": 10}),
}
CASES = (
    ("qwen2", Case(tensor=2, pipeline=2, micro=7, sequence=True)),
    ("qwen3", Case(tensor=2, micro=4)),
    ("qwen3", Case(tensor=2, context=2, micro=7, sequence=True, recompute=("norm", "activation"))),
    ("one-kv", Case(pipeline=2, data=2, micro=7, schedule="zero_bubble_h1", zero=1)),
    ("experts", Case(tensor=2, pipeline=2, expert=2, expert_tensor=1, micro=4, sequence=True)),
)


@functools.cache
def reference(name: str) -> Outcome:
    return run_case(MODELS[name], Case(micro=GLOBAL_BATCH), precision="fp64", steps=2)


@pytest.mark.parametrize(("name", "case"), CASES, ids=[f"{name}-{case}" for name, case in CASES])
def test_layout_changes_nothing(name: str, case: Case) -> None:
    found = run_case(MODELS[name], case, precision="fp64", steps=2)
    check_against(reference(name), found, loss_bound=1e-12, gradient_bound=1e-12)


def _forget_other_heads(mesh: Mesh) -> None:
    """The gradient of the norm that all heads share is that of this rank's heads."""
    gradient.all_reduce_ = lambda t, group: t  # type: ignore[assignment]


def test_a_head_norm_whose_gradient_is_not_summed_over_ranks_is_seen() -> None:
    case = Case(tensor=2, micro=4)
    found = run_case(MODELS["qwen3"], case, precision="fp64", steps=1, before=_forget_other_heads)
    wrong = {name for name, error in gradient_error(found, reference("qwen3")).items() if error > 1e-3}
    assert wrong == {f"layers.{layer}.attention.{part}_norm.weight" for layer in (0, 1) for part in "qk"}
