"""`python -m megads launch --nproc N -- train CONFIG ...`: the parent of the ranks of one host.

    check the input -> rendezvous of the hosts -> N x `python -m megads train ...` -> watch -> one exit code

Torch's elastic agent does rendezvous, ranks and environment. Added here: a wrong input ends before any rank
starts; exit codes are passed on; the job is gone seconds after a rank died, whatever its peers do; and the
last thing on the screen is the reason of the rank that failed first, with its global rank, not its peers'
echoes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from subprocess import Popen, TimeoutExpired

from torch.distributed import DistError
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException, SubprocessContext
from torch.distributed.elastic.rendezvous import RendezvousError, RendezvousParameters
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from megads.assemble import rules
from megads.assemble.source import open_source
from megads.config.load import load
from megads.errors import ConfigError, RankError

SAVED = 75  # exit code of a rank that saved and stopped because of a signal
INTERRUPTED = 130

PEER_PATIENCE = 5.0  # seconds that ranks get to end after one of them died
INTERRUPT_PATIENCE = 10.0  # ... after Ctrl-C
STORE_PATIENCE = 1.0  # ... that host 0 keeps the store up, for the others to read the reason
SAVE_PATIENCE = 120  # ... to finish a step and save it, after any other signal

DEATH_KEY = "megads/first-death"
FORWARDED = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2"

# Torch tells what it does to the ranks, in many lines; the reason of the end is told here, in one.
TORCH_LOGGERS = (
    "torch.distributed.elastic",
    "torch.distributed.elastic.agent.server.api",
    "torch.distributed.elastic.agent.server.local_elastic_agent",
)

# What a rank says when another one is gone: never the reason, if any other rank has one.
ECHO_TYPES = ("RankError", "DistBackendError", "DistNetworkError", "DistStoreError", "KeyboardInterrupt")
ECHO_TEXTS = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting")


@dataclass(frozen=True, slots=True)
class Hosts:
    """Where the ranks run.

    Attributes:
        num_local_ranks: ranks of this host.
        num_hosts: hosts of the job; every one runs `launch` with the same numbers.
        host_rank: of this host, from 0.
        endpoint: HOST:PORT where host 0 listens; not needed for one host.
    """

    num_local_ranks: int
    num_hosts: int = 1
    host_rank: int = 0
    endpoint: str | None = None

    @property
    def world_size(self) -> int:
        return self.num_local_ranks * self.num_hosts

    @property
    def host_ranks(self) -> range:
        """Global ranks of this host."""
        return range(self.host_rank * self.num_local_ranks, (self.host_rank + 1) * self.num_local_ranks)


@dataclass(frozen=True, slots=True)
class Death:
    """How a rank ended.

    Attributes:
        rank: its global rank.
        code: as of subprocess (negative: a signal), or what it was about to exit with.
        reason: one message.
        trace: the traceback of an unexpected exception, else empty.
        time: of the message, seconds of the epoch.
        is_echo: it only followed another rank's death, or was told to end.
    """

    rank: int
    code: int
    reason: str
    trace: str
    time: float
    is_echo: bool


def main(argv: Sequence[str]) -> int:
    """Start the ranks of this host and wait for them; returns the exit code of the job.

    Raises:
        ConfigError: the config or its fit to the number of ranks is wrong; no rank was started.
        RankError: the hosts did not find each other.
    """
    options, command = _parse(argv)
    endpoint = f"{options.master_addr}:{options.master_port}" if options.nnodes > 1 else None
    hosts = Hosts(options.nproc, options.nnodes, options.node_rank, endpoint)
    check_input(command, hosts)
    return run_ranks([sys.executable, "-m", "megads", *command], hosts)


def check_input(command: Sequence[str], hosts: Hosts) -> None:
    """Check what every rank of `command` would be told, once and before there are any.

    Raises:
        ConfigError: a wrong config, or one that does not fit the ranks of `hosts`.
        DataError: a tokenizer or corpus that it names cannot be used.
    """
    if command[0] == "train" and "--help" not in command:
        if len(command) < 2:
            raise ConfigError("launch -- train: no config", allowed="-- train CONFIG [key=value ...]")
        config = load(command[1], command[2:])
        rules.check(config, hosts.world_size, host_ranks=hosts.host_ranks)
        open_source(config)


def run_ranks(command: Sequence[str], hosts: Hosts) -> int:
    """Run `command` once a rank, with torchrun's environment; returns the exit code of the job.

    0 if every rank returned 0; 2 and 75 if the ranks did; 130 after Ctrl-C; 1 for any other failure. The
    reason of a failure is printed on stderr when all ranks are gone.
    """
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = FORWARDED
    os.environ["MEGADS_LAUNCHER"] = str(os.getpid())
    if hosts.num_local_ranks > 1:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        # On a CPU, glibc's growing limit would put logits of many MiB on the heap between small messages of gloo:
        # resident memory of two ranks then grew by 11 MB a step. Fixed at 4 MiB it stays.
        os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(4 << 20))
    for name in TORCH_LOGGERS:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory(prefix="megads-launch-") as scratch:
        agent = _Agent(_worker_spec(command, hosts), scratch)
        stopped_by = None
        try:
            agent.run()
        except SignalException as stop:
            stopped_by = stop.sigval
        except (RendezvousError, DistError) as error:
            do = f"check that host 0 runs and that {hosts.endpoint} is free there and open to the others"
            raise RankError("the hosts did not find each other", found=error, do=do) from error
        return _verdict(agent.deaths(), stopped_by)


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="megads launch",
        usage="%(prog)s --nproc N [--nnodes N --node-rank R --master-addr HOST] -- VERB ...",
        description="Start a rank process for each device of this host and pass their exit code on.",
    )
    parser.add_argument("--nproc", type=_count, required=True, help="ranks to start on this host")
    parser.add_argument("--nnodes", type=_count, default=1, help="hosts of the job, each with its own launch")
    parser.add_argument("--node-rank", type=int, default=0, help="which of the hosts this is, from 0")
    parser.add_argument("--master-addr", default="127.0.0.1", help="name of host 0")
    parser.add_argument("--master-port", type=_count, default=29400, help="free port of host 0")
    parser.add_argument(
        "command", nargs=argparse.REMAINDER, metavar="-- VERB ...", help="what each rank runs"
    )
    options = parser.parse_args(argv)
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    if not command:
        parser.error("no command for the ranks; write `-- train CONFIG`")
    if not 0 <= options.node_rank < options.nnodes:
        parser.error(f"--node-rank {options.node_rank} is not below --nnodes {options.nnodes}")
    return options, command


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number >= 1")
    return int(text)


def _worker_spec(command: Sequence[str], hosts: Hosts) -> WorkerSpec:
    """Torch's description of the job: a free local port for one host, a fixed one for several."""
    if hosts.endpoint is None:
        backend, endpoint, local, extra = "c10d", "localhost:0", "127.0.0.1", {}
    else:
        backend, endpoint, local, extra = (
            "static",
            hosts.endpoint,
            None,
            {"rank": hosts.host_rank, "timeout": 300},
        )
    address, _, port = endpoint.rpartition(":")
    parameters = RendezvousParameters(
        backend=backend,
        endpoint=endpoint,
        run_id=str(uuid.uuid4()) if hosts.endpoint is None else "megads",
        min_nodes=hosts.num_hosts,
        max_nodes=hosts.num_hosts,
        local_addr=local,
        **extra,
    )
    return WorkerSpec(
        role="rank",
        local_world_size=hosts.num_local_ranks,
        entrypoint=command[0],
        args=tuple(command[1:]),
        rdzv_handler=get_rendezvous_handler(parameters),
        max_restarts=0,
        monitor_interval=0.1,
        master_addr=address if backend == "static" else None,
        master_port=int(port) if backend == "static" else None,
        local_addr=local,
    )


