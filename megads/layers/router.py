"""Which experts each token goes to, with what weight, and what that costs the loss.

    x [t, h] -- W --> logits [t, E] --> scores --(+ bias)--> choice of K, maybe inside the M best of G groups
                                          |                       |
                                          +--------- gates of the chosen ones, renormalised, scaled
                                          +--------- balance loss: sum over tokens of  sum_i f_i s_i

f_i is how often expert i was chosen (1: as often as the mean), a constant for the gradient: in the token's own
sequence, or in the whole batch of the step before. Either way the loss is a sum over tokens, divided once by the number
of all tokens: none is defined by a micro-batch or a rank. Nothing here moves tokens (`dispatch.py`).

Sources: softmax gates, Fedus et al. 2021; group limit, DeepSeek-V2 2024 (section 2.2.2); sigmoid gates, bias, sequence
loss, DeepSeek-V3 2024 (eqs. 12-20); z-loss, Zoph et al. 2022 (eq. 5).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from megads.data.sequence import Batch
from megads.layers.linear import add_weight_gradient
from megads.parallel.collectives import all_reduce_, start_gather_sequence
from megads.parallel.mesh import Mesh
from megads.parallel.parameter import Piece, Scope
from megads.parallel.shard import Box, Init, ShardSpec
from megads.parallel.tally import Tallied, count_once
from megads.parallel.tokens import Shares, fill_up
from megads.parallel.weight_queue import WeightQueue

GATE_STEPS = 4096  # in which gates are compared where tokens are dropped

Balance = Literal["none", "sequence", "global", "bias"]


@dataclass(frozen=True, slots=True)
class MoESpec:
    """Everything that defines the experts of a model; sizes are global, nothing is left open.

    Attributes:
        experts, per_token: of a layer, and those that a token goes to.
        ffn: width of one expert.
        shared_ffn: width of the MLP that every token passes beside them; 0: none.
        scores: how logits become scores.
        renormalises: whether the gates of a token are divided by their sum.
        scaling: what gates are multiplied by.
        groups, groups_per_token: of experts, and those that a token may choose from; 1, 1: no limit.
        group_score: of a group, the best score in it or the sum of the best two.
        balance: how experts are kept busy alike.
        balance_weight: of the balance loss of one layer; with `bias` of a sequence loss beside it.
        bias_rate: by how much a step moves the bias of an expert.
        z_weight: of the z-loss of one layer.
        capacity: tokens that an expert takes of one sequence, in units of the mean; None: all that come.
    """

    experts: int
    per_token: int
    ffn: int
    shared_ffn: int
    scores: Literal["softmax", "sigmoid"]
    renormalises: bool
    scaling: float
    groups: int
    groups_per_token: int
    group_score: Literal["max", "top2"]
    balance: Balance
    balance_weight: float
    bias_rate: float
    z_weight: float
    capacity: float | None

    @property
    def has_balance_loss(self) -> bool:
        return self.balance != "none" and self.balance_weight > 0

    @property
    def num_columns(self) -> int:
        """Of the tally of a layer: tokens that chose each expert, and choices that were dropped."""
        return self.experts + 1


@dataclass(frozen=True, slots=True)
class TokenPlaces:
    """Which tokens a router sees: this rank's of [seq, batch], one row each.

    Attributes:
        rows: [t] int64, row of the micro-batch.
        columns: [t] int64, place in the sequence.
        samples: [t] int64, index in the step's global batch.
        num_rows: of the micro-batch.
        sequence_length: of a whole row.
        shares: how the tensor-parallel ranks share the tokens of the stage's activation.
    """

    rows: Tensor
    columns: Tensor
    samples: Tensor
    num_rows: int
    sequence_length: int
    shares: Shares

    @classmethod
    def of(cls, batch: Batch, mesh: Mesh) -> TokenPlaces:
        """The tokens of this rank: its part of the sequence, or its share of tokens that tensor ranks hold alike.

        Both are the same rows of [seq, batch] where the sequence can be cut evenly.
        """
        num_rows, seq = batch.tokens.shape
        shares = Shares(seq * num_rows, mesh.group("tp"))
        index = torch.arange(shares.start, shares.stop, device=batch.tokens.device)
        rows = index % num_rows
        columns = batch.places[torch.div(index, num_rows, rounding_mode="floor")]
        length = seq * mesh.group("cp").size
        return cls(rows, columns, batch.samples[rows], num_rows, length, shares)

    @property
    def num_tokens(self) -> int:
        return self.rows.shape[0]


@dataclass(frozen=True, slots=True)
class Routing:
    """Where tokens go.

    Attributes:
        experts: [t, K] int64; the number of experts where a choice was dropped.
        gates: [t, K], in the dtype of the scores.
        is_whole: whether no choice can have been dropped.
        balance_loss, z_loss: sums over the tokens; None: the model has none.
    """

    experts: Tensor
    gates: Tensor
    is_whole: bool
    balance_loss: Tensor | None
    z_loss: Tensor | None


class _Logits(torch.autograd.Function):
    """x W^T in float32 or wider, the weight's gradient too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, queue: WeightQueue) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.queue = weight, queue
        return F.linear(_wide(x), _wide(weight))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        (dy,) = gradients
        weight = ctx.weight
        ctx.queue.put(lambda: add_weight_gradient(weight, dy=dy, x=_wide(x)), weight)
        return (dy @ _wide(weight)).to(x.dtype), None, None


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Choice(torch.nn.Module):
    """Scores -> the experts of each token: a module of its own, so that a forward hook sees and may replace it."""

    def __init__(self, spec: MoESpec) -> None:
        super().__init__()
        self.spec = spec

    def forward(self, scores: Tensor, places: TokenPlaces) -> Tensor:
        """[t, experts] -> [t, K] int64, the best first."""
        return self._eligible(scores).topk(self.spec.per_token, dim=-1).indices

    def margins(self, scores: Tensor) -> Tensor:
        """By how much each token's choice was made: [t, experts] -> [t]; scores nearer than that change it."""
        best = self._eligible(scores).topk(min(self.spec.per_token + 1, self.spec.experts), dim=-1).values
        margin = best[:, self.spec.per_token - 1] - best[:, -1]
        if self.spec.groups_per_token < self.spec.groups:
            found = self._group_scores(scores).topk(self.spec.groups_per_token + 1, dim=-1).values
            margin = torch.minimum(margin, found[:, -2] - found[:, -1])
        return margin

    def _group_scores(self, scores: Tensor) -> Tensor:
        """[t, experts] -> [t, groups]."""
        best = 1 if self.spec.group_score == "max" else 2
        size = self.spec.experts // self.spec.groups
        return scores.view(-1, self.spec.groups, size).topk(best, dim=-1).values.sum(-1)

    def _eligible(self, scores: Tensor) -> Tensor:
        """Scores, -inf outside of a token's groups."""
        if self.spec.groups_per_token == self.spec.groups:
            return scores
        groups = self._group_scores(scores).topk(self.spec.groups_per_token, dim=-1).indices
        is_kept = torch.zeros_like(scores[:, : self.spec.groups], dtype=torch.bool).scatter_(1, groups, True)
        size = self.spec.experts // self.spec.groups
        return scores.masked_fill(~is_kept.repeat_interleave(size, dim=-1), -math.inf)


