"""Promise 1 under context parallelism: sequences cut over ranks, every kind, with everything else that cuts a model."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from megads.assemble import step
from megads.assemble.wiring import build_model, layout_of
from megads.data import sequence
from megads.data.sequence import Batch
from megads.layers import dropout
from megads.parallel.mesh import Mesh, build_mesh
from tests.parity.harness import (
    VOCAB,
    Case,
    Model,
    Outcome,
    gradient_error,
    make_batch,
    make_config,
    run_case,
)
from tests.parity.test_layouts import check_against
from tests.ranks import run_ranks

SEQ = 12
MODELS = {
    "gpt": Model("gpt", layers=2, seq=SEQ),  # learned positions
    "packed": Model("llama", layers=2, seq=SEQ, documents=True),  # rotary, 4 key/value heads, documents
    "dropout": Model("gpt", layers=2, seq=SEQ, documents=True, dropout=0.1),
    "mqa": Model("llama", layers=2, seq=SEQ, dropout=0.1, kv_heads=1),
}
CASES = (
    ("gpt", Case(context=2, micro=4)),
    ("dropout", Case(context=3, micro=4)),
    ("packed", Case(context=2, micro=4, context_kind="ulysses")),
    ("mqa", Case(context=2, micro=7, context_kind="all_gather")),
    ("packed", Case(context=2, tensor=2, micro=7, sequence=True, recompute="full")),
    ("dropout", Case(context=2, tensor=2, micro=7, sequence=True, context_kind="ulysses")),
    ("gpt", Case(context=2, pipeline=2, micro=4, context_kind="all_gather", recompute=("attention",))),
    ("packed", Case(context=2, data=2, micro=7, zero=1, bucket=3000)),
    ("dropout", Case(context=2, tensor=2, pipeline=2, micro=7, sequence=True, recompute="full")),
)
MORE = tuple(
    (name, Case(context=context, micro=4, context_kind=kind, recompute=recompute))
    for name in MODELS
    for context, kinds in ((2, ("ring", "ulysses", "all_gather")), (3, ("ring", "all_gather")))
    for kind in kinds
    for recompute in ("none", "full")
) + tuple(
    (name, Case(context=2, tensor=2, pipeline=2, micro=2, zero=1, sequence=True, context_kind=kind))
    for name, kind in (("dropout", "ring"), ("packed", "ulysses"), ("gpt", "all_gather"))
)


@functools.cache
def reference(name: str) -> Outcome:
    return run_case(MODELS[name], Case(micro=28), precision="fp64", steps=2)


def check(name: str, case: Case) -> None:
    exact = run_case(MODELS[name], case, precision="fp64", steps=2)
    check_against(reference(name), exact, loss_bound=1e-12, gradient_bound=1e-12)


@pytest.mark.parametrize(("name", "case"), CASES, ids=[f"{name}-{case}" for name, case in CASES])
def test_cutting_rows_changes_nothing(name: str, case: Case) -> None:
    check(name, case)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "case"), MORE, ids=[f"{name}-{case}" for name, case in MORE])
def test_every_kind_of_every_model(name: str, case: Case) -> None:
    check(name, case)
    rounded = run_case(MODELS[name], case, precision="fp32", steps=2)
    check_against(reference(name), rounded, loss_bound=1e-6, gradient_bound=1e-5)


@pytest.mark.parametrize(
    "kind", ["ring", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("ulysses", "all_gather"))]
)
def test_in_bf16_at_most_twice_the_error_of_one_process(kind: str) -> None:
    """Blocks are rounded to bf16 one by one and added up in fp32."""
    alone = run_case(MODELS["packed"], Case(micro=7), precision="bf16", steps=2)
    got = run_case(MODELS["packed"], Case(context=2, micro=7, context_kind=kind), precision="bf16", steps=2)
    errors, allowed = (gradient_error(outcome, reference("packed")) for outcome in (got, alone))
    assert 1e-5 < max(allowed.values()) < 0.1
    assert max(errors.values()) <= 2 * max(allowed.values())
    assert sum(errors.values()) <= 2 * sum(allowed.values())


def _positions_restart(mesh: Mesh) -> None:
    """Every rank counts positions from the start of its own part."""
    part = Batch.context_part

    def local(batch: Batch, rank: int, size: int) -> Batch:
        cut = part(batch, rank, size)
        return sequence.replace(cut, positions=torch.arange(cut.tokens.shape[1]).expand_as(cut.tokens))

    Batch.context_part = local  # type: ignore[method-assign]


def _positions_are_one_off(mesh: Mesh) -> None:
    part = Batch.context_part

    def shifted(batch: Batch, rank: int, size: int) -> Batch:
        cut = part(batch, rank, size)
        return sequence.replace(cut, positions=(cut.positions + 1).clamp_max(SEQ - 1))

    Batch.context_part = shifted  # type: ignore[method-assign]


def _labels_are_of_the_part(mesh: Mesh) -> None:
    """Labels are made from the local tokens: wrong where a chunk ends."""
    part = Batch.context_part

    def local(batch: Batch, rank: int, size: int) -> Batch:
        cut = part(batch, rank, size)
        labels = torch.cat((cut.tokens[:, 1:], cut.labels[:, -1:]), dim=1)
        return sequence.replace(cut, labels=labels)

    Batch.context_part = local  # type: ignore[method-assign]


def _halves_are_neighbours(mesh: Mesh) -> None:
    """Two ranks get the halves of a row, while attention believes in zig-zag chunks."""
    part = Batch.context_part

    def plain(batch: Batch, rank: int, size: int) -> Batch:
        def moved(x: torch.Tensor) -> torch.Tensor:
            first, second, third, fourth = x.chunk(4, dim=1)
            return torch.cat((first, third, fourth, second), dim=1)

        fields = ("tokens", "labels", "mask", "positions")
        return part(sequence.replace(batch, **{f: moved(getattr(batch, f)) for f in fields}), rank, size)

    Batch.context_part = plain  # type: ignore[method-assign]


def _dropout_by_local_column(mesh: Mesh) -> None:
    keep = dropout.keep_mask

    def local(**kwargs: object) -> torch.Tensor:
        rows = kwargs["rows"]
        assert isinstance(rows, torch.Tensor)
        return keep(**{**kwargs, "rows": torch.arange(rows.numel()).view(rows.shape)})  # type: ignore[arg-type]

    dropout.keep_mask = local  # type: ignore[assignment]


def _token_count_is_of_the_part(mesh: Mesh) -> None:
    """Each context-parallel rank divides by its own number of tokens, and the mean of the means is taken."""
    count = step.count_tokens

    def local(batch: Batch, mesh: Mesh) -> torch.Tensor:
        return batch.mask.sum().double() * mesh.group("cp").size + 0 * count(batch, mesh)

    step.count_tokens = local


MUTATIONS = (
    ("gpt", _token_count_is_of_the_part),
    ("gpt", _positions_restart),
    ("gpt", _positions_are_one_off),
    ("packed", _positions_restart),
    ("gpt", _labels_are_of_the_part),
    ("gpt", _halves_are_neighbours),
    ("dropout", _dropout_by_local_column),
)


@pytest.mark.parametrize(("name", "mutation"), MUTATIONS, ids=[f"{n}-{m.__name__}" for n, m in MUTATIONS])
def test_a_wrong_cut_is_seen(name: str, mutation: Callable[[Mesh], None]) -> None:
    try:
        got = run_case(MODELS[name], Case(context=2, micro=14), precision="fp64", steps=1, before=mutation)
    except AssertionError as error:
        assert "ranks disagree" in str(error)
    else:
        assert max(gradient_error(got, reference(name)).values()) > 1e-3


LONG = Model("llama", layers=1, seq=8192)


def forward_of_a_long_row(rank: int, size: int, *, kind: str) -> tuple[float, int, int]:
    """Sum of a rank's losses, number of its tokens, bytes that its forward keeps for the backward."""
    config = make_config(LONG, Case(context=size, context_kind=kind), precision="fp32")
    mesh = build_mesh(layout_of(config, size), rank)
    model = build_model(config, mesh, vocab=VOCAB)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters}
    batch = make_batch(1, seq=LONG.seq).rows(20, 21).context_part(rank, size)
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    payload, extras = (), ()
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        for block in model.stages[0]:
            output = block(payload, batch)
            payload, extras = output.payload, output.extras
    return extras[0].sum.item(), batch.mask.sum().item(), sum(kept.values())


@pytest.mark.parametrize("kind", ["ring", pytest.param("ulysses", marks=pytest.mark.slow)])
def test_a_long_row_takes_a_quarter_of_the_memory_on_four_ranks(kind: str) -> None:
    """What a rank keeps of 8192 tokens falls with the number of ranks, so 8 ranks train 128K where one trains 16K."""
    ((loss, count, one),) = run_ranks(functools.partial(forward_of_a_long_row, kind=kind), 1)
    losses, counts, four = zip(
        *run_ranks(functools.partial(forward_of_a_long_row, kind=kind), 4), strict=True
    )
    assert sum(counts) == count
    assert sum(losses) == pytest.approx(loss, rel=1e-6)
    assert one > 8192 * 64 * 4 * 10  # some ten activations of a layer
    assert max(four) <= 1.01 * one / 4
