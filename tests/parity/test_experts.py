"""Promise 1 with experts: every layout, expert grid, balance and router against one float64 process."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from megads.assemble.step import train_step
from megads.assemble.wiring import build_engine, build_executors, build_model, layout_of
from megads.layers import experts as experts_module
from megads.layers import router as router_module
from megads.parallel import gradient, tokens
from megads.parallel.collectives import Pending
from megads.parallel.mesh import Group, Mesh, build_mesh
from megads.parallel.parameter import Piece
from megads.parallel.shard import ShardSpec
from megads.verify.routing import RouteKeeper, Routes
from tests.parity.harness import (
    GLOBAL_BATCH,
    SEQ,
    VOCAB,
    Case,
    Model,
    Outcome,
    assemble,
    gradient_error,
    make_batch,
    make_config,
    run_case,
)
from tests.ranks import run_ranks

# balance weights far above what one would train with, so that the losses are a good part of the gradient
SEQUENCE = Model(
    "llama",
    layers=2,
    overrides={
        "experts": 8, "experts_per_token": 2, "expert_ffn": 16, "renormalise": True, "init_std": 0.1,
        "balance": "sequence", "balance_weight": 0.5, "z_loss": 0.01,
    },
)  # fmt: skip
BIAS = Model(
    "llama",
    layers=3,
    overrides={
        "experts": 8, "experts_per_token": 3, "expert_ffn": 16, "shared_experts": 1, "dense_layers": 1,
        "router": "sigmoid", "renormalise": True, "routed_scaling": 2.5, "expert_groups": 4, "groups_per_token": 2,
        "balance": "bias", "balance_weight": 0.3, "bias_rate": 0.02, "init_std": 0.1,
    },
)  # fmt: skip
CAPACITY = Model(
    "llama",
    layers=2,
    overrides={
        "experts": 4, "experts_per_token": 2, "expert_ffn": 24, "balance": "global", "balance_weight": 0.5,
        "capacity": 1.0, "z_loss": 0.1, "init_std": 0.1,
    },
)  # fmt: skip
MODELS = {
    "sequence": SEQUENCE,
    "bias": BIAS,
    "capacity": CAPACITY,
    "context": replace(SEQUENCE, seq=12, overrides={**SEQUENCE.overrides, "capacity": 1.0}),
}

CASES = (
    ("sequence", Case(micro=4)),
    ("sequence", Case(data=2, expert=2, micro=2)),
    ("sequence", Case(tensor=2, micro=4)),
    ("sequence", Case(tensor=2, expert=2, expert_tensor=1, micro=4, sequence=True)),
    ("sequence", Case(tensor=2, data=2, expert=2, micro=2, zero=1)),
    ("sequence", Case(tensor=4, expert=2, expert_tensor=1, micro=7)),  # shares of 18, 18, 18 and 16 tokens
    ("sequence", Case(tensor=2, pipeline=2, expert_tensor=1, micro=4, recompute=("mlp",))),
    ("bias", Case(data=4, expert=4, micro=7, zero=1, bucket=3000)),
    ("bias", Case(tensor=2, expert=2, expert_tensor=1, micro=4, recompute="full")),
    ("bias", Case(pipeline=2, data=2, expert=2, micro=2, schedule="interleaved", chunks=2)),
    ("bias", Case(pipeline=2, data=2, expert=2, micro=2, schedule="zero_bubble_h1", zero=1)),
    (
        "bias",
        Case(data=4, expert=2, expert_tensor=2, micro=7),
    ),  # an expert's halves on data-parallel neighbours
    ("bias", Case(tensor=2, data=2, expert=4, expert_tensor=1, micro=2, sequence=True, zero=1)),
    ("bias", Case(pipeline=2, micro=4, schedule="zbv", chunks=2, recompute=("norm", "activation"))),
    ("context", Case(context=2, expert=2, micro=4)),
    ("context", Case(context=2, tensor=2, expert=2, micro=7, sequence=True, context_kind="ulysses")),
    ("capacity", Case(tensor=2, micro=4)),
    ("capacity", Case(tensor=4, expert=4, expert_tensor=1, micro=7)),
    ("capacity", Case(data=2, expert=2, micro=2, zero=1, recompute="full")),
    ("capacity", Case(pipeline=2, micro=4, recompute=("attention", "mlp"))),
    ("capacity", Case(tensor=2, data=2, expert=2, micro=2, sequence=True)),
)
MORE = (
    ("sequence", Case(pipeline=2, data=2, expert=2, micro=2, schedule="dualpipe_v", chunks=2)),
    ("sequence", Case(pipeline=2, tensor=2, expert=2, expert_tensor=1, micro=4, schedule="zbv", chunks=2)),
    ("sequence", Case(data=4, expert=2, micro=7, zero=1, bucket=2000, offload=True)),
    ("context", Case(tensor=2, context=2, data=2, expert=4, micro=7, sequence=True, zero=1)),
    ("bias", Case(tensor=2, data=2, expert=2, micro=2, recompute=("norm", "activation"), offload=True)),
    ("bias", Case(pipeline=4, data=2, expert=2, micro=2, recompute="full")),
    (
        "bias",
        Case(tensor=2, pipeline=2, data=2, expert=2, micro=2, sequence=True, zero=1, recompute=("mlp",)),
    ),
    ("capacity", Case(data=4, expert=4, micro=7, zero=1)),
    ("capacity", Case(tensor=4, pipeline=2, expert=2, expert_tensor=2, micro=7)),
    ("context", Case(context=2, data=2, expert=4, micro=7, context_kind="all_gather", recompute="full")),
    ("context", Case(context=2, tensor=2, expert=2, expert_tensor=2, micro=7)),
)


@functools.cache
def reference(name: str) -> Outcome:
    return run_case(MODELS[name], Case(micro=GLOBAL_BATCH), precision="fp64", steps=3)


@pytest.mark.parametrize(("name", "case"), CASES, ids=[f"{name}-{case}" for name, case in CASES])
def test_layout_changes_nothing(name: str, case: Case) -> None:
    check(name, case)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "case"), MORE, ids=[f"{name}-{case}" for name, case in MORE])
def test_more_layouts_change_nothing(name: str, case: Case) -> None:
    check(name, case)


def check(name: str, case: Case) -> None:
    expected = reference(name)
    got = run_case(MODELS[name], case, precision="fp64", steps=3)
    assert all(torch.equal(expected.initial[n], got.initial[n]) for n in expected.initial)
    assert got.losses == pytest.approx(expected.losses, rel=1e-12)
    assert got.norms == pytest.approx(expected.norms, rel=1e-11)
    errors = gradient_error(got, expected)
    worst = max(errors, key=lambda n: errors[n])
    assert errors[worst] <= 1e-12, f"{worst}: {errors[worst]:.2e}"
    biases = [n for n in expected.final if n.endswith("router.bias")]
    assert len(biases) == (2 if name == "bias" else 0)
    assert all(torch.equal(expected.final[n], got.final[n]) for n in biases)


def test_the_bias_and_every_weight_move() -> None:
    for name in MODELS:
        outcome = reference(name)
        still = [n for n, v in outcome.initial.items() if torch.equal(v, outcome.final[n])]
        assert not still, f"{name}: {still}"


@pytest.mark.parametrize("name", MODELS)
def test_float32_stays_close(name: str) -> None:
    case = Case(tensor=2, expert=2, expert_tensor=1, micro=4)
    got = run_case(MODELS[name], case, precision="fp32", steps=2)
    expected = reference(name)
    assert got.losses == pytest.approx(expected.losses[:2], rel=1e-6)
    errors = gradient_error(got, expected)
    assert max(errors.values()) <= 1e-5


def measured(name: str, case: Case) -> list[dict[str, Any]]:
    """What a step reports of routers, by step, the same on every rank."""
    config = make_config(MODELS[name], case, precision="fp64")

    def work(rank: int, size: int) -> Any:
        mesh = build_mesh(layout_of(config, size), rank)
        model = build_model(config, mesh, vocab=VOCAB)
        engine = build_engine(config, model, mesh=mesh)
        executors = build_executors(config, model, mesh=mesh)
        rows = GLOBAL_BATCH // mesh.layout.data
        found = []
        for step in range(1, 3):
            batch = make_batch(step).rows(mesh.group("dp").rank * rows, (mesh.group("dp").rank + 1) * rows)
            result = train_step(batch, executor=executors.train, engine=engine, mesh=mesh, lr=1e-3)
            with torch.no_grad():  # an evaluation between the steps counts nothing
                executors.evaluate.run(batch)
            extras = {term: value.item() for term, value in result.extras.items()}
            found.append({**extras, "tallies": result.report.tallies.tolist()})
        return found

    results = run_ranks(work, case.world_size)
    assert all(result == results[0] for result in results)
    first: list[dict[str, Any]] = results[0]
    return first


@pytest.mark.parametrize(
    ("name", "case"),
    [
        ("sequence", Case(tensor=2, data=2, expert=2, micro=2, sequence=True)),
        ("bias", Case(pipeline=2, data=2, expert=2, micro=2, recompute="full")),
        ("capacity", Case(tensor=2, pipeline=2, micro=4, recompute=("mlp",))),
    ],
    ids=str,
)
def test_what_is_reported_is_of_the_whole_batch(name: str, case: Case) -> None:
    expected, got = measured(name, Case(micro=GLOBAL_BATCH)), measured(name, case)
    overrides = MODELS[name].overrides
    choices = GLOBAL_BATCH * SEQ * overrides["experts_per_token"]
    for mine, other in zip(got, expected, strict=True):
        assert mine["tallies"] == other["tallies"]
        assert all(sum(row[:-1]) == choices for row in mine["tallies"])
        assert any(row[-1] > 0 for row in mine["tallies"]) == (name == "capacity")
        for term in mine.keys() - {"tallies"}:
            assert mine[term] == pytest.approx(other[term], rel=1e-12)
    assert got[0].keys() == {"tallies", "balance_loss"} | ({"z_loss"} if "z_loss" in overrides else set())
    assert got[0]["balance_loss"] >= 1.0 - 1e-12  # 1 where experts are as busy as each other


# --- another layout goes on where the first one stopped


def _copies(pieces: tuple[Piece, ...]) -> list[tuple[str, tuple[int, ...], tuple[slice, ...], torch.Tensor]]:
    return [(p.name, p.shape, p.box.slices, p.tensor.clone()) for p in pieces]


def run_part(
    name: str, case: Case, *, steps: range, start: tuple[dict[str, torch.Tensor], Any] | None
) -> tuple[dict[str, torch.Tensor], Any, list[float]]:
    """Steps of a run, from a state if there is one; returns state and losses."""
    config = make_config(MODELS[name], case, precision="fp64")

    def work(rank: int, size: int) -> Any:
        mesh = build_mesh(layout_of(config, size), rank)
        model = build_model(config, mesh, vocab=VOCAB)
        engine = build_engine(config, model, mesh=mesh)
        executor = build_executors(config, model, mesh=mesh).train
        if start is not None:
            for piece in engine.targets():
                piece.tensor.copy_(start[0][piece.name][piece.box.slices])
            engine.load_scalars(start[1])
        rows = GLOBAL_BATCH // mesh.layout.data
        found = []
        for step in steps:
            batch = make_batch(step).rows(mesh.group("dp").rank * rows, (mesh.group("dp").rank + 1) * rows)
            found.append(train_step(batch, executor=executor, engine=engine, mesh=mesh, lr=1e-3).loss.item())
        return _copies(engine.state()), dict(engine.scalars()), found

    results = run_ranks(work, case.world_size)
    return assemble([r[0] for r in results]), results[0][1], results[0][2]


@pytest.mark.parametrize("name", ["bias", "capacity"])
def test_a_run_goes_on_under_another_layout(name: str) -> None:
    whole, _, losses = run_part(name, Case(micro=4), steps=range(1, 5), start=None)
    first = Case(tensor=2, expert=2, expert_tensor=1, micro=4, zero=1)
    state, scalars, _ = run_part(name, first, steps=range(1, 3), start=None)
    kept = {"bias": "model/layers.1.mlp.router.bias", "capacity": "router/layers.1.mlp.router.load"}[name]
    assert state[kept].abs().sum() > 0
    second = Case(pipeline=2, data=2, expert=2, micro=2)
    final, _, rest = run_part(name, second, steps=range(3, 5), start=(state, scalars))
    assert rest == pytest.approx(losses[2:], rel=1e-12)
    assert final.keys() == whole.keys()
    assert torch.allclose(final[kept], whole[kept], rtol=1e-12)
    without = {**state, kept: torch.ones_like(state[kept])}  # what a state that was forgotten would do
    _, _, other = run_part(name, second, steps=range(3, 5), start=(without, scalars))
    assert other != pytest.approx(losses[2:], rel=1e-9)


# --- code with one mistake is seen


def _sum_over_all_ranks(mesh: Mesh) -> None:
    ShardSpec.reduction = property(lambda self: "dp_cp")  # type: ignore[assignment,method-assign]


def _forget_partial_router(mesh: Mesh) -> None:
    gradient.all_reduce_ = lambda t, group: t  # type: ignore[assignment]


def _forget_other_parts_of_the_sequence(mesh: Mesh) -> None:
    router_module.all_reduce_ = lambda t, group: t  # type: ignore[assignment]


def _forget_other_parts_of_an_expert(mesh: Mesh) -> None:
    experts_module.scatter_sum = lambda x, group: x.chunk(group.size)[group.rank]  # type: ignore[assignment]


def _rank_drops_alone(mesh: Mesh) -> None:
    def others_have_nothing(x: torch.Tensor, group: Group) -> Pending:
        return Pending(
            torch.cat([x if rank == group.rank else torch.full_like(x, -1) for rank in range(group.size)])
        )

    router_module.start_gather_sequence = others_have_nothing  # type: ignore[assignment]


def _forget_gradient_of_other_shares(mesh: Mesh) -> None:
    def keep(self: tokens.Shares, share: torch.Tensor) -> torch.Tensor:
        whole = share.new_zeros((self.total, *share.shape[1:]))
        whole[self.start : self.stop] = share
        return whole

    tokens._TakeShare.backward = staticmethod(lambda ctx, dy: (keep(ctx.shares, dy), None))  # type: ignore


def _take_experts_for_replicas(mesh: Mesh) -> None:
    gradient.is_primary = lambda parameter, mesh: mesh.group("tp").rank == 0  # type: ignore[assignment]


MUTATIONS: tuple[tuple[str, Callable[[Mesh], None], Case], ...] = (
    ("sequence", _sum_over_all_ranks, Case(data=2, expert=2, micro=2)),
    ("sequence", _forget_partial_router, Case(tensor=2, micro=4)),
    ("sequence", _forget_other_parts_of_the_sequence, Case(tensor=2, micro=4)),
    ("sequence", _forget_other_parts_of_an_expert, Case(tensor=2, micro=4)),
    ("sequence", _forget_gradient_of_other_shares, Case(tensor=2, micro=4)),
    ("capacity", _rank_drops_alone, Case(tensor=2, micro=4)),
    ("sequence", _take_experts_for_replicas, Case(tensor=2, expert=2, expert_tensor=1, micro=4)),
)


@pytest.mark.parametrize(
    ("name", "mutation", "case"), MUTATIONS, ids=[mutation.__name__ for _, mutation, _ in MUTATIONS]
)
def test_broken_code_is_seen(name: str, mutation: Callable[[Mesh], None], case: Case) -> None:
    """By gradients, or because ranks disagree or elements are missing."""
    try:
        got = run_case(MODELS[name], replace(case, micro=14), precision="fp64", steps=1, before=mutation)
    except AssertionError as error:
        assert "ranks disagree" in str(error) or "missing or written twice" in str(error)
    else:
        assert max(gradient_error(got, reference(name)).values()) > 1e-4


# --- near-ties


def step_with_twins(
    case: Case, *, precision: str, against: Routes | None
) -> tuple[dict[str, torch.Tensor], Routes, int]:
    """Gradients of one step of a model whose experts 0 and 1 are chosen by rounding alone; choices; replays."""
    config = make_config(SEQUENCE, case, precision=precision)

    def work(rank: int, size: int) -> Any:
        mesh = build_mesh(layout_of(config, size), rank)
        model = build_model(config, mesh, vocab=VOCAB)
        for parameter in model.parameters:
            if parameter.logical_name.endswith("router.weight"):
                parameter.data[1] = parameter.data[0] * (1 + 1e-7)
        engine = build_engine(config, model, mesh=mesh)
        executor = build_executors(config, model, mesh=mesh).train
        rows = GLOBAL_BATCH // mesh.layout.data
        batch = make_batch(1).rows(mesh.group("dp").rank * rows, (mesh.group("dp").rank + 1) * rows)
        with RouteKeeper(model, (GLOBAL_BATCH, SEQ), against) as keeper:
            train_step(batch, executor=executor, engine=engine, mesh=mesh, lr=1e-3)
        return _copies(engine.state()), keeper.routes, keeper.num_replayed

    results = run_ranks(work, case.world_size)
    whole = assemble([r[0] for r in results])
    moments = {n: v.double() for n, v in whole.items() if n.startswith("optim/exp_avg/")}
    return moments, results[0][1], sum(r[2] for r in results)


def test_near_ties_are_replayed_from_the_reference() -> None:
    expected, routes, _ = step_with_twins(Case(micro=GLOBAL_BATCH), precision="fp64", against=None)
    case = Case(tensor=2, expert=2, expert_tensor=1, micro=14)

    def worst(found: dict[str, torch.Tensor]) -> float:
        total = sum(float(g.square().sum()) for g in expected.values()) ** 0.5
        return max(
            float((found[n] - g).norm()) / max(float(g.norm()), 1e-4 * total) for n, g in expected.items()
        )

    got, _, num_replayed = step_with_twins(case, precision="fp32", against=routes)
    assert worst(got) <= 1e-5
    assert num_replayed > 0
    alone, _, _ = step_with_twins(case, precision="fp32", against=None)
    assert worst(alone) > 1e-3, "rounding decided nothing: the case shows nothing"
