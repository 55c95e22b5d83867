"""A checkpoint is logical: every layout reads one canonical step, writes the same bytes, and trains on as one process.

Reading is shared by replicas, as in training. In the same layout the steps that follow are the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch

import megads.checkpoint
from megads.checkpoint.load import load
from megads.checkpoint.save import save
from megads.checkpoint.share import Reading
from megads.config.root import Config
from megads.parallel.control import Control
from megads.verify.measure import Trainee
from tests.parity.harness import Case, Model, make_config
from tests.ranks import run_ranks

GPT = Model(dropout=0.1)  # tied, a vocabulary that nothing divides
LLAMA = Model(family="llama", tied=False, layers=4, seq=12)
MOE = Model(
    family="llama",
    overrides={
        "experts": 4, "expert_ffn": 24, "experts_per_token": 2, "shared_experts": 1, "dense_layers": 1,
        "router": "sigmoid", "balance": "bias",
    },
)  # fmt: skip

LAYOUTS = (  # of which those marked run only with --all
    (GPT, Case()),
    pytest.param(GPT, Case(tensor=4), marks=pytest.mark.slow),
    pytest.param(GPT, Case(tensor=2, pipeline=2, sequence=True), marks=pytest.mark.slow),
    (GPT, Case(pipeline=3, stage_layers=(0, 2, 1))),
    pytest.param(GPT, Case(data=2, engine="deepspeed", zero=1), marks=pytest.mark.slow),
    (GPT, Case(tensor=2, data=2, engine="deepspeed", zero=2)),
    (GPT, Case(pipeline=2, data=2, zero=2, schedule="gpipe")),
    (LLAMA, Case(pipeline=2, chunks=2, schedule="zbv", data=2, zero=1)),
    pytest.param(LLAMA, Case(pipeline=2, chunks=2, schedule="interleaved"), marks=pytest.mark.slow),
    pytest.param(LLAMA, Case(context=2, tensor=2), marks=pytest.mark.slow),
    pytest.param(MOE, Case(data=2, expert=2), marks=pytest.mark.slow),
    (MOE, Case(tensor=2, data=2, expert=2, zero=1)),
)
SAVED, MORE = 2, 3


@dataclass(frozen=True, slots=True)
class Run:
    """Losses of the steps after the saved one, and the weights in the end."""

    losses: list[float]
    final: dict[str, bytes]


def go_on(config: Config, size: int, *, start: Path | None, directory: Path) -> Run:
    """Train to step SAVED (or load `start`), save, train MORE steps, save again: steps SAVED and SAVED + MORE."""

    def work(rank: int, size: int) -> list[float]:
        control = Control(rank, size, torch.distributed.group.WORLD if size > 1 else None)
        trainee = Trainee.build(config, control)
        engine = trainee.engine
        if start is None:
            for number in range(1, SAVED + 1):
                trainee.step(number)
        else:
            reading = Reading(replicas=trainee.mesh.group("dp_cp"))
            reader = load(start, engine.targets(), control=control, reading=reading)
            engine.load_scalars(reader.objects["optim"])
        objects = {"optim": dict(engine.scalars())}
        save(directory, SAVED, pieces=engine.state(), objects=objects, control=control)
        found = [trainee.step(number).loss.item() for number in range(SAVED + 1, SAVED + MORE + 1)]
        save(directory, SAVED + MORE, pieces=engine.state(), objects={}, control=control)
        return found

    losses, *_ = run_ranks(work, size, timeout=120)
    return Run(losses, bytes_of(directory / f"step-{SAVED + MORE:08d}"))


def bytes_of(step: Path) -> dict[str, bytes]:
    """Logical tensor -> shape, dtype and bytes, however it was cut into chunks."""
    opened = megads.checkpoint.open(step)
    return {
        name: repr((tuple(values.shape), values.dtype)).encode()
        + values.reshape(-1).view(torch.uint8).numpy().tobytes()
        for name, values in opened.items()
    }


@pytest.fixture(scope="module")
def canonical(tmp_path_factory: pytest.TempPathFactory) -> object:
    """Model -> the directory of a run of one process and what followed in it."""

    @cache
    def made(name: str) -> tuple[Path, Run]:
        directory = tmp_path_factory.mktemp(name)
        model = {"gpt": GPT, "llama": LLAMA, "moe": MOE}[name]
        config = make_config(model, Case(), precision="fp32")
        return directory, go_on(config, 1, start=None, directory=directory)

    return made


@pytest.mark.parametrize(
    ("model", "case"), LAYOUTS, ids=lambda value: str(value) if isinstance(value, Case) else None
)
def test_every_layout_reads_and_writes_the_same_bytes(
    model: Model, case: Case, canonical: object, tmp_path: Path
) -> None:
    name = "gpt" if model is GPT else "llama" if model is LLAMA else "moe"
    directory, straight = canonical(name)  # type: ignore[operator]
    step = directory / f"step-{SAVED:08d}"
    config = make_config(model, case, precision="fp32")
    run = go_on(config, case.world_size, start=step, directory=tmp_path)
    expected = bytes_of(step)
    found = bytes_of(tmp_path / step.name)
    assert found.keys() == expected.keys()
    assert not [tensor for tensor in expected if found[tensor] != expected[tensor]]
    assert run.losses == pytest.approx(straight.losses, rel=1e-6)
    if case == Case():
        assert run == straight  # the same layout: the same bits


def test_the_same_layout_goes_on_bit_for_bit(tmp_path: Path) -> None:
    case = Case(tensor=2, data=2, zero=1)
    config = make_config(GPT, case, precision="fp32")
    straight = go_on(config, case.world_size, start=None, directory=tmp_path / "straight")
    step = tmp_path / "straight" / f"step-{SAVED:08d}"
    assert go_on(config, case.world_size, start=step, directory=tmp_path / "again") == straight
