"""From a place to a connected rank: which device is mine, whom can I talk to.

    torchrun, megads launch, deepspeed   the launcher's store, by torch's own MASTER_ADDR and MASTER_PORT
    SLURM                                rank 0's store at the first host of the job, a port by the job's number
    MPI                                  rank 0's store at a free port, told to the others by MPI_Bcast
    forked processes of one host         a file (`connect_local`; `verify/ranks.py` forks them)

The launcher's variables are read in `place.py`. A world of one needs no torch.distributed at all.
"""

from __future__ import annotations

import socket
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore, Store, TCPStore

from megads.errors import ConfigError, RankError
from megads.parallel.control import Control
from megads.parallel.place import Launcher, Place, check_host

ENDPOINT_SIZE = 300  # bytes of a host name and a port


def device_of(place: Place) -> torch.device:
    """The GPU with this process' local rank where there are GPUs, else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if place.local_rank >= torch.cuda.device_count():
        raise ConfigError(
            "this host has fewer GPUs than processes",
            found=f"local rank {place.local_rank}, {torch.cuda.device_count()} GPUs",
            do="start as many processes a host as it has GPUs, each of which sees all of them (SLURM: "
            "--gpus-per-node, not --gpus-per-task)",
        )
    return torch.device("cuda", place.local_rank)


def connect(place: Place, *, timeout: float, device: torch.device) -> Control:
    """Join the other processes; returns the control channel. A world of one joins nobody.

    Args:
        timeout: seconds after which a collective that somebody did not join fails.

    Raises:
        ConfigError: started by mpiexec, but mpi4py has no MPI or another one.
        RankError: the ranks did not find each other.
    """
    if place.world_size == 1:
        return Control(0, 1)
    limit = timedelta(seconds=timeout)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=_open_store(place, limit),
            rank=place.rank,
            world_size=place.world_size,
            timeout=limit,
        )
    except dist.DistError as error:
        where = "" if place.endpoint is None else f" at {place.endpoint.host}:{place.endpoint.port}"
        raise RankError(
            f"the ranks did not meet{where}",
            found=error,
            do="check that rank 0 runs, and that the port is free there and open to the other hosts",
        ) from error
    return Control(place.rank, place.world_size, dist.new_group(backend="gloo", timeout=limit))


def connect_local(rank: int, size: int, *, directory: Path, timeout: float) -> Control:
    """Join the other processes of this host on the CPU, through a file: no launcher, no port that may be taken.

    Args:
        directory: new and the same for all; the file is made in it.
        timeout: seconds after which a collective that somebody did not join fails.
    """
    if size == 1:
        return Control(0, 1)
    limit = timedelta(seconds=timeout)
    store = FileStore(str(directory / "store"), size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)
    return Control(rank, size, dist.group.WORLD)


def disconnect() -> None:
    """Leave the other processes; harmless in a world of one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _open_store(place: Place, limit: timedelta) -> Store | None:
    """The store that rank 0 opens and the others join; None if the launcher has one, which torch finds."""
    if place.launcher is Launcher.TORCH:
        return None
    if place.endpoint is None:
        return _open_store_by_mpi(place, limit)
    return _tcp_store(place.endpoint.host, place.endpoint.port, place=place, limit=limit)


def _tcp_store(host: str, port: int, *, place: Place, limit: timedelta) -> TCPStore:
    """Rank 0 opens it (port 0: at a free port), the others join."""
    return TCPStore(host, port, place.world_size, place.rank == 0, limit, wait_for_workers=False)


def _open_store_by_mpi(place: Place, limit: timedelta) -> Store:
    """Rank 0 opens a store at a port that is free, and MPI tells the others where."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # mpi4py installs, and fails to import, without an MPI
        raise ConfigError(
            f"started by {place.launcher.value}'s mpiexec, but mpi4py does not load",
            found=str(error).splitlines()[0],
            do="pip install mpi4py beside the MPI of mpiexec, or set MASTER_ADDR and MASTER_PORT",
        ) from error
    world = MPI.COMM_WORLD
    if (world.rank, world.size) != (place.rank, place.world_size):
        raise ConfigError(
            "mpi4py speaks to another MPI than the one that started this process",
            found=f"rank {world.rank} of {world.size} with {MPI.Get_library_version().split(',')[0]}; "
            f"{place.launcher.value} said {place.rank} of {place.world_size}",
            do="use the mpiexec of mpi4py's MPI, or set MASTER_ADDR and MASTER_PORT",
        )
    told = bytearray(ENDPOINT_SIZE)  # a buffer: MPI's bcast of objects would pickle them
    store = None
    if place.rank == 0:
        host = "127.0.0.1" if place.local_size == place.world_size else socket.gethostname()
        check_host(host, what="this host's name")
        store = _tcp_store(host, 0, place=place, limit=limit)
        told = bytearray(f"{host} {store.port}".encode().ljust(ENDPOINT_SIZE))
    world.Bcast(told, root=0)
    host, port = told.decode().split()
    return store or _tcp_store(host, int(port), place=place, limit=limit)
