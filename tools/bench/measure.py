"""How benchmarks measure: device times, the ceilings of this machine in this run, and the table they end with."""

from __future__ import annotations

import datetime
import itertools
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

FLUSH_BYTES = 256 << 20  # several times the L2 cache of any GPU


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What the machine gave in this run: matrix products in TFLOP/s, copies in GB/s (read and written)."""

    matmul_tflops: tuple[float, ...]
    copy_gbps: float

    def __str__(self) -> str:
        low, high = min(self.matmul_tflops), max(self.matmul_tflops)
        return f"matmul {low:.1f}-{high:.1f} TFLOP/s, copy {self.copy_gbps:.0f} GB/s"


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(function: Callable[[], object], device: torch.device, *, repeats: int) -> tuple[float, ...]:
    """Device time of each of `repeats` calls in a row, nothing in between; the host does not wait."""
    if device.type != "cuda":
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            function()
            times.append(time.perf_counter() - start)
        return tuple(times)
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    marks[0].record()
    for mark in marks[1:]:
        function()
        mark.record()
    torch.cuda.synchronize(device)
    return tuple(a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(marks))


def cold_seconds(function: Callable[[], object], device: torch.device, *, repeats: int = 30) -> float:
    """Median device time of a call whose inputs are in no cache: a CUDA graph, replayed after the L2 was flushed.

    Args:
        function: launches work on fixed memory; captured once, after three warm-up calls.
    """
    if device.type != "cuda":
        function()
        return statistics.median(seconds_of(function, device, repeats=repeats))
    graph = capture(function)
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)
    times = []
    for _ in range(repeats):
        flush.zero_()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        times.append((start, stop))
    torch.cuda.synchronize(device)
    return statistics.median(start.elapsed_time(stop) / 1e3 for start, stop in times)


def capture(function: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """The work that `function` launches, as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph


def matmul_tflops(
    device: torch.device, *, dtype: torch.dtype = torch.bfloat16, size: int = 8192, seconds: float = 0.7
) -> tuple[float, ...]:
    """Rates of a size^3 matrix product on random data, over about `seconds`: they move with power and heat."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)

    def product() -> None:
        torch.mm(a, b, out=out)

    once = min(seconds_of(product, device, repeats=3))
    times = seconds_of(product, device, repeats=max(3, round(seconds / once)))
    return tuple(2 * size**3 / t / 1e12 for t in times)


def copy_gbps(device: torch.device, *, num_bytes: int) -> float:
    """Rate of a large copy on the device, bytes read plus bytes written."""
    source: Tensor = torch.randint(256, (num_bytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = min(seconds_of(lambda: target.copy_(source), device, repeats=20))
    return 2 * num_bytes / best / 1e9


def ceilings(device: torch.device, *, tiny: bool = False) -> Ceilings:
    """Measure both."""
    size, seconds, num_bytes = (256, 0.05, 1 << 22) if tiny else (8192, 0.7, 2 << 30)
    dtype = torch.float32 if tiny else torch.bfloat16
    return Ceilings(
        matmul_tflops(device, dtype=dtype, size=size, seconds=seconds), copy_gbps(device, num_bytes=num_bytes)
    )


def device_name(device: torch.device) -> str:
    """Name of the card or the processor."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU {platform.machine()}"


def print_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], *, device: torch.device, notes: Sequence[str] = ()
) -> None:
    """What was run where and when, then the rows; the last thing a benchmark prints."""
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    module = sys.argv[0].rpartition("/")[2].removesuffix(".py")
    print(f"\ncommand: {shlex.join(['python', '-m', f'tools.bench.{module}', *sys.argv[1:]])}")
    print(f"device:  {device_name(device)}, torch {torch.__version__}, {datetime.date.today().isoformat()}")
    for note in notes:
        print(note)
    for line in lines:
        cells = (
            cell.ljust(w) if i < 2 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        print("  ".join(cells).rstrip())
    sys.stdout.flush()
