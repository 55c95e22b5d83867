"""From the launcher's environment to this process' place: which rank, of how many, on which part of which host.

    launcher                            rank                  of               on its host: rank, of
    torchrun, megads launch, deepspeed  RANK                  WORLD_SIZE       LOCAL_RANK, LOCAL_WORLD_SIZE | LOCAL_SIZE
    Open MPI                            OMPI_COMM_WORLD_RANK  .._SIZE          .._LOCAL_RANK, .._LOCAL_SIZE
    MPICH, Intel MPI                    PMI_RANK              PMI_SIZE         MPI_LOCALRANKID, MPI_LOCALNRANKS
    SLURM (srun)                        SLURM_PROCID          SLURM_NTASKS     SLURM_LOCALID, SLURM_STEP_TASKS_PER_NODE

The first row that is there counts; none of them is a world of one. Ranks meet at MASTER_ADDR:MASTER_PORT where
those are set; SLURM's first host is read from its node list; MPI's ranks tell each other (`bootstrap.py`). Only
text is read here: no torch, no shell, no network.
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from megads.errors import ConfigError

# Strict, because host names travel to resolvers and, with other launchers, to ssh: no leading "-", no spaces.
HOST = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,251}[A-Za-z0-9_])?")
NUMBER = re.compile(r"[0-9]{1,10}")  # a SLURM job of a federation has ten digits

# SLURM's `rack[1-2]n[07-09,12],login`: names with ranges of numbers, which may be padded by zeros.
_RANGES = r"\[[0-9]{1,9}(?:-[0-9]{1,9})?(?:,[0-9]{1,9}(?:-[0-9]{1,9})?)*\]"
_NODES = rf"(?:[A-Za-z0-9_.-]|{_RANGES})+"
NODE_LIST = re.compile(rf"({_NODES})(?:,{_NODES})*")
FIRST_OF_RANGES = re.compile(r"\[([0-9]+)[^\]]*\]")
TASKS_PER_NODE = re.compile(r"[0-9]{1,9}(?:\(x[0-9]{1,9}\))?(?:,[0-9]{1,9}(?:\(x[0-9]{1,9}\))?)*")

# Below the ports that Linux gives to clients, and torchrun's 29400 and 29500.
SLURM_PORTS = range(20_000, 29_000)


class Launcher(Enum):
    """Who started this process."""

    NONE = "none"
    TORCH = "torchrun"
    OPEN_MPI = "Open MPI"
    MPICH = "MPICH"
    SLURM = "SLURM"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where the ranks meet: rank 0 listens there."""

    host: str
    port: int


@dataclass(frozen=True, slots=True)
class Place:
    """This process among all.

    Attributes:
        rank: global, of `world_size`.
        local_rank: on this host, of `local_size`. A launcher that says neither has all ranks on one host.
        endpoint: None for a world of one, and where MPI's ranks tell each other.
    """

    rank: int
    world_size: int
    local_rank: int
    local_size: int
    launcher: Launcher = Launcher.NONE
    endpoint: Endpoint | None = None

    @property
    def host_ranks(self) -> range:
        """Global ranks of this host, if launchers number them host by host."""
        first = self.rank - self.local_rank
        return range(first, first + self.local_size)


@dataclass(frozen=True, slots=True)
class _Names:
    """The variables of one launcher."""

    launcher: Launcher
    rank: str
    world_size: str
    local_rank: str
    local_size: tuple[str, ...]


