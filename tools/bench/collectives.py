"""Bus bandwidth of the collectives over the ranks of one job, by size.

Started by `multi_gpu.py`, or by hand:   torchrun --standalone --nproc_per_node N -m tools.bench.collectives

Bus bandwidth is what NCCL's own tests print: bytes that each link must carry over seconds, so that figures of
different operations and group sizes compare with the link's speed. Of n ranks and a message of S bytes (the whole
buffer): all-reduce 2 (n-1)/n S, all-gather, reduce-scatter and all-to-all (n-1)/n S, send and receive S.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megads.parallel.bootstrap import connect, device_of, disconnect
from megads.parallel.place import discover
from tools.bench.measure import synchronize

MIB = tuple(4**k for k in range(6))  # 1 MiB .. 1 GiB
TINY_MIB = (0.0625, 0.25)
RESULT = "COLLECTIVES "


@dataclass(frozen=True, slots=True)
class Reading:
    """One operation at one size: median microseconds of the slowest rank, GB/s of the bus."""

    operation: str
    num_ranks: int
    mib: float
    microseconds: float
    bus_gbps: float


def operations(buffer: Tensor, *, size: int, rank: int) -> Mapping[str, tuple[Callable[[], object], float]]:
    """Operation -> (a call that runs it on `buffer`, share of the buffer's bytes that a link carries)."""
    part = buffer[: buffer.numel() // size]
    other = torch.empty_like(buffer)
    share = (size - 1) / size

    def neighbours() -> None:
        peers = ((rank + 1) % size, (rank - 1) % size)
        sent = dist.P2POp(dist.isend, buffer, peers[0])
        received = dist.P2POp(dist.irecv, other, peers[1])
        for work in dist.batch_isend_irecv([sent, received]):
            work.wait()

    return {
        "all_reduce": (lambda: dist.all_reduce(buffer), 2 * share),
        "all_gather": (lambda: dist.all_gather_into_tensor(buffer, part), share),
        "reduce_scatter": (lambda: dist.reduce_scatter_tensor(part, buffer), share),
        "all_to_all": (lambda: dist.all_to_all_single(other, buffer), share),
        "send_receive": (neighbours, 1.0),
    }


def measure(device: torch.device, *, sizes: tuple[float, ...], repeats: int) -> tuple[Reading, ...]:
    """Time every operation at every size; all ranks call it together."""
    size, rank = dist.get_world_size(), dist.get_rank()
    found = []
    for mib in sizes:
        numel = int(mib * 2**20) // 4 // size * size
        buffer = torch.zeros(numel, device=device)
        for name, (call, share) in operations(buffer, size=size, rank=rank).items():
            for _ in range(3):
                call()
            times = []
            for _ in range(repeats):
                synchronize(device)
                start = time.perf_counter()
                call()
                synchronize(device)
                times.append(time.perf_counter() - start)
            slowest = torch.tensor(statistics.median(times), device=device)
            dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
            seconds = slowest.item()
            bus = share * numel * 4 / seconds / 1e9
            found.append(Reading(name, size, mib, seconds * 1e6, bus))
    return tuple(found)


def main() -> None:
    """Measure and print one line of JSON from rank 0."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="small messages, few repeats")
    options = parser.parse_args()
    place = discover()
    device = device_of(place)
    connect(place, timeout=120, device=device)
    sizes, repeats = (TINY_MIB, 3) if options.tiny else (MIB, 12)
    found = measure(device, sizes=sizes, repeats=repeats)
    if place.rank == 0:
        print(RESULT + json.dumps([asdict(reading) for reading in found]), flush=True)
    disconnect()


if __name__ == "__main__":
    main()