class Router(Tallied):
    """x [t, hidden] of this rank's tokens -> where each goes.

    Args:
        row: number of the layer among those with experts.

    Attributes:
        bias: [experts] float32, added to the scores for the choice alone; moved at the end of each step.
        load: [experts] float64, how often each was chosen in the step before (1: as often as the mean).
    """

    bias: Tensor | None
    load: Tensor | None

    def __init__(self, scope: Scope, hidden: int, spec: MoESpec, *, row: int, init_std: float) -> None:
        super().__init__()
        self._spec = spec
        self._mesh = scope.mesh
        self._queue = scope.queue
        self._name = scope.name
        device = scope.mesh.device
        self.row = row
        self.weight = scope.parameter(
            "weight",
            ShardSpec((spec.experts, hidden), init=Init("normal", init_std), partial=("tp",), role="router"),
        )
        self.choice = Choice(spec)
        self.tally = torch.zeros(spec.num_columns, dtype=torch.float64, device=device)
        has_bias, has_load = spec.balance == "bias", spec.balance == "global"
        self.bias = torch.zeros(spec.experts, device=device) if has_bias else None
        self.load = torch.ones(spec.experts, dtype=torch.float64, device=device) if has_load else None

    def forward(self, x: Tensor, places: TokenPlaces) -> Routing:
        spec = self._spec
        logits: Tensor = _Logits.apply(x, self.weight, self._queue)  # type: ignore[no-untyped-call]
        scores = logits.softmax(-1) if spec.scores == "softmax" else logits.sigmoid()  # [t, experts]
        with torch.no_grad():
            experts = self.choice(scores if self.bias is None else scores + self.bias, places)
        gates = scores.gather(1, experts)  # [t, K]
        if spec.renormalises:
            gates = gates / (gates.sum(-1, keepdim=True) + 1e-20)
        kept, dropped = experts, None
        if spec.capacity is not None:
            dropped = self._dropped(experts, gates, places)
            kept = experts.masked_fill(dropped, spec.experts)
            gates = gates.masked_fill(dropped, 0.0)
        return Routing(
            kept,
            self._counted(gates * spec.scaling, experts, dropped),
            dropped is None,
            self._balance_loss(scores, experts, places) if spec.has_balance_loss else None,
            logits.logsumexp(-1).square().sum() if spec.z_weight > 0 else None,
        )

    def _counted(self, gates: Tensor, experts: Tensor, dropped: Tensor | None) -> Tensor:
        """The gates, counted in the tally when their gradient comes."""
        columns = experts.flatten()
        weights = torch.ones(columns.shape, dtype=torch.float64, device=columns.device)
        if dropped is not None:
            columns = torch.cat((columns, torch.full_like(columns, self._spec.experts)))
            weights = torch.cat((weights, dropped.flatten().double()))
        return count_once(gates, self.tally, columns=columns, weights=weights)

    def _balance_loss(self, scores: Tensor, experts: Tensor, places: TokenPlaces) -> Tensor:
        """Sum over tokens of sum_i f_i s_i with scores that sum to 1 (DeepSeek-V3 2024, eqs. 17-20).

        With a bias, f counts the experts that a token would have chosen without it and without groups.
        """
        spec = self._spec
        shares = scores if spec.scores == "softmax" else scores / scores.sum(-1, keepdim=True)
        if self.load is not None:
            return (shares * self.load.to(scores.dtype)).sum()
        with torch.no_grad():
            if spec.balance == "bias":
                experts = scores.topk(spec.per_token, dim=-1).indices
            columns = (places.rows[:, None] * spec.experts + experts).flatten()
            counts = torch.zeros(places.num_rows * spec.experts, dtype=torch.float64, device=scores.device)
            counts.scatter_add_(0, columns, torch.ones_like(columns, dtype=torch.float64))
            for axis in ("tp", "cp"):
                all_reduce_(counts, self._mesh.group(axis))
            unit = spec.per_token * places.sequence_length / spec.experts  # choices of the mean expert
            frequency = (counts / unit).view(places.num_rows, spec.experts)[places.rows]
        return (shares * frequency.to(scores.dtype)).sum()

    @torch.no_grad()
    def _dropped(self, experts: Tensor, gates: Tensor, places: TokenPlaces) -> Tensor:
        """[t, K] bool: choices for which the expert has no room in the sequence; small gates go, then late tokens.

        Every rank that has a part of the sequence ranks all of its choices alike. Gates are compared in steps of
        2^-12: a token that is repeated from the start of a sequence makes gates that are equal but for rounding, and
        rounding may not decide.
        """
        spec = self._spec
        limit = math.ceil(spec.capacity * spec.per_token * places.sequence_length / spec.experts)  # type: ignore[operator]
        group = places.rows[:, None] * spec.experts + experts  # one a sequence and expert
        columns = places.columns[:, None].expand_as(experts)
        steps = (gates * GATE_STEPS).round()
        mine = torch.stack([part.double() for part in (group, steps, columns)], dim=-1).flatten(0, 1)
        share = places.shares.size * spec.per_token
        found = fill_up(mine, share, value=-1)  # [choices, 3]; rows that fill up are a group of their own
        start = 0
        for axis in ("tp", "cp"):
            start += self._mesh.group(axis).rank * found.shape[0]
            found = start_gather_sequence(found, self._mesh.group(axis)).wait()
        order = found[:, 2].argsort(stable=True)
        order = order[found[order, 1].argsort(stable=True, descending=True)]
        order = order[found[order, 0].argsort(stable=True)]
        ordered = found[order, 0].contiguous()
        place = torch.arange(len(order), device=order.device) - torch.searchsorted(ordered, ordered)
        is_over = torch.empty_like(order, dtype=torch.bool)
        is_over[order] = place >= limit
        return is_over[start : start + mine.shape[0]].view_as(experts)

    def settle(self, totals: Tensor, *, is_valid: Tensor) -> None:
        """Move the bias towards experts that were chosen less than the mean; keep the load."""
        counts = totals[: self._spec.experts]
        if self.bias is not None:
            step = self._spec.bias_rate * (counts.sum() - counts * self._spec.experts).sign()
            self.bias += torch.where(is_valid, step, 0.0).to(self.bias.dtype)
        if self.load is not None:
            self.load.copy_(torch.where(is_valid, counts / counts.mean(), self.load))

    def kept(self) -> tuple[Piece, ...]:
        states = (("model", "bias", self.bias), ("router", "load", self.load))
        shape = (self._spec.experts,)
        return tuple(
            Piece(f"{kind}/{self._name}.{name}", shape, Box.whole(shape), tensor)
            for kind, name, tensor in states
            if tensor is not None
        )