_TORCH = _Names(Launcher.TORCH, "RANK", "WORLD_SIZE", "LOCAL_RANK", ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"))
_OPEN_MPI = _Names(
    Launcher.OPEN_MPI,
    "OMPI_COMM_WORLD_RANK",
    "OMPI_COMM_WORLD_SIZE",
    "OMPI_COMM_WORLD_LOCAL_RANK",
    ("OMPI_COMM_WORLD_LOCAL_SIZE",),
)
_MPICH = _Names(Launcher.MPICH, "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", ("MPI_LOCALNRANKS",))
_SLURM = _Names(Launcher.SLURM, "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", ())


def discover(environment: Mapping[str, str] | None = None) -> Place:
    """This process' place, from the variables of the launcher that started it.

    Raises:
        ConfigError: a variable that is missing, rubbish, or at odds with another one.
    """
    environment = os.environ if environment is None else environment
    names = _names_of(environment)
    if names is None:
        return Place(0, 1, 0, 1)
    if names is _TORCH:
        _check_one_launcher(environment)
    rank, world_size = _number(environment, names.rank), _number(environment, names.world_size)
    if not 0 <= rank < world_size:
        raise ConfigError(
            f"environment variable {names.rank} is outside the world",
            found=f"{names.rank}={rank}, {names.world_size}={world_size}",
            allowed=f"0 <= {names.rank} < {names.world_size}",
        )
    local_rank = _number(environment, names.local_rank) if names.local_rank in environment else rank
    local_size = _local_size(environment, names)
    if local_size is None:  # unknown: as if no other host came after this one
        local_size = world_size - rank + local_rank
    first = rank - local_rank
    if not (first >= 0 and local_rank < local_size and first + local_size <= world_size):
        raise ConfigError(
            f"environment variable {names.local_rank} does not fit the ranks of this host",
            found=f"{names.local_rank}={local_rank} of {local_size} on this host, "
            f"{names.rank}={rank} of {world_size} in all",
            allowed="hosts that hold consecutive ranks: a local rank below their number, no larger than the rank",
            do=f"number ranks host by host, and let one launcher alone set {names.local_rank}",
        )
    endpoint = _endpoint(environment, names) if world_size > 1 else None
    return Place(rank, world_size, local_rank, local_size, names.launcher, endpoint)


def check_host(name: str, *, what: str) -> str:
    """The name if it is a plain host name or an IP address.

    Raises:
        ConfigError: it could be an option, a command or several words.
    """
    if HOST.fullmatch(name):
        return name
    try:
        return str(ipaddress.ip_address(name))
    except ValueError:
        raise ConfigError(
            f"{what} is no host name",
            found=repr(name[:100]),
            allowed="letters, digits, '.', '_' and inner '-', or an IP address",
        ) from None


def first_host(nodes: str, *, what: str = "SLURM_JOB_NODELIST") -> str:
    """The first host of SLURM's compressed list: `gpu[07-09,12],login` -> `gpu07`.

    Raises:
        ConfigError: it is no such list.
    """
    found = NODE_LIST.fullmatch(nodes)
    if found is None:
        raise ConfigError(
            f"environment variable {what} is no list of hosts",
            found=repr(nodes[:100]),
            allowed="names with ranges, such as gpu[07-09,12],login",
        )
    return check_host(FIRST_OF_RANGES.sub(r"\1", found.group(1)), what=f"the first host of {what}")


def _names_of(environment: Mapping[str, str]) -> _Names | None:
    """Whose variables are there. `srun --mpi=pmi2` sets PMI_RANK without MPI_LOCALRANKID; salloc sets no PROCID."""
    if _TORCH.rank in environment or _TORCH.world_size in environment:
        return _TORCH
    for names, marks in (
        (_OPEN_MPI, (_OPEN_MPI.rank,)),
        (_MPICH, (_MPICH.rank, _MPICH.local_rank)),
        (_SLURM, (_SLURM.rank, _SLURM.world_size)),
    ):
        if all(mark in environment for mark in marks):
            return names
    return None


def _check_one_launcher(environment: Mapping[str, str]) -> None:
    """Refuse RANK and WORLD_SIZE that a shell left over and mpiexec's ranks inherit: each would be the same rank.

    torchrun and deepspeed, who mark their ranks, may run below mpiexec or srun.
    """
    if "TORCHELASTIC_RUN_ID" in environment or "CROSS_RANK" in environment:
        return
    for names in (_OPEN_MPI, _MPICH):
        for mine, other in ((_TORCH.rank, names.rank), (_TORCH.world_size, names.world_size)):
            if mine in environment and other in environment and environment[mine] != environment[other]:
                raise ConfigError(
                    f"environment variables {mine} and {other} disagree",
                    found=f"{mine}={environment[mine]!r}, {other}={environment[other]!r}",
                    allowed="one launcher, or two that say the same",
                    do="unset RANK, WORLD_SIZE and LOCAL_RANK before mpiexec",
                )


def _local_size(environment: Mapping[str, str], names: _Names) -> int | None:
    """Ranks of this host; None if the launcher does not say."""
    for name in names.local_size:
        if name in environment:
            return _number(environment, name)
    if names is _SLURM:
        for name in ("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE"):
            if name in environment and "SLURM_NODEID" in environment:
                return _tasks_of_node(environment, name)
    return None


def _tasks_of_node(environment: Mapping[str, str], name: str) -> int:
    """Entry SLURM_NODEID of `8(x2),4`: tasks of each node, equal neighbours written once."""
    text, node = environment[name], _number(environment, "SLURM_NODEID")
    if TASKS_PER_NODE.fullmatch(text):
        for run in text.split(","):
            tasks, _, repeated = run.rstrip(")").partition("(x")
            node -= int(repeated or 1)
            if node < 0:
                return int(tasks)
    raise ConfigError(
        f"environment variable {name} does not say how many ranks this host has",
        found=f"{text[:100]!r} with SLURM_NODEID={environment['SLURM_NODEID']}",
        allowed="a number a host, such as 8(x2),4",
    )


def _endpoint(environment: Mapping[str, str], names: _Names) -> Endpoint | None:
    """Where the ranks meet, as the environment says; None if it does not and MPI can."""
    is_said = "MASTER_ADDR" in environment and "MASTER_PORT" in environment
    if not is_said and names in (_OPEN_MPI, _MPICH):
        return None
    if is_said or names is _TORCH:
        host, port = environment.get("MASTER_ADDR", ""), _number(environment, "MASTER_PORT")
        if not 0 < port < 65536:
            raise ConfigError("environment variable MASTER_PORT is no port", found=port, allowed="1 to 65535")
        return Endpoint(check_host(host, what="environment variable MASTER_ADDR"), port)
    for name in ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST"):
        if name in environment:
            job = _number(environment, "SLURM_JOB_ID")
            host = environment.get("MASTER_ADDR") or first_host(environment[name], what=name)
            port = SLURM_PORTS[job % len(SLURM_PORTS)]
            return Endpoint(check_host(host, what="environment variable MASTER_ADDR"), port)
    raise ConfigError(
        "SLURM does not say on which host rank 0 runs",
        found="neither SLURM_JOB_NODELIST nor MASTER_ADDR and MASTER_PORT",
        do="start the ranks with srun",
    )


def _number(environment: Mapping[str, str], name: str) -> int:
    text = environment.get(name)
    if text is None or not NUMBER.fullmatch(text):
        raise ConfigError(
            f"environment variable {name} names this process' place",
            found="nothing" if text is None else repr(text[:100]),
            allowed="a whole number >= 0",
            do="start with `python -m megads launch`, torchrun, deepspeed, srun or mpiexec; or unset the launcher's "
            "variables for one process",
        )
    return int(text)
