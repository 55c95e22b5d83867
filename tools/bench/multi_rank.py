"""One rank of a multi-GPU benchmark: builds a config, times its training step, says where the time goes.

Started by `multi_gpu.py` under torchrun with the case as JSON; rank 0 prints one line of JSON. Not for hand use.

    step            slowest rank's median of some steps
    communication   device time of collectives and transfers, and the part of it when nothing else ran (exposed)
    idle            device time when nothing ran at all: pipeline bubble, waiting for the host
    predicted       `pipeline/simulate` on this run's own F, B, I, W of each stage, measured alone, + the optimizer
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from megads.assemble import rules
from megads.assemble.schedule import schedule_of
from megads.assemble.step import train_step
from megads.assemble.wiring import Model, build_engine, build_executors, build_model, layout_of, rows_of
from megads.config.load import load_text
from megads.config.root import Config
from megads.data.sequence import Batch
from megads.parallel.bootstrap import connect, device_of, disconnect
from megads.parallel.control import Control
from megads.parallel.mesh import Mesh, build_mesh
from megads.parallel.place import discover
from megads.pipeline.simulate import simulate, split_costs
from megads.pipeline.stage import Payload, Stage
from megads.train.metrics import peak_memory
from tools.bench.measure import seconds_of, synchronize

RESULT = "CASE "


@dataclass(frozen=True, slots=True)
class Measured:
    """What one case took; seconds of a step, bytes of each rank."""

    seconds: float
    spread: float
    tokens: int
    flops_per_token: float
    peak_bytes: tuple[int, ...]
    communication: float | None
    exposed: float | None
    idle: float | None
    predicted: float | None
    loss: float


def rows(config: Config, mesh: Mesh, *, vocab: int) -> Iterator[Batch]:
    """This data-parallel rank's rows of random tokens, another batch each time."""
    number, seq = rows_of(config, mesh), config.data.sequence_length
    dp_rank = mesh.group("dp").rank
    generator = torch.Generator(mesh.device).manual_seed(1 + dp_rank)
    step = 0
    while True:
        step += 1
        drawn = torch.randint(vocab, (number, seq + 1), generator=generator, device=mesh.device)
        yield Batch(
            tokens=drawn[:, :-1].contiguous(),
            labels=drawn[:, 1:].contiguous(),
            mask=torch.ones(number, seq, dtype=torch.bool, device=mesh.device),
            positions=torch.arange(seq, device=mesh.device).expand(number, -1),
            document_ids=None,
            samples=dp_rank * number + torch.arange(number, device=mesh.device),
            step=step,
        )


@dataclass(frozen=True, slots=True)
class Shares:
    """Seconds of a step in which the device communicated, only communicated, and did nothing."""

    communication: float
    exposed: float
    idle: float


