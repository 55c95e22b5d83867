"""`parallel/bootstrap.py`: ranks that meet, by environment alone, and what is said when they do not.

Every process here is forked and knows nothing but its environment. Real launchers: tests/train/test_launchers.py.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from types import ModuleType, SimpleNamespace

import pytest
import torch

from megads.errors import ConfigError, MegadsError
from megads.parallel.bootstrap import connect, device_of, disconnect
from megads.parallel.place import SLURM_PORTS, Launcher, Place, discover

CPU = torch.device("cpu")


def _child(environment: Mapping[str, str], out: Connection) -> None:
    os.environ.update(environment, GLOO_SOCKET_IFNAME="lo")
    try:
        place = discover()
        control = connect(place, timeout=20, device=CPU)
        out.send((place.launcher.value, control.all_gather(place.rank)))
        disconnect()
    except MegadsError as error:
        out.send((type(error).__name__, str(error)))
    os._exit(0)


def meet(environments: Sequence[Mapping[str, str]]) -> list[tuple[str, object]]:
    """What each rank got: its launcher and everybody's rank, or an error's name and text."""
    context = multiprocessing.get_context("fork")
    readers, processes = [], []
    for environment in environments:
        reader, writer = context.Pipe(duplex=False)
        processes.append(context.Process(target=_child, args=(environment, writer)))
        processes[-1].start()
        readers.append(reader)
    try:
        assert all(reader.poll(40) for reader in readers)
        return [reader.recv() for reader in readers]
    finally:
        for process in processes:
            process.kill()
            process.join()


def slurm(rank: int, **others: str) -> dict[str, str]:
    """A rank of two that srun started on this machine; the job's number picks a port that is free."""
    for number in range(os.getpid(), os.getpid() + 100):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", SLURM_PORTS[number % len(SLURM_PORTS)])):
                break
    return {
        "SLURM_PROCID": str(rank),
        "SLURM_NTASKS": "2",
        "SLURM_LOCALID": str(rank),
        "SLURM_JOB_ID": str(number),
        "SLURM_JOB_NODELIST": "localhost",
        **others,
    }


def test_slurms_ranks_meet_at_the_first_host() -> None:
    assert meet([slurm(0), slurm(1)]) == [("SLURM", [0, 1])] * 2


def test_torchs_ranks_meet_at_the_master_and_a_port_in_use_is_named() -> None:
    with socket.socket() as used:
        used.bind(("127.0.0.1", 0))
        port = str(used.getsockname()[1])
        used.listen()
        environment = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        ((kind, told),) = meet([environment])
    assert kind == "RankError"
    assert f"the ranks did not meet at 127.0.0.1:{port}" in str(told)
    assert meet([environment, environment | {"RANK": "1"}]) == [("torchrun", [0, 1])] * 2


def test_a_slurm_port_in_use_is_named() -> None:
    environment = slurm(0)
    port = discover(environment).endpoint.port  # type: ignore[union-attr]
    with socket.socket() as used:
        used.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        used.bind(("", port))
        used.listen()
        ((kind, told),) = meet([environment])
    assert (kind, str(port) in str(told)) == ("RankError", True)


MPI_PLACE = Place(1, 2, 1, 2, Launcher.MPICH)


def test_mpi4py_without_an_mpi_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(ModuleType):
        def __getattr__(self, name: str) -> object:
            raise RuntimeError("cannot load MPI library\nlibmpi.so.12: no such file")

    monkeypatch.delitem(sys.modules, "mpi4py.MPI", raising=False)
    for module in (Broken("mpi4py"), None):  # installed without an MPI; not installed
        monkeypatch.setitem(sys.modules, "mpi4py", module)
        with pytest.raises(ConfigError, match="MPICH's mpiexec, but mpi4py does not load") as error:
            connect(MPI_PLACE, timeout=1, device=CPU)
        assert "MASTER_ADDR" in str(error.value)


def test_mpi4py_of_another_mpi_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("mpi4py")
    module.MPI = SimpleNamespace(  # type: ignore[attr-defined]
        COMM_WORLD=SimpleNamespace(rank=0, size=1), Get_library_version=lambda: "Open MPI v5, package"
    )
    monkeypatch.setitem(sys.modules, "mpi4py", module)
    with pytest.raises(ConfigError, match="another MPI") as error:
        connect(MPI_PLACE, timeout=1, device=CPU)
    assert "rank 0 of 1 with Open MPI v5; MPICH said 1 of 2" in str(error.value)


def test_a_world_of_one_joins_nobody() -> None:
    control = connect(discover({}), timeout=1, device=CPU)
    assert (control.rank, control.size) == (0, 1)
    assert not torch.distributed.is_initialized()


def test_more_ranks_than_gpus_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert device_of(Place(9, 16, 1, 8)) == torch.device("cuda", 1)
    with pytest.raises(ConfigError, match="fewer GPUs") as error:
        device_of(Place(10, 16, 2, 8))
    assert "local rank 2, 2 GPUs" in str(error.value)
