"""`train/launch.py` with real processes: whatever a rank does, the job ends in seconds, with one reason."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from megads import __main__ as top
from megads.errors import RankError
from megads.train import launch as module
from megads.train.launch import Hosts, run_ranks

ROOT = Path(__file__).parents[2]
ONE_HOST = Hosts(3)

# A rank: behaves as argv says, below the project's own top frame. Rank 1 is the one that fails.
RANK = """
import os, signal, sys, time
from types import ModuleType
from megads import __main__ as top
from megads.errors import RankError
from megads.errors import ConfigError, RankError

def ready(handler):
    signal.signal(signal.SIGTERM, handler)
    open(f"ready-{rank}", "w").write(str(os.getpid()))

def act(argv):
    behaviour = argv[0]
    if behaviour == "ok":
        print(os.environ["OMP_NUM_THREADS"], os.environ["WORLD_SIZE"], argv[1])
        return 0
    if behaviour == "wrong":
        raise ConfigError("run.x: bad", found=3)
    if behaviour == "saved":
        time.sleep(0.5 * rank)  # the last to come back from a save
        return 75
    if behaviour == "sleep":
        ready(signal.SIG_DFL)
        time.sleep(100)
    if behaviour == "save":
        ready(lambda number, frame: sys.exit(75))
        time.sleep(100)
    if rank == 1:
        while sum(name.startswith("ready") for name in os.listdir(".")) < int(os.environ["WORLD_SIZE"]) - 1:
            time.sleep(0.01)
        if behaviour == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise ValueError("the reason")
    if behaviour == "raised far away":
        ready(signal.SIG_DFL)
        time.sleep(100)
    if behaviour == "raised":
        ready(signal.SIG_DFL)
        time.sleep(0.2)
        raise RuntimeError("[pair.cc:547] Connection closed by peer [127.0.0.1]:4242")
    ready(signal.SIG_IGN)  # rank 2 does not listen to SIGTERM
    if rank == 0:
        os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(100)

