"""`config/keys.py` and `config/explain.py`: every key is documented, by the text under its field."""

from __future__ import annotations

import pytest

from megads.config import explain
from megads.config.keys import REQUIRED, all_keys
from megads.errors import ConfigError


@pytest.mark.parametrize("key", list(all_keys()), ids=lambda key: key.name)
def test_every_key_is_explained(key: explain.Key, capsys: pytest.CaptureFixture[str]) -> None:
    assert explain.main([key.name]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{key.name}: ")
    assert len(key.doc.split()) >= 3
    assert key.doc in said


def test_a_key_shows_type_default_and_choices(capsys: pytest.CaptureFixture[str]) -> None:
    explain.main(["parallel.schedule"])
    assert "allowed: gpipe | one_f_one_b" in capsys.readouterr().out
    explain.main(["optim.lr"])
    assert f"default: {REQUIRED}" in capsys.readouterr().out
    explain.main(["batch.global"])
    assert "a whole number >= 1" in capsys.readouterr().out


def test_a_section_shows_its_keys_and_no_argument_all_sections(capsys: pytest.CaptureFixture[str]) -> None:
    explain.main(["parallel"])
    assert "parallel.pipeline = 1" in capsys.readouterr().out
    explain.main([])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines][:4] == ["run", "model", "batch", "data"]


@pytest.mark.parametrize(
    ("name", "near"), [("lr", "optim.lr"), ("parallel.tensr", "parallel.tensor"), ("dta", "data")]
)
def test_an_unknown_key_names_the_nearest(name: str, near: str) -> None:
    with pytest.raises(ConfigError, match=near):
        explain.main([name])