class _Agent(LocalElasticAgent):
    """Torch's agent, whose ranks end in seconds (torch waits 30 s for a stopped one)."""

    def __init__(self, spec: WorkerSpec, scratch: str) -> None:
        super().__init__(spec, DefaultLogsSpecs(log_dir=scratch), shutdown_timeout=SAVE_PATIENCE)
        self._first_dead: frozenset[int] = frozenset()
        self._elsewhere: tuple[Death, ...] = ()

    def deaths(self) -> list[Death]:
        """How the ranks of this host ended, and the first that died on another host."""
        files = self._pcontext.error_files if self._pcontext else {}
        deaths = []
        for local_rank, code in self._codes().items():
            rank = self._worker_group.workers[local_rank].global_rank
            code = -signal.SIGKILL if code is None else code
            is_told = local_rank not in self._first_dead
            deaths.append(_read_death(rank, code, Path(files[local_rank]), is_told=is_told))
        return [*deaths, *self._elsewhere]

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        dead = {local_rank: code for local_rank, code in self._codes().items() if code}
        if dead and not self._first_dead:
            self._first_dead = frozenset(dead)
            if set(dead.values()) == {SAVED}:
                self._wait(SAVE_PATIENCE)  # the others are returning from the same save
            else:
                self._exchange(worker_group, _cause(self.deaths()))
            self._end(signal.SIGTERM, PEER_PATIENCE)
        elif not dead:
            self._exchange(worker_group, None)
            if self._elsewhere:
                self._end(signal.SIGTERM, PEER_PATIENCE)
        result: RunResult = super()._monitor_workers(worker_group)
        return result

    def _exchange(self, worker_group: WorkerGroup, cause: Death | None) -> None:
        """Tell the other hosts of the first death, or learn it from them."""
        store, is_first = worker_group.store, worker_group.group_rank == 0
        if worker_group.group_world_size == 1 or store is None:
            return
        try:
            if cause is not None:
                first = store.compare_set(DEATH_KEY, "", json.dumps(asdict(cause)))
            elif store.check([DEATH_KEY]):
                first = store.get(DEATH_KEY)
            else:
                return
            death = Death(**json.loads(first))
        except DistError:  # the store lives in the launcher of host 0
            death = Death(0, 1, "the launcher of host 0 is gone", "", time.time(), is_echo=True)
        if death != cause:
            self._elsewhere = (death,)
        if is_first:
            time.sleep(STORE_PATIENCE)

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, timeout: float = PEER_PATIENCE) -> None:
        is_interrupt = death_sig == signal.SIGINT
        if death_sig in (signal.SIGHUP, signal.SIGQUIT):
            death_sig = signal.SIGTERM
        self._end(death_sig, INTERRUPT_PATIENCE if is_interrupt else timeout)
        super()._shutdown(death_sig, 1)

    def _codes(self) -> Mapping[int, int | None]:
        """Local rank -> exit code, None while it runs."""
        return {local_rank: process.poll() for local_rank, process in self._processes().items()}

    def _processes(self) -> Mapping[int, Popen[bytes]]:
        context = self._pcontext
        handlers = context.subprocess_handlers if isinstance(context, SubprocessContext) else {}
        return {local_rank: handler.proc for local_rank, handler in handlers.items()}

    def _wait(self, patience: float) -> None:
        """Wait until all ranks are gone, but not long once one has failed."""
        deadline = time.monotonic() + patience
        while None in (codes := self._codes().values()) and time.monotonic() < deadline:
            if any(code not in (None, 0, SAVED) for code in codes):
                deadline = min(deadline, time.monotonic() + PEER_PATIENCE)
            time.sleep(0.05)

    def _end(self, death_sig: signal.Signals, patience: float) -> None:
        """Ask the ranks to end, wait, and kill what is left of them and of their children.

        A second signal to this process breaks the wait off: then they are killed at once.
        """
        processes = self._processes().values()
        for process in processes:
            if process.poll() is None:
                _signal_group(process.pid, death_sig)
        try:
            self._wait(patience)
        finally:
            for process in processes:
                _signal_group(process.pid, signal.SIGKILL)
            for process in processes:
                try:
                    process.wait(PEER_PATIENCE)
                except TimeoutExpired:
                    print(f"process {process.pid} does not end (waiting in the kernel)", file=sys.stderr)


