"""Context-parallel attention on real ranks is attention of whole rows: every kind, cut, mask and number of heads."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from megads.data.sequence import context_columns
from megads.layers import context
from megads.layers.context import Row, context_attention
from megads.ops.attention import AttentionResult
from megads.ops.attention_call import Call, Columns, Dropout
from megads.parallel.collectives import Pending, start_shift
from megads.parallel.layout import Layout
from megads.parallel.mesh import Group, build_mesh
from megads.parallel.parameter import ContextKind
from megads.parallel.rng import keep_mask
from tests.ranks import run_ranks

KINDS: tuple[ContextKind, ...] = ("ring", "ulysses", "all_gather")
BATCH, SEQ, DIM = 3, 48, 8  # chunks of 12, 8 and 6 columns
SCALE, DROPPED = 0.4, 0.25
# in the middle of chunks, at their edges, one token long, over all ranks
LENGTHS = ((5, 1, 25, 17), (48,), (24, 12, 12))


@dataclass(frozen=True)
class Setting:
    """What is attended: numbers of heads, whether there are documents and dropout."""

    heads: int
    kv_heads: int
    has_documents: bool = False
    has_dropout: bool = False

    @property
    def documents(self) -> Tensor | None:
        """[batch, row] ids."""
        if not self.has_documents:
            return None
        return torch.stack([torch.arange(len(x)).repeat_interleave(torch.tensor(x)) for x in LENGTHS])

    def dropout(self, heads: range) -> Dropout | None:
        """Of these heads, by global head, row and column, as `AttentionDropout` makes it."""
        if not self.has_dropout:
            return None
        units = (torch.arange(BATCH)[:, None] * self.heads + torch.tensor(heads))[..., None]

        def keep(queries: Columns, keys: Columns) -> Tensor:
            rows = torch.cat([torch.arange(part.start, part.stop) for part in queries])
            masks = (
                keep_mask(
                    name="s", step=1, probability=DROPPED, units=units, rows=rows, columns=(p.start, p.stop)
                )
                for p in keys
            )
            return torch.cat([*masks], dim=-1)

        return Dropout(DROPPED, keep)

    def draw(self) -> list[Tensor]:
        """q, k, v and a gradient of the output, of whole rows, as the layers lay them in memory."""
        generator = torch.Generator().manual_seed(self.heads * 100 + self.kv_heads)
        return [
            torch.randn(SEQ, BATCH, heads, DIM, dtype=torch.float64, generator=generator).permute(1, 2, 0, 3)
            for heads in (self.heads, self.kv_heads, self.kv_heads, self.heads)
        ]


def settings(size: int) -> tuple[Setting, ...]:
    """MHA, GQA and MQA; 12 heads in groups that no rank's share is a multiple of, and the other way round."""
    heads = ((2 * size, 2 * size), (2 * size, 2), (3 * size, 1), (12, 4), (12, 3))
    return (
        *(Setting(*pair, documents) for pair in heads for documents in (False, True)),
        Setting(2 * size, 2, has_dropout=True),
        Setting(12, 3, has_documents=True, has_dropout=True),
    )


@functools.cache
def defined(setting: Setting) -> tuple[Tensor, ...]:
    """out, lse, dq, dk, dv of whole rows by the definition."""
    *inputs, flow = setting.draw()
    q, k, v = (x.requires_grad_() for x in inputs)
    group = setting.heads // setting.kv_heads
    hidden = torch.ones(SEQ, SEQ, dtype=torch.bool).triu(1)
    if (ids := setting.documents) is not None:
        hidden = hidden | (ids[:, None, :, None] != ids[:, None, None, :])
    scores = (q @ k.repeat_interleave(group, 1).mT * SCALE).masked_fill(hidden, float("-inf"))
    weights = scores.softmax(-1)
    if (dropout := setting.dropout(range(setting.heads))) is not None:
        weights = weights * dropout.keep((range(SEQ),), (range(SEQ),)) / (1 - DROPPED)
    out = weights @ v.repeat_interleave(group, 1)
    gradients = torch.autograd.grad(out, (q, k, v), flow)
    return tuple(x.detach() for x in (out, scores.logsumexp(-1), *gradients))


def columns_of(rank: int, size: int) -> Tensor:
    return torch.cat([torch.arange(p.start, p.stop) for p in context_columns(rank, size=size, length=SEQ)])


def attended(setting: Setting, kind: ContextKind, group: Group) -> tuple[Tensor, ...]:
    """out, lse, dq, dk, dv of a rank's columns (lse with ulysses of its heads)."""
    columns = columns_of(group.rank, group.size)
    *inputs, flow = (x[:, :, columns] for x in setting.draw())
    leaves = [x.requires_grad_() for x in inputs]
    share = setting.heads // group.size
    heads = range(share * group.rank, share * (group.rank + 1)) if kind == "ulysses" else range(setting.heads)
    result: AttentionResult = context_attention(
        *leaves,
        group=group,
        kind=kind,
        scale=SCALE,
        documents=setting.documents,
        dropout=setting.dropout(heads),
    )
    gradients = torch.autograd.grad(result.out, leaves, flow)
    return tuple(x.detach() for x in (result.out, result.lse, *gradients))


