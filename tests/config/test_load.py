"""`config/load.py` and `config/document.py`: every kind of wrong key and file is told, in words, all at once."""

# ruff: noqa: E501  (tables of one line a case)

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megads.config import document
from megads.config.data import CorpusConfig
from megads.config.load import dump, load
from megads.config.root import Config
from megads.errors import ConfigError

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))

VALID = """\
run:
  steps: 10
model:
  family: gpt
  layers: 2
  hidden: 8
  heads: 2
batch:
  global: 4
data:
  train: corpus
  tokenizer: t.model
  sequence_length: 8
optim:
  lr: 3e-4
"""


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def write(text: str | bytes) -> Path:
        path = tmp_path / "x.yaml"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    return write


def message(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(path, overrides)
    return str(caught.value)


def test_file_and_overrides_are_read_alike(write: Any) -> None:
    path = write(VALID + "  warmup_steps: 1_000\n")
    config = load(path, ["model.layers=3", "optim.betas=[0.8, 0.9]", "run.dir=no", "checkpoint.every=5"])
    assert config.optim.lr == 3e-4
    assert config.optim.warmup_steps == 1000
    assert config.model.layers == 3
    assert config.optim.betas == (0.8, 0.9)
    assert config.run.dir == "no"  # YAML 1.2: text, not false
    assert config.checkpoint.every == 5
    assert config.batch.global_size == 4
    assert load(path, ["data.train=[a, {path: b, weight: 2}]"]).data.train == (
        "a",
        CorpusConfig(path="b", weight=2.0),
    )


def test_a_section_without_keys_is_all_defaults(write: Any) -> None:
    assert load(write(VALID + "parallel:\n")).parallel.tensor == 1


# What is wrong in the file (text that replaces a line of VALID, or is added) -> the line that tells it.
WRONG_KEYS = {
    "unknown key": ("  layers: 2\n", "  layers: 2\n  layrs: 2\n", ":6: model.layrs: unknown key; did you mean model.layers?"),
    "unknown section": ("run:", "trainer: {}\nrun:", ":1: trainer: unknown key"),
    "key of another section": ("  heads: 2\n", "  heads: 2\n  lr: 1.0\n", ":8: model.lr: unknown key; did you mean optim.lr?"),
    "python name of an alias": ("  global: 4", "  global_size: 4", "batch.global_size: unknown key; did you mean batch.global?"),
    "missing key": ("  steps: 10", "  seed: 1", ":1: run.steps: missing (allowed: a whole number >= 1)"),
    "missing section": ("optim:\n  lr: 3e-4\n", "", "optim: missing (it needs lr)"),
    "text for a whole number": ("layers: 2", "layers: two", ':5: model.layers: found "two" (allowed: a whole number >= 1)'),
    "fraction for a whole number": ("layers: 2", "layers: 2.0", ":5: model.layers: found 2.0"),
    "true for a whole number": ("layers: 2", "layers: true", ":5: model.layers: found true"),
    "null for a whole number": ("layers: 2", "layers:", ":5: model.layers: found null"),
    "list for a whole number": ("layers: 2", "layers: [2]", ":5: model.layers: found [2]"),
    "mapping for a whole number": ("layers: 2", "layers: {a: 2}", ':5: model.layers: found {"a": 2}'),
    "true for a stage": ("lr: 3e-4", "lr: 3e-4\n  zero_stage: true", "optim.zero_stage: found true"),
    "number out of a range": ("lr: 3e-4", "lr: 3e-4\n  zero_stage: 4", "optim.zero_stage: found 4 (allowed: a whole number >= 0 and <= 3)"),
    "zero": ("global: 4", "global: 0", ":9: batch.global: found 0 (allowed: a whole number >= 1)"),
    "negative": ("layers: 2", "layers: -2", ":5: model.layers: found -2"),
    "seed too large": ("steps: 10", f"steps: 10\n  seed: {2**63}", "run.seed: found 9223372036854775808"),
    "text for a number": ("lr: 3e-4", "lr: fast", ':15: optim.lr: found "fast" (allowed: a number > 0)'),
    "quoted number": ("lr: 3e-4", 'lr: "3e-4"', ':15: optim.lr: found "3e-4"'),
    "probability of one": ("heads: 2", "heads: 2\n  dropout: 1.0", "model.dropout: found 1.0 (allowed: a number >= 0.0 and < 1.0)"),
    "text for a truth value": ("heads: 2", "heads: 2\n  tied: no", ':8: model.tied: found "no" (allowed: true | false, or null)'),
    "number for a truth value": ("heads: 2", "heads: 2\n  tied: 1", ":8: model.tied: found 1"),
    "number for text": ("tokenizer: t.model", "tokenizer: 3", ":12: data.tokenizer: found 3 (allowed: non-empty text)"),
    "empty text": ("tokenizer: t.model", 'tokenizer: ""', ':12: data.tokenizer: found "" (allowed: non-empty text)'),
    "bad choice": ("family: gpt", "family: gptt", ':4: model.family: found "gptt" (allowed: gpt | llama | qwen2 | '),
    "list too short": ("lr: 3e-4", "lr: 3e-4\n  betas: [0.9]", "optim.betas"),
    "list too long": ("lr: 3e-4", "lr: 3e-4\n  betas: [0.9, 0.9, 0.9]", ":16: optim.betas: found [0.9, 0.9, 0.9] (allowed: a list of 2"),
    "item out of range": ("lr: 3e-4", "lr: 3e-4\n  betas: [0.9, 1.5]", ":16: optim.betas[1]: found 1.5"),
    "neither text nor list": ("train: corpus", "train: 3", ":11: data.train: found 3 (allowed: non-empty text, or a non-empty list of"),
    "empty list": ("train: corpus", "train: []", ":11: data.train: found []"),
    "no part of a layer": ("lr: 3e-4", "lr: 3e-4\nparallel: {recompute: []}", ":16: parallel.recompute: found []"),
    "no stage": ("lr: 3e-4", "lr: 3e-4\nparallel: {stage_layers: []}", ":16: parallel.stage_layers: found []"),
    "item of a blend": ("train: corpus", "train: [a, 3]", ":11: data.train[1]: found 3"),
    "key of a blend": ("train: corpus", "train:\n    - path: a\n      wieght: 2", ":13: data.train[0].wieght: unknown key; did you mean data.train[0].weight?"),
    "key missing in a blend": ("train: corpus", "train:\n    - weight: 2", ":12: data.train[0].path: missing"),
    "number in a list of texts": ("train: corpus", "train: corpus\n  valid: [a, 1]", ":12: data.valid[1]: found 1"),
    "value for a section": ("optim:\n  lr: 3e-4", "optim: 3e-4", ":14: optim: found 0.0003 (allowed: {name, lr,"),
    "list for a section": ("optim:\n  lr: 3e-4", "optim: [lr]", ":14: optim: found"),
    "infinity": ("lr: 3e-4", "lr: .inf", ":15: optim.lr: inf is not a finite number"),
    "not a number": ("lr: 3e-4", "lr: .nan", ":15: optim.lr: nan is not a finite number"),
    "date": ("train: corpus", "train: 2024-01-01", ":11: data.train: 2024-01-01 is a date"),
    "number as a key": ("  layers: 2\n", "  layers: 2\n  3: 4\n", ":6: model.3: unknown key"),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG_KEYS)
def test_wrong_key_is_told_once_with_its_line(kind: str, write: Any) -> None:
    old, new, told = WRONG_KEYS[kind]
    assert VALID.count(old) == 1
    path = write(VALID.replace(old, new))
    lines = message(path).splitlines()
    assert any(told in line for line in lines), lines
    assert "pydantic" not in "".join(lines)
    about = {line.split(": ")[1] for line in lines[:-1]}
    renamed = kind == "python name of an alias"
    assert len(lines) == (3 if renamed else 2), lines
    assert len(about) == len(lines) - 1
    assert "explain KEY" in lines[-1]


def test_all_mistakes_are_told_at_once_in_the_order_of_the_file(write: Any) -> None:
    text = (
        VALID.replace("layers: 2", "layers: two")
        .replace("global: 4", "globl: 4")
        .replace("lr: 3e-4", "lr: .inf")
    )
    lines = message(write(text), "model.heads=x", "log.evry=2", "run.steps").splitlines()[:-1]
    assert [line.split(": ")[1] for line in lines[:4]] == [
        "model.layers",
        "batch.global",
        "batch.globl",
        "optim.lr",
    ]
    assert sorted(line.split(": ")[0] for line in lines[4:]) == [
        "override log.evry=2",
        "override model.heads=x",
        "override run.steps",
    ]


WRONG_OVERRIDES = {
    "model.layrs=2": "override model.layrs=2: model.layrs: unknown key; did you mean model.layers?",
    "modle.layers=2": "modle.layers: unknown key; did you mean model.layers?",
    "lr=1": "unknown key; did you mean optim.lr?",
    "model.layers": "no value (allowed: key=value)",
    "=3": "unknown key",
    "": "no value",
    "model=3": "model: a section (allowed: model.KEY=VALUE",
    "model.layers=two": 'override model.layers=two: model.layers: found "two" (allowed: a whole number >= 1)',
    "model.layers=": "model.layers: found null",
    "model.layers=[": "model.layers: not a YAML value",
    "model.layers=!!int 3": "model.layers: not a YAML value",
    "model.layers.x=3": "no such key (allowed: the whole value, model.layers=VALUE)",
    "data.train.0.path=x": "no such key (allowed: the whole value, data.train=VALUE)",
    "optim.lr=.nan": "override optim.lr=.nan: optim.lr: nan is not a finite number",
    "model.tied=yes": 'model.tied: found "yes" (allowed: true | false, or null)',
    "data.train=[{path: a, wieght: 1}]": "data.train[0].wieght: unknown key; did you mean data.train[0].weight?",
}


@pytest.mark.parametrize("override", WRONG_OVERRIDES)
def test_wrong_override_is_told_by_its_own_text(override: str, write: Any) -> None:
    lines = message(write(VALID), override).splitlines()
    assert len(lines) == 2
    assert lines[0].startswith(f"override {override}: ")
    assert WRONG_OVERRIDES[override] in lines[0]


def test_an_override_repairs_the_file(write: Any) -> None:
    path = write(VALID.replace("layers: 2", "layers: .inf"))
    assert load(path, ["model.layers=4"]).model.layers == 4
    assert "model.layers" in message(path)


WRONG_FILES = {
    "empty": ("", "an empty file"),
    "only a comment": ("# nothing\n", "an empty file"),
    "a list": ("- 1\n", "a list"),
    "a text": ("hello\n", "a str"),
    "binary": (b"\xff\xfe\x00", "byte 0 is not UTF-8"),
    "control characters": (b"\x00\x01", "not valid YAML"),
    "syntax": ("run: [1\n", ":2: not valid YAML"),
    "tab": ("run:\tx: 1\n", ":1: not valid YAML"),
    "duplicate key": (VALID + "  lr: 1.0\n", ":16: not valid YAML"),
    "duplicate section": (VALID + "run: {steps: 3}\n", ':16: not valid YAML\n  found:   found duplicate key "run"'),
    "two documents": (VALID + "---\na: 1\n", "another document"),
    "tag": ("run: !!python/object:os.system x\n", ":1: tags are not supported"),
    "own tag": ("run: !x 3\n", ":1: tags are not supported"),
    "alias": ("a: &a [1]\nb: *a\n", ":2: aliases are not supported"),
    "yaml 1.1": ("%YAML 1.1\n---\nrun: no\n", ":2: YAML directives are not supported"),
    "nesting": ("a: " + "[" * 3000, ":1: nested too deeply"),
    "a number of 5000 digits": ("a: " + "9" * 5000, "a value cannot be read"),
    "no such date": ("a: 2024-13-45", "a value cannot be read"),
    "too large": ("#" * (document.MAX_BYTES + 1), "too large for a config"),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG_FILES)
@pytest.mark.timeout(20)
def test_wrong_file_is_refused_by_name(kind: str, write: Any) -> None:
    text, told = WRONG_FILES[kind]
    path = write(text)
    said = message(path)
    assert said.startswith(str(path))
    assert told in said


def test_a_file_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    assert "nothing there" in message(tmp_path / "none.yaml")
    assert "a directory" in message(tmp_path)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_dump_is_read_back(path: Path, tmp_path: Path) -> None:
    config = load(path)
    copy = tmp_path / "copy.yaml"
    copy.write_text(dump(config), encoding="utf-8")
    assert load(copy) == config
    assert load(copy, ["run.seed=7"]) != config


@settings(max_examples=30, deadline=None)
@given(
    text=st.text(min_size=1, max_size=12).filter(lambda text: json.loads(json.dumps(text)) == text and text.isprintable()),
    number=st.floats(min_value=1e-300, max_value=1e300),
    seed=st.integers(0, 2**63 - 1),
    every=st.none() | st.integers(1, 10**9),
    is_masked=st.booleans(),
)  # fmt: skip
def test_dump_is_read_back_for_any_value(
    tmp_path_factory: pytest.TempPathFactory,
    text: str,
    number: float,
    seed: int,
    every: int | None,
    is_masked: bool,
) -> None:
    base = _base(tmp_path_factory)
    config = replace(
        base,
        run=replace(base.run, dir=text, seed=seed),
        data=replace(
            base.data, train=(text, CorpusConfig(path=text, weight=number)), document_mask=is_masked
        ),
        optim=replace(base.optim, lr=number, betas=(0.1 + 0.2, 0.0)),
        checkpoint=replace(base.checkpoint, every=every),
    )
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(dump(config), encoding="utf-8")
    assert load(path) == config


def _base(tmp_path_factory: pytest.TempPathFactory) -> Config:
    path = tmp_path_factory.getbasetemp() / "base.yaml"
    path.write_text(VALID)
    return load(path)


def test_checking_a_config_needs_no_torch() -> None:
    code = "import sys, megads.config.load, megads.assemble.rules; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
