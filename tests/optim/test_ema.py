"""Averages of the masters: torch's AveragedModel after gathering, through a reshard, under both engines' shares."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from megads.checkpoint.load import Tolerance, load
from megads.checkpoint.reader import open_step
from megads.checkpoint.save import save
from megads.verify.measure import Trainee
from tests.distributed.job import connected, tensors
from tests.parity.harness import Case, Model, make_config
from tests.ranks import run_ranks

DECAYS = (0.9, 0.99)


def train(
    directory: Path,
    case: Case,
    steps: range,
    *,
    decays: tuple[float, ...] = DECAYS,
    precision: str = "fp64",
) -> None:
    """Steps under a layout from the checkpoint of the one before them, if any; each is saved."""
    config = make_config(Model("gpt", layers=2, optim={"ema": decays}), case, precision=precision)

    def work(rank: int, size: int) -> None:
        control = connected(rank, size)
        trainee = Trainee.build(config, control)
        if steps.start > 1:
            path = directory / f"step-{steps.start - 1:08d}"
            tolerance = Tolerance(unread=("ema_",), missing=("ema_*",))
            reader = load(path, trainee.engine.targets(), control=control, tolerance=tolerance)
            trainee.engine.load_scalars(reader.objects["optim"])
        for step in steps:
            trainee.step(step)
            objects = {"optim": dict(trainee.engine.scalars())}
            save(directory, step, pieces=trainee.engine.state(), objects=objects, control=control)

    run_ranks(work, case.world_size)


def of_kind(directory: Path, step: int, kind: str) -> dict[str, torch.Tensor]:
    found = tensors(directory / f"step-{step:08d}")
    return {name.removeprefix(f"{kind}/"): t for name, t in found.items() if name.startswith(f"{kind}/")}


class Weights(torch.nn.Module):
    """The logical tensors of a step as a model of torch."""

    def __init__(self, values: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.names = tuple(values)
        self.values = torch.nn.ParameterList(values[name] for name in self.names)


def torchs_average(directory: Path, decay: float, *, first: dict[str, torch.Tensor], steps: range) -> Weights:
    """What torch makes of the weights after each of the steps, beginning with those before them."""
    averaged = AveragedModel(Weights(first), multi_avg_fn=get_ema_multi_avg_fn(decay))
    averaged.update_parameters(Weights(first))  # its first call copies
    for step in steps:
        values = of_kind(directory, step, "model")
        averaged.update_parameters(Weights({name: values[name] for name in first}))
    module = averaged.module
    assert isinstance(module, Weights)
    return module


def assert_is_torchs(directory: Path, decay: float, *, begin: int, last: int, bound: float = 1e-12) -> None:
    expected = torchs_average(
        directory, decay, first=of_kind(directory, begin, "model"), steps=range(begin + 1, last + 1)
    )
    found = of_kind(directory, last, f"ema_{decay}")
    weights = of_kind(directory, last, "model")
    assert set(found) == set(expected.names)
    for name, wanted in zip(expected.names, expected.values, strict=True):
        assert (found[name] - wanted).abs().max() <= bound * wanted.abs().max().clamp_min(1e-3), name
    assert any(not torch.equal(found[name], weights[name]) for name in found)


def test_average_is_torchs_through_a_reshard(tmp_path: Path) -> None:
    train(tmp_path, Case(micro=7), range(1, 2), decays=())  # averages begin when the run goes on
    train(tmp_path, Case(data=2, zero=1, micro=2, bucket=3000), range(2, 4))
    train(tmp_path, Case(tensor=2, micro=7), range(4, 7))
    for decay in DECAYS:
        assert_is_torchs(tmp_path, decay, begin=1, last=6)


def test_average_moves_from_deepspeed_to_native(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    train(tmp_path, Case(micro=7), range(1, 2), decays=(), precision="fp32")
    train(tmp_path, Case(data=2, zero=2, micro=2, engine="deepspeed"), range(2, 4), precision="fp32")
    train(tmp_path, Case(pipeline=2, micro=7), range(4, 6), precision="fp32")
    assert_is_torchs(tmp_path, 0.9, begin=1, last=5, bound=1e-6)


def test_averages_come_and_go(tmp_path: Path) -> None:
    case = Case(micro=7)
    train(tmp_path, case, range(1, 3), decays=(0.9,))
    train(tmp_path, case, range(3, 5), decays=(0.9, 0.99))
    assert_is_torchs(tmp_path, 0.99, begin=2, last=4)
    assert open_step(tmp_path / "step-00000004").objects["optim"]["ema"] == [0.9, 0.99]
    train(tmp_path, case, range(5, 6), decays=())
    assert {name.partition("/")[0] for name in tensors(tmp_path / "step-00000005")} == {"model", "optim"}


class Never:
    """A guard that admits no step."""

    def admits(self, norm: torch.Tensor) -> torch.Tensor:
        return torch.zeros((), dtype=torch.bool)


@pytest.mark.parametrize("engine", ["native", "deepspeed"])
def test_a_step_that_is_not_taken_moves_no_average(engine: str) -> None:
    if engine == "deepspeed":
        pytest.importorskip("deepspeed")
    case = Case(micro=7, engine=engine, zero=1, data=2)
    config = make_config(Model("gpt", layers=2, optim={"ema": DECAYS}), case, precision="fp32")

    def work(rank: int, size: int) -> tuple[bool, bool, set[str], set[str]]:
        trainee = Trainee.build(config, connected(rank, size))
        trainee.step(1)
        before = copies(trainee)
        report = trainee.engine.step(lr=1.0, guard=Never())  # with what is left of the gradients of step 1
        kept = changes(trainee, before)
        trainee.step(2)
        return bool(report.finite), bool(report.taken), kept, changes(trainee, before)

    for finite, taken, kept, moved in run_ranks(work, 2):
        assert finite
        assert not taken
        assert not kept
        assert {"model", "ema_0.9", "ema_0.99"} <= moved


def copies(trainee: Trainee) -> list[torch.Tensor]:
    return [piece.tensor.clone() for piece in trainee.engine.state()]


def changes(trainee: Trainee, before: list[torch.Tensor]) -> set[str]:
    """The kinds of what is no longer as it was."""
    pairs = zip(trainee.engine.state(), before, strict=True)
    return {piece.name.partition("/")[0] for piece, old in pairs if not torch.equal(piece.tensor, old)}
