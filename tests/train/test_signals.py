"""Signals to whole jobs (`facts/reliability.md` K07 to K11, E05): real ranks in training, signalled from outside.

A stop is right if every rank leaves with code 75, the last step in the metrics is the last one saved, and the run that
goes on repeats none: its metrics are those of a run that nobody disturbed.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch.distributed as dist

from megads import __main__ as top
from megads.checkpoint import background
from megads.train import trainer
from megads.train.standing import Restorer
from megads.train.stop import StopRequest
from tests.distributed.job import (
    Ended,
    Home,
    Layout,
    Process,
    command,
    launch,
    losses,
    rank_processes,
    step_directory,
    train,
    wait_until,
)

LAYOUT = Layout(pipeline=2)
SECONDS = 30  # that a job has to end in; the promises are 30 for a stop and 15 for Ctrl-C


@pytest.fixture(scope="module")
def undisturbed(home: Home) -> dict[int, float]:
    train(home, "undisturbed", LAYOUT, "run.stop_after=40")
    return losses(home, "undisturbed")


@pytest.fixture
def ranks() -> Iterator[list[Process]]:
    """Jobs that a test starts are gone after it."""
    ranks: list[Process] = []
    yield ranks
    for rank in ranks:
        rank.kill()


def start(home: Home, run: str, *overrides: str) -> list[Process]:
    """Two connected ranks that train until they are told to stop."""
    store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True, wait_for_workers=False)
    meet = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    del store
    argv = ["train", "config.yaml", f"run.dir={run}", *LAYOUT.overrides, *overrides]
    return [
        Process(home.path, partial(top.main, argv), {**meet, "RANK": str(rank), "GLOO_SOCKET_IFNAME": "lo"})
        for rank in range(2)
    ]


def wait_for_steps(home: Home, run: str, count: int) -> None:
    metrics = home.path / run / "metrics.jsonl"
    wait_until(
        lambda: metrics.exists() and metrics.read_text().count("\n") >= count,
        seconds=60,
        what=f"{count} steps",
    )


def end(ranks: list[Process]) -> list[Ended]:
    """How the ranks ended, which they must in time."""
    begun = time.monotonic()
    ended = [rank.end(timeout=SECONDS) for rank in ranks]
    assert time.monotonic() - begun < SECONDS, ended
    return ended


def check_stop(home: Home, run: str, undisturbed: dict[int, float]) -> int:
    """The run stopped where it saved, and goes on from there; returns the step."""
    last = max(losses(home, run))
    assert step_directory(home, run, last).exists()
    train(home, run, LAYOUT, f"run.stop_after={last + 2}")
    found = losses(home, run)  # refuses a step that is there twice
    assert list(found) == list(range(1, last + 3))
    common = found.keys() & undisturbed.keys()  # a machine that is very busy may have gone further
    assert {step: found[step] for step in common} == {step: undisturbed[step] for step in common}
    return last


Send = Callable[[list[Process]], None]


def to(rank: int, number: signal.Signals) -> Send:
    return lambda ranks: os.kill(ranks[rank].pid, number)


def to_all_and_again(ranks: list[Process]) -> None:
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM):
        for rank in ranks:
            os.kill(rank.pid, number)


SENT: dict[str, Send] = {
    "SIGTERM to the last rank": to(1, signal.SIGTERM),
    "SIGHUP to the first rank": to(0, signal.SIGHUP),
    "SIGUSR1 to all, then SIGTERM twice": to_all_and_again,
}


@pytest.mark.parametrize("sent", SENT)
def test_all_ranks_save_the_same_step_and_leave_together(
    sent: str, home: Home, ranks: list[Process], undisturbed: dict[int, float]
) -> None:
    run = "stopped by " + sent
    ranks += start(home, run, "checkpoint.every=1000")
    wait_for_steps(home, run, 2)
    SENT[sent](ranks)
    ended = end(ranks)
    assert [rank.code for rank in ended] == [75, 75], ended
    last = check_stop(home, run, undisturbed)
    assert f"stopped after step {last} by" in ended[0].errors
    assert "Traceback" not in ended[0].errors + ended[1].errors


def test_a_rank_that_stops_alone_is_seen(
    home: Home, ranks: list[Process], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test above can fail: without the agreement the ranks do not leave together."""
    monkeypatch.setattr(StopRequest, "is_agreed", property(lambda self: self.is_raised))
    ranks += start(home, "alone", "checkpoint.every=1000", "run.timeout=3")
    wait_for_steps(home, "alone", 2)
    to(1, signal.SIGTERM)(ranks)
    assert [rank.code for rank in end(ranks)] != [75, 75]


