"""What a conversion reads from, whatever format it is in: a config, and logical tensors that are read one by one.

    megads step       open_megads  (here)                       \
    Hugging Face      import_hf.py                               >  Origin  ->  import_checkpoint.py, export_*.py
    Megatron-LM       import_megatron.py                        /
    DeepSpeed         import_deepspeed.py
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch

import megads
from megads.assemble import rules
from megads.assemble.compare import declared
from megads.checkpoint.foreign import Format, Values
from megads.checkpoint.hf_names import grouped
from megads.checkpoint.load import read_box
from megads.checkpoint.reader import StepReader, open_step
from megads.checkpoint.store import Store
from megads.config import document
from megads.config.load import load_text, tree
from megads.config.model import ModelConfig
from megads.config.root import Config
from megads.data.tokenizer import open_tokenizer
from megads.errors import CheckpointError
from megads.model.catalog import complete, describe
from megads.model.spec import DecoderSpec
from megads.parallel.shard import Box, ShardSpec

LONGEST_SEQUENCE = 2048
"""Of the placeholder data.sequence_length."""
NO_TOKENIZER = "TOKENIZER"
HEADER = """\
# Converted from {origin}. Section `model` is that of the weights. Everything else holds placeholders:
# set run, batch, data and optim before training.
"""


@dataclass(frozen=True, slots=True)
class Hints:
    """What the user says about a source that does not say it itself.

    Attributes:
        config: config.json of Hugging Face or config.yaml of megads.
        tokenizer: its file.
        vocab: token ids; rows beyond them are padding.
    """

    config: Path | None = None
    tokenizer: Path | None = None
    vocab: int | None = None


@dataclass(frozen=True, slots=True)
class Origin:
    """A checkpoint, opened.

    Attributes:
        format, path: what it is.
        config: the run's own, or the model with placeholders for the rest.
        tensors: logical names as in a step (`model/..`, `optim/exp_avg/..`) -> values.
        names: logical name of a weight -> what it is called there.
        objects: the small JSON values of a step made of it; without `config`.
        tokenizer: its file, as far as known.
        notes: what the user should know.
    """

    format: Format
    path: Path
    config: Config
    tensors: Mapping[str, Values]
    names: Mapping[str, tuple[str, ...]]
    objects: Mapping[str, Any]
    tokenizer: Path | None
    notes: tuple[str, ...] = ()

    @property
    def model(self) -> ModelConfig:
        """The model, no key left open."""
        return complete(self.config.model, vocab=1, sequence_length=self.config.data.sequence_length)

    @property
    def spec(self) -> DecoderSpec:
        """The model."""
        return describe(self.config.model, vocab=1, sequence_length=self.config.data.sequence_length)

    def weights(self, kind: str) -> dict[str, Values]:
        """Parameter name -> its values of a kind: `model`, or an average such as `ema_0.999`.

        Raises:
            CheckpointError: the checkpoint holds no such kind, or not exactly the model's parameters.
        """
        wanted = declared(self.spec)
        prefix = f"{kind}/"
        found = {n.removeprefix(prefix): v for n, v in self.tensors.items() if n.startswith(prefix)}
        if not found:
            kinds = sorted({name.split("/")[0] for name in self.tensors} - {"optim", "router"})
            raise CheckpointError(f"{self.path}: holds no weights {kind}", allowed=", ".join(kinds))
        wrong = [n for n in sorted(found.keys() | wanted.keys()) if not _is_of(found.get(n), wanted.get(n))]
        if wrong:
            raise CheckpointError(
                f"{self.path}: its tensors are not those of its config", found=grouped(wrong)
            )
        return found


def _is_of(values: Values | None, spec: ShardSpec | None) -> bool:
    return values is not None and spec is not None and values.shape == spec.shape


def open_megads(path: Path, hints: Hints, *, store: Store) -> Origin:
    """Open a step.

    Raises:
        CheckpointError: damage, or no config in it.
    """
    reader = open_step(path, store=store)
    text = reader.objects.get("config")
    if not isinstance(text, str):
        raise CheckpointError(f"{path}: the checkpoint holds no config", found=type(text).__name__)
    config = load_text(text, source=f"{path}/config")
    tensors = tensors_of(reader)
    names = {n.removeprefix("model/"): (n,) for n in tensors if n.startswith("model/")}
    objects = {**reader.objects, "step": reader.step}
    known = None if config.data.tokenizer == NO_TOKENIZER else Path(config.data.tokenizer)
    return Origin("megads", path, config, tensors, names, objects, hints.tokenizer or known)


def tensors_of(reader: StepReader) -> dict[str, Values]:
    """The tensors of a step."""
    return {
        name: Values(entry.shape, getattr(torch, entry.dtype), partial(_read, reader, name))
        for name, entry in reader.manifest.tensors.items()
    }


def _read(reader: StepReader, name: str, box: Box) -> torch.Tensor:
    return read_box(reader, name, box=box)


def foreign_config(
    section: Mapping[str, Any], *, origin: str, tokenizer: Path | None, is_double: bool = False
) -> Config:
    """The config of a model that comes from elsewhere: section `model`, and placeholders that make it a config.

    Raises:
        CheckpointError: sizes are missing.
        ConfigError: impossible sizes.
    """
    missing = [f"model.{key}" for key in ("vocab", "max_positions") if section.get(key) is None]
    if missing:
        raise CheckpointError(f"{origin}: leaves out a size", found=f"no {', '.join(missing)}")
    placeholders = _placeholders(section, tokenizer, is_double=is_double)
    config = load_text(document.write(placeholders), source=f"{origin}, as a config of megads")
    rules.check(config, 1)
    return config


def config_text(config: Config, *, origin: str) -> str:
    """config.yaml of an import: what defines the model and names the tokenizer; the rest to be filled in."""
    defaults = {field.name: field.default for field in fields(ModelConfig)}
    section = {key: value for key, value in tree(config)["model"].items() if value != defaults[key]}
    known = None if config.data.tokenizer == NO_TOKENIZER else Path(config.data.tokenizer)
    is_double = config.optim.precision == "fp64"
    return HEADER.format(origin=origin) + document.write(_placeholders(section, known, is_double=is_double))


def _placeholders(section: Mapping[str, Any], tokenizer: Path | None, *, is_double: bool) -> dict[str, Any]:
    longest = section.get("max_positions")
    return {
        "run": {"dir": "runs/imported", "steps": 1000},
        "model": dict(section),
        "batch": {"global": 8},
        "data": {
            "train": "PREFIX",
            "tokenizer": NO_TOKENIZER if tokenizer is None else str(tokenizer),
            "sequence_length": min(longest, LONGEST_SEQUENCE)
            if isinstance(longest, int)
            else LONGEST_SEQUENCE,
        },
        "optim": {"lr": 1e-5, "precision": "fp64" if is_double else "fp32"},
    }


def vocab_of(hints: Hints) -> int | None:
    """Token ids, as the user says or the tokenizer has them; None: not known."""
    if hints.vocab is not None or hints.tokenizer is None:
        return hints.vocab
    return open_tokenizer(hints.tokenizer).vocab_size


def made_by() -> dict[str, str]:
    """The object `made_by` of a converted step."""
    return {"megads": megads.__version__, "torch": str(torch.__version__)}
