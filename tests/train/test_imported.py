"""Training from a model of another program, by exactly the command that the converter prints."""

from __future__ import annotations

from pathlib import Path

import pytest

from megads.assemble.convert import open_origin
from megads.assemble.export_deepspeed import export_deepspeed
from megads.assemble.origin import Hints
from megads.checkpoint.reader import open_step
from tests.assemble.models import to_hf, to_megads
from tests.distributed.job import Home, Layout, command, losses, step_directory, train

pytest.importorskip("safetensors")


@pytest.fixture(scope="module")
def trained(home: Home) -> Path:
    """A run of four steps."""
    train(home, "imported-before", Layout(), "run.steps=4", "model.dropout=0", "model.attention_dropout=0")
    return home.path / "imported-before"


def fill_in(home: Home, imported: Path, run: str) -> None:
    """What the user must: where the data is, where the run goes, how long it is."""
    file = imported / "config.yaml"
    text = file.read_text().replace("PREFIX", "data/train").replace("runs/imported", run)
    text = text.replace("steps: 1000", "steps: 3").replace("sequence_length: 64", "sequence_length: 16")
    file.write_text(text)


def test_from_hugging_face_with_new_moments(home: Home, trained: Path) -> None:
    words = home.path / "data" / "tokenizer.model"
    to_hf(trained, home.path / "hf", tokenizer=words)
    imported = home.path / "imported"
    to_megads(home.path / "hf", imported)
    fill_in(home, imported, "after")
    ended = command(home.path, "train", "imported/config.yaml", "checkpoint.load=imported")
    assert ended.code == 0, ended.errors
    assert "the optimizer starts with new moments" in ended.said + ended.errors
    assert "comes from another program" in ended.said + ended.errors
    again = command(
        home.path, "train", "imported/config.yaml", "run.dir=started", "checkpoint.start=imported-before"
    )
    assert again.code == 0, again.errors
    assert losses(home, "after") == losses(home, "started")
    assert sorted(losses(home, "after")) == [1, 2, 3]
    assert open_step(step_directory(home, "after", 3)).objects["optim"]["step"] == 3


def test_from_deepspeed_with_its_moments(home: Home, trained: Path) -> None:
    words = home.path / "data" / "tokenizer.model"
    export_deepspeed(open_origin(trained, Hints(tokenizer=words)), home.path / "universal")
    imported = home.path / "with_moments"
    to_megads(home.path / "universal", imported, hints=Hints(tokenizer=words))
    fill_in(home, imported, "continued")
    ended = command(home.path, "train", "with_moments/config.yaml", "checkpoint.load=with_moments")
    assert ended.code == 0, ended.errors
    assert "new moments" not in ended.said + ended.errors
    assert open_step(step_directory(home, "continued", 3)).objects["optim"]["step"] == 4 + 3
    assert losses(home, "continued") != losses(home, "after")
    tensors = open_step(imported / "checkpoints" / "step-00000000").manifest.tensors
    assert sum(name.startswith("optim/exp_avg/") for name in tensors) * 3 == len(tensors)