def _signal_group(pid: int, number: signal.Signals) -> None:
    """Signal a rank and its children (torch starts each rank as the leader of a group)."""
    with contextlib.suppress(ProcessLookupError):  # all of them are gone
        os.killpg(pid, number)


def _read_death(rank: int, code: int, left: Path, *, is_told: bool) -> Death:
    """What `__main__` left in the error file of a rank, or what its exit code says.

    `is_told`: the rank was still running when the first one was found dead, and was told to end.
    """
    reason = f"rank {rank}: ended with exit code {code} and left no message"
    if code < 0:
        names = {number.value: number.name for number in signal.Signals}
        reason = f"rank {rank}: killed by {names.get(-code, f'signal {-code}')}"
        if code == -signal.SIGKILL:
            reason += " (kill -9; the kernel does this when memory is full)"
    try:
        message = json.loads(left.read_text(encoding="utf-8"))["message"]
    except (OSError, ValueError, KeyError):
        return Death(rank, code, reason, "", time.time(), is_echo=is_told)
    extra = message["extraInfo"]
    is_echo = extra.get("type") in ECHO_TYPES or any(text in message["message"] for text in ECHO_TEXTS)
    trace = extra["py_callstack"] if extra["py_callstack"].startswith("Traceback") else ""
    return Death(rank, extra["code"], message["message"], trace, extra["time"], is_echo)


def _cause(deaths: Sequence[Death]) -> Death:
    """The death that explains the others."""
    return min(deaths, key=lambda death: (death.is_echo, death.time))


def _verdict(deaths: Sequence[Death], stopped_by: signal.Signals | None) -> int:
    """The exit code of the job; a failure's reason is printed."""
    failures = [death for death in deaths if death.code not in (0, SAVED)]
    reasons = [death for death in failures if not death.is_echo]
    if stopped_by is not None and not reasons:
        if deaths and not failures:
            return max(death.code for death in deaths)
        print(f"stopped by {stopped_by.name}", file=sys.stderr)
        return INTERRUPTED if stopped_by == signal.SIGINT else 1
    if not failures:
        return max((death.code for death in deaths), default=0)
    cause = _cause(failures)
    print(*filter(None, [cause.trace, cause.reason]), sep="\n", file=sys.stderr)
    return cause.code if cause.code == ConfigError.exit_code else 1
