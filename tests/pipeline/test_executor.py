"""The loop on one rank: overlapped pairs alternate block by block, outputs are freed, extras are added up."""

from __future__ import annotations

from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from megads.data.sequence import Batch
from megads.parallel.mesh import Group
from megads.parallel.weight_queue import WeightQueue
from megads.pipeline.executor import Executor
from megads.pipeline.lower import lower
from megads.pipeline.stage import BlockOutput, Extra, Payload, Stage
from megads.pipeline.text import parse_schedule
from megads.pipeline.transport import TensorSpec, Transport

SCHEDULE = """\
schedule pairs
micro_batches 2
placement 0 0
max_live 3
rank 0: 0F0 1F0 0F1 1B0 (1F1+0B0) 1I1 1W1 0B1
"""


class _Told(torch.autograd.Function):
    """Doubles; tells of its backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, block: Block, row: int) -> torch.Tensor:
        ctx.block, ctx.row = block, row
        return 2 * x

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        ctx.block.log.append(f"{ctx.block.name}B{ctx.row}")
        return 2 * gradients[0], None, None


class Block(torch.nn.Module):
    """x -> 2 x; the first makes x of its weight, the last has an extra."""

    def __init__(self, name: str, log: list[str]) -> None:
        super().__init__()
        self.name, self.log = name, log
        self.weight = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))
        self.outputs: list[StorageWeakRef] = []

    def forward(self, payload: Payload, batch: Batch) -> BlockOutput:
        row = int(batch.samples[0])
        self.log.append(f"{self.name}F{row}")
        y = _Told.apply(payload[0] if payload else self.weight * (1.0 + row), self, row)
        self.outputs.append(StorageWeakRef(y.untyped_storage()))
        if self.name == "d":
            return BlockOutput((), (Extra("loss", y.sum(), torch.tensor(1)),))
        return BlockOutput((y,))


def make_batch() -> Batch:
    tokens = torch.zeros(2, 2, dtype=torch.int64)
    return Batch(
        tokens=tokens,
        labels=tokens,
        mask=tokens.bool(),
        positions=tokens,
        document_ids=None,
        samples=torch.arange(2),
        step=1,
    )


def test_a_pair_alternates_block_by_block() -> None:
    log: list[str] = []
    blocks = [Block(name, log) for name in "abcd"]
    queue = WeightQueue()
    stages = {n: Stage(n, blocks[2 * n : 2 * n + 2], queue=queue, in_steps=True) for n in range(2)}
    device = torch.device("cpu")
    executor = Executor(
        lower(parse_schedule(SCHEDULE)),
        0,
        stages=stages,
        transport=Transport(Group((0,), 0), device),
        payload=lambda rows, seq: (TensorSpec((2,), torch.float64),),
        terms=(),
    )
    totals = executor.run(make_batch(), seeds={"loss": torch.tensor(0.5, dtype=torch.float64)})
    assert log == [
        *("aF0", "bF0", "cF0", "dF0", "aF1", "bF1", "dB0", "cB0"),
        *("cF1", "bB0", "dF1", "aB0"),  # the pair
        *("dB1", "cB1", "bB1", "aB1"),
    ]
    assert executor.peak_live == 3
    assert totals["loss"].sum.item() == 2 * 16 * (1.0 + 2.0)
    assert totals["loss"].count.item() == 2
    assert blocks[0].weight.grad is not None
    assert blocks[0].weight.grad.tolist() == [0.5 * 16 * (1.0 + 2.0)] * 2


def test_an_output_is_freed_when_it_was_taken() -> None:
    """Doubling saves nothing: after a forward, with the payload dropped, no output is alive; the graph's edge is."""
    blocks = [Block(name, []) for name in "ab"]
    stage = Stage(0, blocks, queue=WeightQueue())
    output = stage.forward((), make_batch(), micro_batch=0)
    assert blocks[0].outputs[0].expired()
    assert not blocks[1].outputs[0].expired()
    del output
    assert blocks[1].outputs[0].expired()
    stage.backward((torch.ones(2, dtype=torch.float64),), {}, micro_batch=0)
    assert blocks[0].weight.grad is not None
    assert blocks[0].weight.grad.tolist() == [4.0, 4.0]
