"""One rank of the layout matrix on several GPUs: every layout beside one float64 process on the CPU.

    torchrun --standalone --nproc_per_node N -m tests.gpu.multi.job       N = 2, 4, 8; without GPUs over gloo

One job runs all layouts, so communicators are made and left many times. Rank 0 prints a line a layout and precision
with the largest error of a gradient and its bound, and the job ends with 1 if one is over it. float64 over NCCL is the
sharp test (1e-12); fp32 has promise 1's bounds; bf16 may have twice the error of one process in bf16.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
import torch.distributed as dist

from megads.config.root import Config
from megads.parallel.bootstrap import connect, device_of, disconnect
from megads.parallel.control import Control
from megads.parallel.place import discover
from megads.verify.compare import BOUNDS, Bounds, Comparison, bounds_of, compare
from megads.verify.measure import record
from megads.verify.outcome import Outcome, RankResult, merge
from megads.verify.trial import with_precision
from tests.parity.harness import Case, Model, make_config

STEPS = 2
MODELS: Mapping[str, Model] = MappingProxyType(
    {
        "dense": Model("llama", layers=6, seq=16, documents=True),
        "gpt": Model("gpt", tied=True, layers=6, seq=16),
        "moe": Model(
            "llama",
            layers=6,
            seq=16,
            overrides={
                "experts": 8,
                "experts_per_token": 2,
                "expert_ffn": 24,
                "dense_layers": 1,
                "router": "sigmoid",
                "balance": "bias",
                "balance_weight": 1e-3,
            },
        ),
    }
)


def layouts(n: int) -> Iterator[tuple[str, Case]]:
    """The layouts of n ranks: each axis alone, then together."""
    for model in ("gpt", "dense"):
        yield model, Case(data=n, zero=0)
        yield model, Case(data=n, zero=1, bucket=5000)
        yield model, Case(tensor=n)
        yield model, Case(tensor=n, sequence=True, recompute="full")
    for kind in ("ring", "ulysses", "all_gather"):
        yield "dense", Case(context=n, context_kind=kind)
    if n <= 4:
        for schedule in ("gpipe", "one_f_one_b", "zero_bubble_h1", "zero_bubble_h2"):
            yield "gpt", Case(pipeline=n, schedule=schedule)
        if n == 2:
            for schedule in ("interleaved", "zbv", "dualpipe_v"):
                yield "gpt", Case(pipeline=n, schedule=schedule, chunks=2)
    yield "moe", Case(data=n, expert=n, zero=1)
    yield "moe", Case(tensor=2, data=n // 2, expert=n, expert_tensor=1, sequence=True)
    yield "dense", Case(data=n, offload=True, loss_chunk=7)
    if n >= 4:
        yield "dense", Case(tensor=2, context=2, data=n // 4, sequence=True, zero=1)
        yield "gpt", Case(tensor=2, pipeline=2, data=n // 4, schedule="zbv", chunks=2, sequence=True)
        yield "moe", Case(pipeline=2, data=n // 2, expert=2, schedule="zero_bubble_h1")
        yield "moe", Case(context=2, data=n // 2, expert=n // 2, zero=1)


def alone(config: Config) -> Config:
    """The same training in one process."""
    return replace(config, parallel=type(config.parallel)(), optim=replace(config.optim, zero_stage=0))


def outcome(
    config: Config, control: Control, group: dist.ProcessGroup, device: torch.device
) -> Outcome | None:
    """Train under the layout; rank 0 gets what came out."""
    mine = record(config, control, steps=STEPS, device=device)
    ranks: list[RankResult | None] | None = [None] * control.size if control.rank == 0 else None
    dist.gather_object(mine, ranks, group=group)
    return None if ranks is None else merge([rank for rank in ranks if rank is not None])


@dataclass(frozen=True, slots=True)
class Reference:
    """One float64 process, and the bounds of bf16 beside it."""

    outcome: Outcome
    low: Bounds

    @classmethod
    def of(cls, model: Model) -> Reference:
        """On the CPU, where there is no other rank yet."""
        config = alone(make_config(model, Case(), precision="fp64"))
        low = with_precision(config, "bf16")
        exact, rough = (merge([record(c, Control(0, 1), steps=STEPS)]) for c in (config, low))
        return cls(exact, bounds_of(compare(rough, exact, bounds=BOUNDS["fp64"])))


def is_wrong(result: Comparison) -> bool:
    """Whether more than updated weights differ: Adam turns the noise of a gradient that is zero (GPT's key bias) into
    steps of full size, which is rounding's business in any precision but float64.
    """
    return bool(
        result.missing
        or result.outcome.misplaced
        or result.outcome.disagreements
        or result.wrong_initial
        or result.wrong_losses
        or result.wrong_gradients
        or result.is_norm_wrong
    )


def main() -> int:
    """Run every layout in every precision."""
    place = discover()
    torch.set_num_threads(4)
    names = MODELS if place.rank == 0 else ()
    references = {name: Reference.of(MODELS[name]) for name in names}
    device = device_of(place)
    control = connect(place, timeout=60, device=device)
    group = dist.new_group(backend="gloo")
    failed = []
    for number, (name, case) in enumerate(layouts(place.world_size)):
        for precision in ("fp64", "fp32", "bf16"):
            if precision != "fp64" and number % 3:  # the sharp test for all, the others for every third
                continue
            start = time.perf_counter()
            config = make_config(MODELS[name], case, precision=precision)
            found = outcome(config, control, group, device)
            if found is None:
                continue
            reference = references[name]
            limit = BOUNDS.get(precision, reference.low)
            result = compare(found, reference.outcome, bounds=limit)
            is_equal = result.is_equal or (precision != "fp64" and not is_wrong(result))
            worst = max(result.rows, key=lambda row: row.gradient)
            print(
                f"{'equal' if is_equal else 'DIFFERENT':9}  {precision}  {name:5}  {case!s:50}  "
                f"{worst.gradient:.1e} of {limit.gradient:.1e}  {worst.name}  {time.perf_counter() - start:.1f} s",
                flush=True,
            )
            if not is_equal:
                failed.append(f"{precision} {name} {case}")
    disconnect()
    if failed:
        print("different:", *failed, sep="\n  ", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # NCCL's threads are not waited for