def test_a_signal_during_a_save(
    home: Home, ranks: list[Process], undisturbed: dict[int, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ranks, forked from here, get two signals each inside their first save."""
    real_save, caller = background.save, os.getpid()
    saved: list[int] = []

    def save(directory: object, step: int, **rest: object) -> object:
        if os.getpid() != caller and not saved:
            saved.append(step)
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGUSR1)
        return real_save(directory, step, **rest)  # type: ignore[arg-type]

    monkeypatch.setattr(background, "save", save)
    ranks += start(home, "during a save", "checkpoint.every=3")
    assert [rank.code for rank in end(ranks)] == [75, 75]
    monkeypatch.undo()
    assert step_directory(home, "during a save", 3).exists()
    assert 3 < check_stop(home, "during a save", undisturbed) <= 6


def test_a_signal_before_the_first_step(
    home: Home, ranks: list[Process], monkeypatch: pytest.MonkeyPatch
) -> None:
    real_resume = Restorer.resume

    def resume(self: Restorer) -> object:
        if os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        return real_resume(self)

    monkeypatch.setattr(Restorer, "resume", resume)
    ranks += start(home, "before", "checkpoint.every=1000")
    assert [rank.code for rank in end(ranks)] == [75, 75]
    assert not (home.path / "before" / "metrics.jsonl").exists()


def test_a_signal_in_the_last_step_is_success(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    real_step = trainer.train_step

    def step(*arguments: object, **named: object) -> object:
        os.kill(os.getpid(), signal.SIGTERM)
        return real_step(*arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(trainer, "train_step", step)
    ended = command(home.path, "train", "config.yaml", "run.dir=last", "run.stop_after=1")
    assert (ended.code, len(losses(home, "last"))) == (0, 1)


def test_a_second_job_is_refused_and_the_first_undisturbed(home: Home, ranks: list[Process]) -> None:
    argv = ["train", "config.yaml", "run.dir=alone in it"]
    ranks.append(Process(home.path, partial(top.main, argv), {}))
    wait_for_steps(home, "alone in it", 2)
    second = command(home.path, *argv)
    assert second.code == 2
    assert f"process {ranks[0].pid} on" in second.errors
    os.kill(ranks[0].pid, signal.SIGINT)
    (first,) = end(ranks)
    assert (first.code, first.errors.splitlines()[-1]) == (130, "interrupted")
    assert "Traceback" not in first.errors


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1])
def test_a_signal_to_the_launcher(number: signal.Signals, home: Home, ranks: list[Process]) -> None:
    run = f"launched {number.name}"
    job = launch(home, run, LAYOUT, "checkpoint.every=1000")
    ranks.append(job)
    wait_for_steps(home, run, 2)
    pids = rank_processes(job.pid).values()
    begun = time.monotonic()
    os.kill(job.pid, number)
    ended = job.end(timeout=SECONDS)
    said = ended.errors.partition("step 1/")[2].splitlines()
    if number == signal.SIGINT:
        assert time.monotonic() - begun < 15
        assert (ended.code, said[-1]) == (130, "stopped by SIGINT")
        assert [line for line in said[1:-1] if not line.startswith("step ")] == []
    else:
        assert ended.code == 75
        assert step_directory(home, run, max(losses(home, run))).exists()
    assert len(pids) == 2 and not any(os.path.exists(f"/proc/{pid}") for pid in pids)
