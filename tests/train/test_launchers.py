"""Real launchers and the scripts in launch/: two ranks train, meet and leave when one of them is told to.

torchrun and deepspeed are dependencies of the project; MPICH is in its extra `mpi`. SLURM is not installable here: its
script and its ranks run below a stand-in for `srun` that sets the variables and starts the processes, nothing more.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from tests.distributed.job import Home, Layout, losses, step_directory, train, wait_until

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
SECONDS = 60

OPTIONS = ("config.yaml", "run.steps=400", "checkpoint.every=1000")

# Starts as many tasks as SLURM_NTASKS says, which srun's options and the job decide in earnest.
SRUN = """\
#!/usr/bin/env bash
echo "$@" > srun.said
while [[ $1 == --* ]]; do shift; done
for i in $(seq 0 $((SLURM_NTASKS - 1))); do
    SLURM_PROCID=$i SLURM_LOCALID=$i SLURM_NODEID=0 SLURM_STEP_ID=0 "$@" &
done
code=0
for _ in $(seq "$SLURM_NTASKS"); do wait -n; last=$?; [ "$last" -gt "$code" ] && code=$last; done
exit "$code"
"""


class Job:
    """A launcher in its own session, whose output goes to a file."""

    def __init__(self, home: Home, run: str, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self._home, self._run = home, run
        self._output = home.path / f"{run}.output"
        inherited = {
            name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "PMI_"))
        }
        with open(self._output, "wb") as stream:
            self.process = subprocess.Popen(
                [*command, f"run.dir={run}"],
                cwd=home.path,
                env={**inherited, **environment},
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def stop_a_rank(self) -> int:
        """Send SIGTERM to rank 0, which the lock names, after two steps; returns the launcher's exit code."""
        metrics = self._home.path / self._run / "metrics.jsonl"
        try:
            wait_until(
                lambda: (
                    self.process.poll() is not None
                    or (metrics.exists() and metrics.read_text().count("\n") > 1)
                ),
                seconds=SECONDS,
                what="two steps",
            )
            os.kill(int((self._home.path / self._run / "lock").read_text().split()[1]), signal.SIGTERM)
            return self.process.wait(SECONDS)
        except (OSError, TimeoutError, subprocess.TimeoutExpired) as error:
            raise AssertionError(self.said()) from error

    def said(self) -> str:
        return self._output.read_text(errors="replace")

    def kill(self) -> None:
        """End what is left of the session."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return
        self.process.wait()


@pytest.fixture
def jobs() -> Iterator[list[Job]]:
    jobs: list[Job] = []
    yield jobs
    for job in jobs:
        job.kill()


@pytest.fixture(scope="module")
def expected(home: Home) -> dict[int, float]:
    """The first losses of ranks that no launcher started."""
    train(home, "without a launcher", Layout(data=2), "run.stop_after=2")
    return losses(home, "without a launcher")


def start(
    home: Home,
    jobs: list[Job],
    run: str,
    command: Sequence[str],
    environment: Mapping[str, str] | None = None,
) -> Job:
    base = {
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "PYTHON": sys.executable,
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    jobs.append(Job(home, run, command, base | (environment or {})))
    return jobs[-1]


def check_run(home: Home, run: str, expected: Mapping[int, float], said: str) -> None:
    """The ranks were one job, and it stopped where it saved."""
    found = losses(home, run)
    assert {step: found[step] for step in expected} == expected, said
    assert step_directory(home, run, max(found)).exists(), said
    assert "data 2" in said


def test_torchrun(home: Home, jobs: list[Job], expected: dict[int, float]) -> None:
    """It turns every exit code into 1, and names 75 in its report."""
    command = [str(BIN / "torchrun"), "--standalone", "--nproc_per_node=2", "-m", "megads", "train", *OPTIONS]
    job = start(home, jobs, "torchrun", command, {"PYTHONPATH": str(ROOT)})
    assert job.stop_a_rank() == 1
    assert "exitcode  : 75" in job.said()
    check_run(home, "torchrun", expected, job.said())


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
def test_deepspeed_with_a_hostfile(home: Home, jobs: list[Job], expected: dict[int, float]) -> None:
    (home.path / "hosts").write_text("# name and ranks\nlocalhost slots=2\n")
    command = ["bash", str(ROOT / "launch" / "deepspeed.sh"), "hosts", *OPTIONS]
    without_ssh = {"DEEPSPEED_OPTIONS": "--no_ssh --node_rank 0 --master_addr 127.0.0.1 --master_port 29511"}
    job = start(home, jobs, "deepspeed", command, without_ssh)
    assert job.stop_a_rank() == 75, job.said()
    check_run(home, "deepspeed", expected, job.said())


HOSTFILES = (
    "-oProxyCommand=reboot slots=8",
    "gpu01 slots=8; reboot",
    "$(reboot) slots=8",
    "gpu01",
    "a b slots=8",
)


@pytest.mark.parametrize("line", HOSTFILES)
def test_a_hostfile_that_smuggles_is_refused(line: str, tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text(f"gpu00 slots=8\n{line}\n")
    (tmp_path / "python").write_text("#!/bin/sh\necho started\n")
    (tmp_path / "python").chmod(0o755)
    script, environment = (
        str(ROOT / "launch" / "deepspeed.sh"),
        os.environ | {"PYTHON": str(tmp_path / "python")},
    )
    argv = ["bash", script, "hosts", "x.yaml"]
    ended = subprocess.run(argv, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert f"2:{line}" in ended.stderr
    (tmp_path / "hosts").write_text("gpu00 slots=8\n\n # x\n10.0.0.7   slots=4\n")
    ended = subprocess.run(argv, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (0, "started\n")


@pytest.mark.skipif(
    importlib.util.find_spec("mpi4py") is None
    or shutil.which("mpiexec", path=f"{BIN}:{os.environ['PATH']}") is None,
    reason="mpi4py or mpiexec is not installed: pip install -e .[mpi]",
)
def test_mpiexec(home: Home, jobs: list[Job], expected: dict[int, float]) -> None:
    job = start(home, jobs, "mpi", ["bash", str(ROOT / "launch" / "mpi.sh"), "2", *OPTIONS])
    assert job.stop_a_rank() == 75, job.said()
    check_run(home, "mpi", expected, job.said())


def test_slurm_by_environment_and_its_script(home: Home, jobs: list[Job], expected: dict[int, float]) -> None:
    """With stand-ins for srun and scontrol: a stop with code 75 is queued again."""
    tools = home.path / "slurm"
    tools.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", '#!/bin/sh\necho "$@" > scontrol.said\n')):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    environment = {
        "PATH": f"{tools}:{os.environ['PATH']}",
        "SLURM_NTASKS": "2",
        "SLURM_TASKS_PER_NODE": "2",
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_SUBMIT_DIR": str(ROOT),
    }
    job = start(
        home, jobs, "slurm-run", ["bash", str(ROOT / "launch" / "slurm.sbatch"), *OPTIONS], environment
    )
    assert job.stop_a_rank() == 75, job.said()
    check_run(home, "slurm-run", expected, job.said())
    assert (home.path / "scontrol.said").read_text() == f"requeue {os.getpid()}\n"
    assert "--kill-on-bad-exit=0" in (home.path / "srun.said").read_text()


@pytest.mark.parametrize("script", ["deepspeed.sh", "mpi.sh", "slurm.sbatch"])
def test_a_script_without_arguments_says_how_to_use_it(script: str) -> None:
    ended = subprocess.run(
        ["bash", str(ROOT / "launch" / script)], capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("usage: ")
