"""Numbers that stop being finite end the run with the step, and never reach weights or a checkpoint."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from megads.assemble import wiring
from megads.config.load import load as load_config
from megads.optim.zero import NativeEngine
from megads.parallel.mesh import build_mesh
from tests.distributed.bench import Bench
from tests.distributed.job import VOCAB, Home, Layout, command, losses, tensors, train
from tests.ranks import run_ranks


def test_an_absurd_learning_rate_ends_the_run_with_the_step(bench: Bench) -> None:
    ended = command(bench.path, *bench.train("optim.lr=1e30", "checkpoint.every=1", run="fresh"))
    assert ended.code == 1
    assert "step 2: the loss or a gradient is not finite" in ended.errors
    assert "Traceback" not in ended.errors
    assert "optim.lr" in ended.errors
    checkpoints = bench.path / "fresh" / "checkpoints"
    assert [path.name for path in checkpoints.iterdir()] == ["step-00000001"]
    assert all(bool(value.isfinite().all()) for value in tensors(checkpoints / "step-00000001").values())


def poison_at(step: int, *, seen: list[int]) -> Callable[[NativeEngine, int], None]:
    """`NativeEngine.reduce` that puts an infinity into one gradient of a step of this process."""
    reduce = NativeEngine.reduce

    def poisoned(self: NativeEngine, stage: int) -> None:
        seen.append(stage)
        if len(seen) == step:
            self._all[0].gradients[3] = float("inf")
        reduce(self, stage)

    return poisoned


def test_an_infinite_gradient_ends_the_run_and_leaves_the_checkpoint_as_it_was(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, saved = Home(bench.path), tensors(bench.step)
    train(home, "straight", Layout(), "run.stop_after=6")
    with monkeypatch.context() as patch:
        patch.setattr(NativeEngine, "reduce", poison_at(2, seen=[]))
        ended = command(bench.path, *bench.train())
    assert ended.code == 1
    assert "step 5: the loss or a gradient is not finite" in ended.errors
    assert "Traceback" not in ended.errors
    assert sorted(path.name[-1] for path in bench.step.parent.iterdir()) == ["1", "2", "3"]
    after = tensors(bench.step)
    assert all(torch.equal(after[name], saved[name]) for name in saved)

    train(home, "run", Layout(), "run.stop_after=6")  # the cause is gone: it goes on as if nothing had been
    assert losses(home, "run") == losses(home, "straight")


@pytest.mark.parametrize("zero", [0, 1])
def test_a_gradient_that_is_infinite_on_one_rank_changes_no_weight_on_any(bench: Bench, zero: int) -> None:
    config = load_config(bench.path / "config.yaml", [f"optim.zero_stage={zero}"])

    def work(rank: int, size: int) -> tuple[bool, bool]:
        mesh = build_mesh(wiring.layout_of(config, size), rank)
        engine = wiring.build_engine(config, wiring.build_model(config, mesh, vocab=VOCAB), mesh=mesh)
        before = [piece.tensor.clone() for piece in engine.targets()]
        engine.zero_gradients()
        if rank == 1:
            engine._all[0].gradients[0] = float("inf")
        engine.reduce(0)
        report = engine.step(lr=1e-3)
        same = [torch.equal(a, piece.tensor) for a, piece in zip(before, engine.targets(), strict=True)]
        return bool(report.finite), all(same)

    assert run_ranks(work, 2) == [(False, True)] * 2