def profile(step: Callable[[], object], device: torch.device) -> Shares:
    """Split one step's device time by what ran."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as trace:
        step()
        synchronize(device)
    spans: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for event in trace.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            is_communication = "nccl" in event.name.lower()
            spans[is_communication].append((event.time_range.start, event.time_range.end))
    communication, compute = _length(spans[True]), _length(spans[False])
    either = _length([*spans[True], *spans[False]])
    every = [*spans[True], *spans[False]]
    whole = max(stop for _, stop in every) - min(start for start, _ in every)
    return Shares(communication / 1e6, (either - compute) / 1e6, (whole - either) / 1e6)


def _length(spans: Sequence[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted(spans):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


def stage_seconds(model: Model, config: Config, *, batch: Batch, mesh: Mesh) -> dict[int, tuple[float, ...]]:
    """(F, I, W) of each of this rank's stages for one micro-batch, with nobody else's work in between."""
    micro, seq = config.batch.micro, batch.tokens.shape[1]
    part = batch.rows(0, micro)
    cut = mesh.group("tp").size if config.parallel.sequence else 1
    shape = (seq // cut, micro, model.spec.hidden)
    last = mesh.layout.num_stages - 1

    def random() -> Tensor:
        return torch.randn(shape, device=mesh.device).to(model.dtype)

    return {
        number: _times(
            Stage(number, list(blocks), queue=model.queue),
            part,
            inputs=() if number == 0 else (random(),),
            flows=() if number == last else (random(),),
        )
        for number, blocks in sorted(model.stages.items())
    }


def _times(stage: Stage, batch: Batch, *, inputs: Payload, flows: Payload) -> tuple[float, ...]:
    """Median seconds of F, I, W of one stage."""
    device = batch.tokens.device
    seeds: defaultdict[str, Tensor] = defaultdict(lambda: torch.full((), 1e-6, device=device))
    calls: tuple[Callable[[], object], ...] = (
        lambda: stage.forward(tuple(t.detach() for t in inputs), batch, micro_batch=0),
        lambda: stage.backward_input(flows, seeds, micro_batch=0),
        lambda: stage.backward_weight(micro_batch=0),
    )
    times = [[seconds_of(call, device, repeats=1)[0] for call in calls] for _ in range(6)]
    return tuple(statistics.median(column) for column in zip(*times[2:], strict=True))


def predicted_seconds(config: Config, stages: list[dict[str, list[float]]], *, rest: float) -> float:
    """What `simulate` says of this schedule with the costs measured on the ranks, plus `rest` (the optimizer)."""
    costs = {int(number): values for found in stages for number, values in found.items()}
    forward, input_gradient, weight_gradient = zip(*(costs[n] for n in sorted(costs)), strict=True)
    replicas = math.prod((config.parallel.tensor, config.parallel.pipeline, config.parallel.context))
    rows_a_replica = config.batch.global_size * replicas // len(stages)
    schedule = schedule_of(config.parallel, num_micro_batches=rows_a_replica // config.batch.micro)
    timing = split_costs(forward, input_gradient=input_gradient, weight_gradient=weight_gradient)
    return simulate(schedule, timing).makespan + rest


def measure(config: Config, control: Control, *, device: torch.device, repeats: int) -> Measured | None:
    """Build, warm up, time, profile and predict; the result on rank 0."""
    vocab = config.model.vocab or 0
    mesh = build_mesh(layout_of(config, control.size), control.rank, device=device)
    model = build_model(config, mesh, vocab=vocab)
    engine = build_engine(config, model, mesh=mesh)
    executor = build_executors(config, model, mesh=mesh).train
    source = rows(config, mesh, vocab=vocab)
    model.train()

    def step() -> Tensor:
        return train_step(next(source), executor=executor, engine=engine, mesh=mesh, lr=1e-4).loss

    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    for _ in range(3):
        loss = step().item()
    control.barrier()
    times = seconds_of(step, device, repeats=repeats)
    peak = peak_memory(device)
    shares = profile(step, device) if device.type == "cuda" else None
    optimizer = statistics.median(seconds_of(lambda: engine.step(lr=1e-4), device, repeats=3))
    stages: dict[int, tuple[float, ...]] = {}
    if mesh.layout.pipeline > 1 and mesh.layout.context == 1:
        stages = stage_seconds(model, config, batch=next(source), mesh=mesh)
    tokens = config.batch.global_size * config.data.sequence_length
    mine = {
        "seconds": statistics.median(times),
        "spread": (max(times) - min(times)) / statistics.median(times),
        "peak": peak,
        "shares": None if shares is None else asdict(shares),
        "stages": stages,
        "optimizer": optimizer,
    }
    found = control.gather(mine)
    if found is None:
        return None
    slowest = max(found, key=lambda rank: rank["seconds"])
    waiting = max(found, key=lambda rank: rank["shares"]["exposed"])["shares"] if shares else None
    rest = max(rank["optimizer"] for rank in found)
    return Measured(
        seconds=slowest["seconds"],
        spread=slowest["spread"],
        tokens=tokens,
        flops_per_token=model.spec.flops_per_token(config.data.sequence_length),
        peak_bytes=tuple(rank["peak"] for rank in found),
        communication=waiting and waiting["communication"],
        exposed=waiting and waiting["exposed"],
        idle=waiting and waiting["idle"],
        predicted=predicted_seconds(config, [r["stages"] for r in found], rest=rest) if stages else None,
        loss=loss,
    )


def main() -> None:
    """Run one case and print one line of JSON from rank 0."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", help="YAML text of the case")
    parser.add_argument("--repeats", type=int, default=8)
    options = parser.parse_args()
    config = load_text(options.config, source="the case")
    place = discover()
    rules.check(config, place.world_size)
    device = device_of(place)
    control = connect(place, timeout=90, device=device)
    found = measure(config, control, device=device, repeats=options.repeats)
    if found is not None:
        print(RESULT + json.dumps(asdict(found)), flush=True)
    disconnect()


if __name__ == "__main__":
    main()