def error(setting: Setting, kind: ContextKind, group: Group) -> float:
    """The largest relative error of what a rank computes."""
    found = attended(setting, kind, group)
    columns = columns_of(group.rank, group.size)
    share = setting.heads // group.size
    worst = 0.0
    for number, (got, whole) in enumerate(zip(found, defined(setting), strict=True)):
        if number == 1 and kind == "ulysses":
            wanted = whole[:, share * group.rank : share * (group.rank + 1)]
        else:
            wanted = whole[:, :, columns]
        assert got.shape == wanted.shape
        worst = max(worst, ((got - wanted).norm() / wanted.norm()).item())
    return worst


@pytest.mark.parametrize("size", [2, 3, 4])
def test_every_kind_is_attention_of_whole_rows(size: int) -> None:
    every = settings(size)
    for setting in every:
        defined(setting)  # before the ranks fork

    def work(rank: int, size: int) -> Any:
        group = build_mesh(Layout(context=size), rank).group("cp")
        return {(s, kind): error(s, kind, group) for s in every for kind in KINDS if s.heads % size == 0}

    for found in run_ranks(work, size):
        worst = max(found, key=lambda key: found[key])
        assert found[worst] <= 1e-12, (worst, found[worst])


def test_over_one_rank_it_is_plain_attention() -> None:
    for setting in (Setting(4, 2, True), Setting(4, 2, True, True)):
        assert all(error(setting, kind, Group((0,), 0)) <= 1e-12 for kind in KINDS)


def _wrong_half(rank: int) -> None:
    meeting = Row.meeting

    def swapped(row: Row, rank: int, *, source: int) -> Any:
        block = meeting(row, rank, source=source)
        half = row.length // row.size // 2
        if source < rank:
            return context.Block(block.queries, slice(half, 2 * half), block.call)
        return block

    Row.meeting = swapped  # type: ignore[method-assign]


def _gradients_stay(rank: int) -> None:
    """Gradients of keys are not brought home: they end one rank early."""
    shifts = {"number": 0}

    def shift(tensor: Tensor, group: Group) -> Pending:
        shifts["number"] += 1
        pending = start_shift(tensor, group)
        is_last = (
            shifts["number"] == 3 * group.size - 2
        )  # forward P - 1, then P - 1 of keys and P of gradients
        return Pending(tensor if is_last and pending.wait() is not None else pending.wait())

    context.start_shift = shift


def _local_softmax(rank: int) -> None:
    """Blocks are averaged by count, not by their log-sum-exp."""
    add = context.Merge.add

    def plain(merge: Any, queries: slice, block: AttentionResult) -> None:
        add(merge, queries, AttentionResult(block.out, torch.zeros_like(block.lse)))

    context.Merge.add = plain  # type: ignore[method-assign]


def _wrong_document_columns(rank: int) -> None:
    """Documents are looked up as if a rank's columns were neighbours."""
    ids = Call.key_ids

    def local(call: Call) -> Tensor | None:
        found = ids.func(call)
        return None if found is None or call.documents is None else call.documents[:, : found.shape[1]]

    Call.key_ids = property(local)  # type: ignore[assignment,method-assign]


@pytest.mark.parametrize(
    "mutation",
    [_wrong_half, _gradients_stay, _local_softmax, _wrong_document_columns],
    ids=lambda mutation: mutation.__name__,
)
def test_a_broken_ring_is_seen(mutation: Callable[[int], None]) -> None:
    setting = Setting(4, 2, has_documents=True)
    defined(setting)

    def work(rank: int, size: int) -> float:
        mutation(rank)
        return error(setting, "ring", build_mesh(Layout(context=size), rank).group("cp"))

    assert max(run_ranks(work, 3)) > 1e-3


def saved_bytes(function: Callable[[], object]) -> int:
    """Bytes of memory that autograd keeps for the backward."""
    storages: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        function()
    return sum(storages.values())


@pytest.mark.parametrize("kind", KINDS)
def test_what_attention_keeps_is_cut_by_the_ranks(kind: ContextKind) -> None:
    """A row of 8192 tokens over 4 ranks: a quarter of the bytes, so 128K tokens are as long as 32K on one rank."""
    length, heads, kv_heads, dim = 8192, 4, 4, 8

    def work(rank: int, size: int) -> int:
        group = build_mesh(Layout(context=size), rank).group("cp")
        fused = torch.zeros(length // size, 1, (heads + 2 * kv_heads) * dim, requires_grad=True)
        q, k, v = (
            x.view(length // size, 1, -1, dim).permute(1, 2, 0, 3)
            for x in fused.split([heads * dim, kv_heads * dim, kv_heads * dim], dim=-1)
        )
        return saved_bytes(lambda: context_attention(q, k, v, group=group, kind=kind, scale=1.0))

    (one,), four = run_ranks(work, 1), run_ranks(work, 4)
    assert one >= length * (2 * heads + 2 * kv_heads) * dim * 4  # q, k, v, out
    assert max(four) * 4 <= one