rank = int(os.environ["RANK"])
sys.modules["act"] = ModuleType("act")
sys.modules["act"].main = act
top.VERBS = {"act": ("act:main", "")}
sys.exit(top.main(["act", *sys.argv[1:]]))
"""


@dataclass(frozen=True, slots=True)
class Ended:
    code: int | None
    said: str
    errors: str
    seconds: float


class Job:
    """A launcher of three ranks in its own directory, where ranks that are ready leave their process ids."""

    def __init__(self, folder: Path, *argv: str, hosts: Hosts = ONE_HOST) -> None:
        (folder / "rank.py").write_text(RANK)
        self._folder = folder
        self._host = str(hosts.host_rank)
        self._start = time.monotonic()
        # Forked, because this process has imported torch already.
        self.process = multiprocessing.get_context("fork").Process(target=_launch, args=(folder, argv, hosts))
        self.process.start()

    def wait_ready(self) -> None:
        deadline = time.monotonic() + 60
        while len(self.pids()) < 3 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert len(self.pids()) == 3
        self._start = time.monotonic()

    def pids(self) -> list[int]:
        texts = [path.read_text() for path in self._folder.glob("ready-*")]
        return [int(text) for text in texts if text]

    def end(self) -> Ended:
        self.process.join(timeout=60)
        seconds = time.monotonic() - self._start
        said, errors = ((self._folder / (name + self._host)).read_text() for name in ("out", "err"))
        return Ended(self.process.exitcode, said, errors, seconds)

    def alive(self) -> list[int]:
        return [pid for pid in self.pids() if Path(f"/proc/{pid}").exists()]


def _launch(folder: Path, argv: tuple[str, ...], hosts: Hosts) -> None:
    os.chdir(folder)
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{name}{hosts.host_rank}", os.O_CREAT | os.O_WRONLY | os.O_APPEND), descriptor)
    os.environ.pop("OMP_NUM_THREADS", None)
    os.environ["PYTHONPATH"] = str(ROOT)
    with open(2, "w", closefd=False) as sys.stderr:
        code = run_ranks([sys.executable, "rank.py", *argv], hosts)
    os._exit(code)


@pytest.fixture
def jobs(tmp_path: Path) -> Iterator[list[Job]]:
    jobs: list[Job] = []
    yield jobs
    for job in jobs:
        job.process.kill()
        job.process.join()
        for pid in job.alive():
            os.kill(pid, signal.SIGKILL)


def start(jobs: list[Job], folder: Path, *argv: str, hosts: Hosts = ONE_HOST) -> Job:
    jobs.append(Job(folder, *argv, hosts=hosts))
    return jobs[-1]


def test_success(jobs: list[Job], tmp_path: Path) -> None:
    ended = start(jobs, tmp_path, "ok", "a=b c").end()
    assert (ended.code, ended.errors) == (0, "")
    assert ended.said.splitlines() == ["1 3 a=b c"] * 3


@pytest.mark.parametrize("behaviour", ["killed", "raised"])
def test_a_dead_rank_ends_the_job_with_its_reason_last(
    behaviour: str, jobs: list[Job], tmp_path: Path
) -> None:
    job = start(jobs, tmp_path, behaviour)
    ended = job.end()
    assert ended.code == 1
    assert ended.seconds < 15
    last = ended.errors.splitlines()[-1]
    if behaviour == "killed":
        assert last.startswith("rank 1: killed by SIGKILL")
        assert len(ended.errors.splitlines()) == 1
    else:
        assert last == "rank 1: ValueError: the reason"
        assert ended.errors.count("Traceback") == 1
        assert "Connection closed" not in ended.errors
    assert job.alive() == []


def test_a_wrong_input_of_all_ranks_is_said_once_with_code_2(jobs: list[Job], tmp_path: Path) -> None:
    ended = start(jobs, tmp_path, "wrong").end()
    assert ended.code == 2
    assert ended.errors.count("run.x: bad") == 1
    assert "Traceback" not in ended.errors
    assert ended.errors.endswith("  found:   3\n")


def test_saved_and_stopped_is_75_and_no_rank_is_cut_short(jobs: list[Job], tmp_path: Path) -> None:
    ended = start(jobs, tmp_path, "saved").end()
    assert (ended.code, ended.errors) == (75, "")


@pytest.mark.parametrize(
    ("behaviour", "number", "code"),
    [("save", signal.SIGTERM, 75), ("sleep", signal.SIGTERM, 1), ("sleep", signal.SIGINT, 130)],
)
def test_signals_are_passed_on(
    behaviour: str, number: signal.Signals, code: int, jobs: list[Job], tmp_path: Path
) -> None:
    job = start(jobs, tmp_path, behaviour)
    job.wait_ready()
    os.kill(job.process.pid or 0, number)
    ended = job.end()
    assert ended.code == code
    assert ended.seconds < 15
    assert ended.errors == ("" if code == 75 else f"stopped by {number.name}\n")
    assert job.alive() == []


def test_a_death_on_one_host_ends_the_others_with_its_reason(jobs: list[Job], tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    for host in range(2):
        start(jobs, tmp_path, "raised far away", hosts=Hosts(1, 2, host, endpoint))
    for ended in [job.end() for job in jobs]:
        assert ended.code == 1
        assert ended.seconds < 15
        assert ended.errors.splitlines()[-1] == "rank 1: ValueError: the reason"
    assert jobs[0].alive() == []


def test_a_port_in_use_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MEGADS_LAUNCHER", "TORCHELASTIC_SIGNALS_TO_HANDLE"):
        monkeypatch.setenv(name, "")  # run_ranks sets them: restored after the test
    with socket.socket() as used:
        used.bind(("127.0.0.1", 0))
        used.listen()
        port = used.getsockname()[1]
        with pytest.raises(RankError, match=str(port)):
            run_ranks(["true"], Hosts(1, 2, 0, f"127.0.0.1:{port}"))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process of its parent's death")
def test_no_rank_outlives_the_launcher(jobs: list[Job], tmp_path: Path) -> None:
    job = start(jobs, tmp_path, "sleep")
    job.wait_ready()
    job.process.kill()
    job.process.join()
    deadline = time.monotonic() + 10
    while job.alive() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert job.alive() == []


def test_the_reason_is_told_even_if_an_echo_was_earlier(capsys: pytest.CaptureFixture[str]) -> None:
    echo = module.Death(0, 1, "rank 0: gone", "", 1.0, is_echo=True)
    late = module.Death(1, 2, "rank 1: bad input", "", 3.0, is_echo=False)
    later = module.Death(2, 1, "rank 2: bad input", "", 4.0, is_echo=False)
    for deaths in ([echo, late, later], [later, late, echo]):
        assert module._verdict(deaths, None) == 2
        assert capsys.readouterr().err == "rank 1: bad input\n"
    assert module._verdict([echo], None) == 1
    assert module._verdict([module.Death(0, 75, "", "", 1.0, is_echo=False), echo], signal.SIGTERM) == 1


CONFIG = """\
run: {steps: 2}
model: {family: gpt, layers: 2, hidden: 8, heads: 2}
batch: {global: 4}
data: {train: corpus, tokenizer: t.model, sequence_length: 8}
optim: {lr: 1e-3}
"""

WRONG_LAUNCHES = {
    "no nproc": (["--", "train", "x.yaml"], "--nproc"),
    "nproc of zero": (["--nproc", "0", "--", "train", "x.yaml"], "'0' is not a whole number >= 1"),
    "no command": (["--nproc", "2"], "no command for the ranks"),
    "node rank out of range": (
        ["--nproc", "2", "--nnodes", "2", "--node-rank", "2", "--", "train", "x"],
        "--nnodes 2",
    ),
    "no config": (["--nproc", "2", "--", "train"], "no config"),
    "no such config": (["--nproc", "2", "--", "train", "none.yaml"], "none.yaml: cannot be read"),
    "wrong key": (["--nproc", "2", "--", "train", "x.yaml", "model.layrs=3"], "did you mean model.layers?"),
    "wrong ranks": (["--nproc", "3", "--", "train", "x.yaml", "parallel.tensor=2"], "3 / 2 = 1.5"),
    "wrong ranks of two hosts": (
        ["--nproc", "3", "--nnodes", "2", "--", "train", "x.yaml", "parallel.tensor=4"],
        "6 / 4 = 1.5",
    ),
    "tensor ranks of two hosts": (
        ["--nproc", "3", "--nnodes", "2", "--", "train", "x.yaml", "parallel.tensor=2", "batch.global=6"],
        "ranks 2 to 3 crosses to another host",
    ),
}


@pytest.mark.parametrize("wrong", WRONG_LAUNCHES)
def test_a_wrong_launch_starts_no_rank(
    wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def never(*_: object) -> int:
        raise AssertionError("ranks were started")

    argv, told = WRONG_LAUNCHES[wrong]
    (tmp_path / "x.yaml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "run_ranks", never)
    try:
        code = top.main(["launch", *argv])
    except SystemExit as end:
        code = end.code  # type: ignore[assignment]
    said = capsys.readouterr().err
    assert code == 2
    assert told in said
    assert "Traceback" not in said


def test_local_sh_goes_through_launch(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(CONFIG)
    script = str(ROOT / "launch" / "local.sh")
    environment = os.environ | {"PYTHON": sys.executable}
    argv = ["bash", script, "3", "x.yaml", "parallel.tensor=2"]
    ended = subprocess.run(argv, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert "3 / 2 = 1.5" in ended.stderr
    assert subprocess.run(["bash", script], capture_output=True, check=False).returncode == 2
