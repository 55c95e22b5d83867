"""The experts of a layer: SwiGLU MLPs in stacked weights, dealt over "ep", each cut over "etp".

    gate_up [E, 2 ffn, h]    down [E, h, ffn]        E over ep; both parts of 2 ffn, and ffn, over etp

The ranks of one etp group first show each other their tokens, go with them to the ranks of the experts (each to its
own counterpart), and sum what their parts of an expert made:

    t tokens --all-gather--> etp x t --dispatch, experts, collect--> etp x t partial sums --reduce-scatter--> t
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megads.layers.dispatch import Dispatch
from megads.layers.recompute import Origin
from megads.layers.router import MoESpec, Routing
from megads.ops.activation import swiglu
from megads.ops.grouped import GROUPED
from megads.parallel.collectives import scatter_sum, start_gather_sequence
from megads.parallel.parameter import Scope
from megads.parallel.shard import Cut, Init, ShardSpec
from megads.parallel.tokens import Shares, fill_up, gather_rows
from megads.parallel.weight_queue import WeightQueue, gradient_of


class _GroupedLinear(torch.autograd.Function):
    """The weight is kept as an attribute: under recompute a saved tensor comes back as another object."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, counts: Tensor, queue: WeightQueue, origin: Origin | None
    ) -> Tensor:
        ctx.save_for_backward(x if origin is None else origin.source.detach(), counts)
        ctx.function = None if origin is None else origin.function
        ctx.weight, ctx.queue, ctx.way = weight, queue, GROUPED.pick(x, weight, counts)
        y: Tensor = ctx.way.run(x, weight, counts)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        kept, counts = ctx.saved_tensors
        weight, function, way, dy = ctx.weight, ctx.function, ctx.way, gradients[0].contiguous()
        with torch.no_grad():
            dx = way.run(dy, weight.mT, counts)

            def weight_gradient() -> None:
                x = kept if function is None else function(kept)
                way.backward(gradient_of(weight), dy, x, counts)

            ctx.queue.put(weight_gradient, weight)
            return dx, None, None, None, None


class Experts(torch.nn.Module):
    """Tokens [t, hidden] and where they go -> the sums of what their experts make of them, [t, hidden].

    Args:
        init_std, output_std: deviation of the initial input and output weights.
        keeps_activation: whether the activation's output is kept for the backward, or made again.
    """

    def __init__(
        self,
        scope: Scope,
        hidden: int,
        spec: MoESpec,
        *,
        init_std: float,
        output_std: float,
        keeps_activation: bool = True,
    ) -> None:
        super().__init__()
        self._keeps_activation = keeps_activation
        self._num_experts = spec.experts
        self._ep, self._etp = scope.mesh.group("ep"), scope.mesh.group("etp")
        self._queue = scope.queue
        self.gate_up = scope.child("gate_up").parameter(
            "weight",
            ShardSpec(
                (spec.experts, 2 * spec.ffn, hidden),
                (Cut(0, "ep"), Cut(1, "etp", (spec.ffn, spec.ffn))),
                Init("normal", init_std),
            ),
        )
        self.down = scope.child("down").parameter(
            "weight",
            ShardSpec(
                (spec.experts, hidden, spec.ffn),
                (Cut(0, "ep"), Cut(2, "etp")),
                Init("normal", output_std),
            ),
        )

    def forward(self, x: Tensor, routing: Routing, *, shares: Shares) -> Tensor:
        """`shares` says how many tokens each rank has."""
        if self._etp.size == 1:
            return self._apply_experts(x, routing.experts, routing.gates, is_whole=routing.is_whole)
        x, gates = (gather_rows(fill_up(rows, shares.size), self._etp) for rows in (x, routing.gates))
        mine = fill_up(routing.experts, shares.size, value=self._num_experts)
        experts = start_gather_sequence(mine, self._etp).wait()
        partial = self._apply_experts(
            x, experts, gates, is_whole=routing.is_whole and shares.is_even
        )  # of this rank's part of each expert
        return scatter_sum(partial, self._etp)[: routing.experts.shape[0]]

    def _apply_experts(self, x: Tensor, experts: Tensor, gates: Tensor, *, is_whole: bool) -> Tensor:
        plan = Dispatch.plan(experts, self._ep, num_experts=self._num_experts, is_whole=is_whole)
        rows = plan.send(x)
        inner = self._product(rows, self.gate_up, plan.counts)
        origin = None if self._keeps_activation else Origin(swiglu, inner)
        return plan.collect(self._product(swiglu(inner), self.down, plan.counts, origin), gates=gates)

    def _product(self, rows: Tensor, weight: Tensor, counts: Tensor, origin: Origin | None = None) -> Tensor:
        return _GroupedLinear.apply(rows, weight, counts, self._queue, origin)  # type: ignore[no-untyped-call,no-any-return]
