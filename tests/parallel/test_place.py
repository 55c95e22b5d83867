"""`parallel/place.py`: every launcher's variables as a table, and everything that is wrong about them, named."""

from __future__ import annotations

import pytest

from megads.errors import ConfigError
from megads.parallel.place import SLURM_PORTS, Endpoint, Launcher, Place, check_host, discover, first_host

MASTER = {"MASTER_ADDR": "gpu01", "MASTER_PORT": "29400"}
TORCHRUN = {"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "8", **MASTER}
DEEPSPEED = {
    "RANK": "9",
    "WORLD_SIZE": "16",
    "LOCAL_RANK": "1",
    "LOCAL_SIZE": "8",
    "CROSS_RANK": "1",
    **MASTER,
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "9",
    "OMPI_COMM_WORLD_SIZE": "16",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "8",
}
MPICH = {"PMI_RANK": "9", "PMI_SIZE": "16", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "8"}
SLURM = {
    "SLURM_PROCID": "9",
    "SLURM_NTASKS": "16",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_TASKS_PER_NODE": "8(x2)",
    "SLURM_JOB_NODELIST": "gpu[01-02]",
    "SLURM_JOB_ID": "123456",
}
MEET = Endpoint("gpu01", 29400)
SLURM_MEET = Endpoint("gpu01", SLURM_PORTS[123456 % len(SLURM_PORTS)])


def without(environment: dict[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name not in names}


PLACES = {
    "nothing": ({}, Place(0, 1, 0, 1)),
    "one rank under torchrun": ({"RANK": "0", "WORLD_SIZE": "1"}, Place(0, 1, 0, 1, Launcher.TORCH)),
    "torchrun": (TORCHRUN, Place(9, 16, 1, 8, Launcher.TORCH, MEET)),
    "deepspeed": (DEEPSPEED, Place(9, 16, 1, 8, Launcher.TORCH, MEET)),
    "ranks alone": (
        {"RANK": "3", "WORLD_SIZE": "4", **MASTER},
        Place(3, 4, 3, 4, Launcher.TORCH, MEET),
    ),
    "Open MPI": (OPEN_MPI, Place(9, 16, 1, 8, Launcher.OPEN_MPI)),
    "MPICH": (MPICH, Place(9, 16, 1, 8, Launcher.MPICH)),
    "MPICH that is told where to meet": (MPICH | MASTER, Place(9, 16, 1, 8, Launcher.MPICH, MEET)),
    "SLURM": (SLURM, Place(9, 16, 1, 8, Launcher.SLURM, SLURM_MEET)),
    "SLURM, unequal nodes": (
        SLURM | {"SLURM_PROCID": "8", "SLURM_NODEID": "2", "SLURM_TASKS_PER_NODE": "4,3,9"},
        Place(8, 16, 1, 9, Launcher.SLURM, SLURM_MEET),
    ),
    "SLURM, a step on part of the job": (
        {
            **SLURM,
            "SLURM_STEP_NODELIST": "gpu02",
            "SLURM_STEP_TASKS_PER_NODE": "16",
            "SLURM_NODEID": "0",
            "SLURM_LOCALID": "9",
        },
        Place(9, 16, 9, 16, Launcher.SLURM, Endpoint("gpu02", SLURM_MEET.port)),
    ),
    "SLURM without task counts": (
        without(SLURM, "SLURM_TASKS_PER_NODE", "SLURM_NODEID"),
        Place(9, 16, 1, 8, Launcher.SLURM, SLURM_MEET),
    ),
    "SLURM that is told where to meet": (SLURM | MASTER, Place(9, 16, 1, 8, Launcher.SLURM, MEET)),
    "torchrun below srun": (
        TORCHRUN | SLURM | {"SLURM_PROCID": "1"},
        Place(9, 16, 1, 8, Launcher.TORCH, MEET),
    ),
    "torchrun below mpiexec, one a host": (
        TORCHRUN | {"TORCHELASTIC_RUN_ID": "x", "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"},
        Place(9, 16, 1, 8, Launcher.TORCH, MEET),
    ),
    "srun --mpi=pmi2": (
        SLURM | {"PMI_RANK": "9", "PMI_SIZE": "16"},
        Place(9, 16, 1, 8, Launcher.SLURM, SLURM_MEET),
    ),
    "a shell of salloc": ({"SLURM_NTASKS": "16", "SLURM_JOB_ID": "1"}, Place(0, 1, 0, 1)),
}


@pytest.mark.parametrize("name", PLACES)
def test_place(name: str) -> None:
    environment, expected = PLACES[name]
    assert discover(environment) == expected


def test_ranks_of_this_host() -> None:
    assert discover(TORCHRUN).host_ranks == range(8, 16)
    assert discover({}).host_ranks == range(1)


RUBBISH = {
    "no world": (without(TORCHRUN, "WORLD_SIZE"), ["WORLD_SIZE", "nothing"]),
    "no rank": (without(TORCHRUN, "RANK"), ["RANK", "nothing"]),
    "a word": (TORCHRUN | {"WORLD_SIZE": "two"}, ["WORLD_SIZE", "'two'"]),
    "negative": (TORCHRUN | {"RANK": "-1"}, ["RANK", "'-1'"]),
    "another script's digit": (TORCHRUN | {"RANK": "²"}, ["RANK", "'²'"]),
    "a space": (TORCHRUN | {"RANK": "9 "}, ["RANK", "'9 '"]),
    "endless": (TORCHRUN | {"RANK": "9" * 5000}, ["RANK", "'9999"]),
    "empty": (TORCHRUN | {"LOCAL_RANK": ""}, ["LOCAL_RANK", "''"]),
    "outside the world": (TORCHRUN | {"RANK": "16"}, ["RANK=16, WORLD_SIZE=16"]),
    "an empty world": (TORCHRUN | {"RANK": "0", "WORLD_SIZE": "0"}, ["RANK=0, WORLD_SIZE=0"]),
    "local rank above the rank": (TORCHRUN | {"RANK": "0"}, ["LOCAL_RANK=1", "RANK=0"]),
    "local rank above the host": (TORCHRUN | {"LOCAL_RANK": "8"}, ["LOCAL_RANK=8 of 8"]),
    "a host larger than the world": (TORCHRUN | {"LOCAL_WORLD_SIZE": "9"}, ["LOCAL_RANK=1 of 9", "of 16"]),
    "nowhere to meet": (without(TORCHRUN, "MASTER_ADDR"), ["MASTER_ADDR"]),
    "no port": (TORCHRUN | {"MASTER_PORT": "70000"}, ["MASTER_PORT", "70000", "65535"]),
    "an option as host": (TORCHRUN | {"MASTER_ADDR": "-oProxyCommand=x"}, ["MASTER_ADDR", "-oProxyCommand"]),
    "a command as host": (TORCHRUN | {"MASTER_ADDR": "a;reboot"}, ["MASTER_ADDR", "a;reboot"]),
    "left over for mpiexec": (OPEN_MPI | TORCHRUN | {"RANK": "0"}, ["RANK='0'", "OMPI_COMM_WORLD_RANK='9'"]),
    "left over, one rank": (MPICH | {"RANK": "9", "WORLD_SIZE": "1"}, ["WORLD_SIZE='1'", "PMI_SIZE='16'"]),
    "MPI rubbish": (MPICH | {"MPI_LOCALNRANKS": "x"}, ["MPI_LOCALNRANKS", "'x'"]),
    "SLURM: a list that is none": (
        SLURM | {"SLURM_JOB_NODELIST": "gpu[1-2"},
        ["SLURM_JOB_NODELIST", "gpu[1-2"],
    ),
    "SLURM: no list": (without(SLURM, "SLURM_JOB_NODELIST"), ["SLURM_JOB_NODELIST"]),
    "SLURM: a job without number": (SLURM | {"SLURM_JOB_ID": "x"}, ["SLURM_JOB_ID", "'x'"]),
    "SLURM: node beyond the list": (SLURM | {"SLURM_NODEID": "2"}, ["SLURM_TASKS_PER_NODE", "8(x2)", "=2"]),
    "SLURM: tasks that are none": (SLURM | {"SLURM_TASKS_PER_NODE": "8x2"}, ["SLURM_TASKS_PER_NODE", "8x2"]),
}


@pytest.mark.parametrize("name", RUBBISH)
def test_rubbish_is_named_with_its_value(name: str) -> None:
    environment, told = RUBBISH[name]
    with pytest.raises(ConfigError) as error:
        discover(environment)
    assert all(words in str(error.value) for words in told), error.value


def test_first_host() -> None:
    for nodes, first in (
        ("gpu01", "gpu01"),
        ("gpu01,gpu02", "gpu01"),
        ("gpu[07-09,12],login", "gpu07"),
        ("rack[2-3]n[004,9],x", "rack2n004"),
        ("a-b.c_d[1],e", "a-b.c_d1"),
        ("10.0.0.[3-4]", "10.0.0.3"),
    ):
        assert first_host(nodes) == first


@pytest.mark.parametrize(
    "nodes",
    [
        "",
        ",",
        "a,",
        "a b",
        "a[",
        "a[]",
        "a[1-]",
        "a[1-2-3]",
        "a[x]",
        "a]",
        "$(x)",
        "-o",
        "a;b",
        "a\n",
        "a" * 300,
    ],
)
def test_what_is_no_list_of_hosts(nodes: str) -> None:
    with pytest.raises(ConfigError):
        first_host(nodes)


def test_a_long_list_is_read_in_no_time() -> None:
    assert first_host(",".join(f"n[{i}-{i + 1},7]" for i in range(20_000))) == "n0"
    with pytest.raises(ConfigError):
        first_host("a[1]" * 20_000 + "!")


def test_hosts() -> None:
    for name in ("gpu01", "a.b-c.d", "10.0.0.1", "::1", "fe80::1", "x_1"):
        assert check_host(name, what="x") == name
    for name in ("", "-a", "a-", "a b", "a\n", "a/b", "a'b", "ä", "a@b"):
        with pytest.raises(ConfigError, match="x is no host name"):
            check_host(name, what="x")
