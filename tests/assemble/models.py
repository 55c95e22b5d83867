"""Small models with random weights as committed steps, and the two kinds of tokenizer they are saved with."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megads.assemble.compare import declared
from megads.assemble.conversion import Report
from megads.assemble.convert import open_origin
from megads.assemble.export_hf import export_hf
from megads.assemble.import_checkpoint import import_checkpoint
from megads.assemble.origin import Hints
from megads.checkpoint.save import save
from megads.checkpoint.store import Store
from megads.config.batch import BatchConfig
from megads.config.data import DataConfig
from megads.config.load import dump
from megads.config.model import ModelConfig
from megads.config.optim import OptimConfig
from megads.config.root import Config
from megads.config.run import RunConfig
from megads.data.segment import CorpusShare, Segment
from megads.data.tokenizer import open_tokenizer
from megads.model.catalog import describe
from megads.parallel.control import Control
from megads.parallel.parameter import Piece
from megads.parallel.shard import Box

HIDDEN = 48


@dataclass(frozen=True)
class Sample:
    """A model; sizes are odd where they may be."""

    family: str = "gpt"
    layers: int = 3
    vocab: int = 411
    tied: bool | None = None
    kv_heads: int | None = None
    precision: str = "fp32"
    more: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        shown = (self.tied is not None and f"tied{self.tied}", self.kv_heads and f"kv{self.kv_heads}")
        return "-".join([self.family, *filter(None, shown), *map(str, self.more), self.precision])


def config_of(sample: Sample, tokenizer: Path) -> Config:
    """The resolved config of a run of this model."""
    return Config(
        run=RunConfig(steps=10),
        model=ModelConfig(
            family=sample.family,
            layers=sample.layers,
            hidden=HIDDEN,
            heads=4,
            kv_heads=sample.kv_heads or 4,
            ffn=72,
            vocab=sample.vocab,
            max_positions=40,
            tied=sample.tied,
            **sample.more,
        ),
        batch=BatchConfig(global_size=4),
        data=DataConfig(train="unused", tokenizer=str(tokenizer), sequence_length=32),
        optim=OptimConfig(lr=1e-3, precision=sample.precision),
    )


def random_weights(config: Config, seed: int = 0) -> dict[str, torch.Tensor]:
    """Logical name -> values with nothing left at its initial 0 or 1, so that every mistake shows."""
    spec = describe(config.model, vocab=1, sequence_length=32)
    dtype = torch.float64 if config.optim.precision == "fp64" else torch.float32
    g = torch.Generator().manual_seed(seed)
    values = {}
    for name, declaration in declared(spec).items():
        noise = torch.randn(declaration.shape, generator=g, dtype=torch.float64)
        is_norm = declaration.init.kind == "ones"
        values[name] = (1 + 0.2 * noise if is_norm else 0.2 * noise).to(dtype)
    return values


def save_step(
    directory: Path, sample: Sample, tokenizer: Path, *, has_moments: bool = False, average: str | None = None
) -> dict[str, torch.Tensor]:
    """Save the model, with a moment as a trainer would, as step 7 of the run `directory`; returns its weights.

    Args:
        has_moments: whether every parameter has its moments.
        average: a second kind of weights, e.g. `ema_0.999`; the halves of the first.
    """
    config = config_of(sample, tokenizer)
    weights = random_weights(config)
    state = {f"model/{name}": values for name, values in weights.items()}
    state["optim/exp_avg/head.norm.weight"] = torch.zeros(HIDDEN)
    if has_moments:
        state |= {f"optim/exp_avg/{name}": values * 2 for name, values in weights.items()}
        state |= {f"optim/exp_avg_sq/{name}": values.abs() for name, values in weights.items()}
    if average:
        state |= {f"{average}/{name}": values / 2 for name, values in weights.items()}
    shares = (CorpusShare("unused", "00" * 32, 1.0),)
    segment = Segment(first_step=1, batch_size=4, sequence_length=32, page=32, corpora=shares)
    objects = {
        "config": dump(config),
        "history": [segment.to_dict()],
        "tokenizer": open_tokenizer(tokenizer).fingerprint,
        "made_by": {"megads": "0", "torch": "0"},
        "optim": {"name": "adamw", "step": 7},
    }
    pieces = [Piece(name, tuple(t.shape), Box.whole(tuple(t.shape)), t) for name, t in state.items()]
    save(directory / "checkpoints", 7, pieces=pieces, objects=objects, control=Control(0, 1))
    return weights


def make_sentencepiece(folder: Path) -> Path:
    """A SentencePiece BPE model of 400 ids with byte fallback, of the kind that tools/train_tokenizer.py makes."""
    import io

    import sentencepiece

    lines = [f"{i}: def area{i % 7}(width, height):" + " " * (i % 9) + f"return {i}" for i in range(300)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=330,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
    )
    path = folder / "tokenizer.model"
    path.write_bytes(model.getvalue())
    return path


def make_huggingface(folder: Path) -> Path:
    """A byte-level BPE tokenizer.json with a tokenizer_config.json beside it."""
    import tokenizers

    engine = tokenizers.ByteLevelBPETokenizer()
    engine.train_from_iterator(
        [f"def area{i}(width, height): return {i}" for i in range(100)],
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        show_progress=False,
    )
    engine.save(str(folder / "tokenizer.json"))
    settings = (
        '{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", "kept": "verbatim"}'
    )
    (folder / "tokenizer_config.json").write_text(settings)
    return folder / "tokenizer.json"


def to_hf(
    source: Path, target: Path, *, tokenizer: Path | None = None, store: Store | None = None, **options: Any
) -> Report:
    """Whatever is at `source` as a Hugging Face model."""
    origin = open_origin(source, Hints(tokenizer=tokenizer), store=store)
    return export_hf(origin, target, store=store, **options)


def to_megads(source: Path, target: Path, *, hints: Hints | None = None, **options: Any) -> Report:
    """Whatever is at `source` as a step."""
    return import_checkpoint(open_origin(source, hints or Hints()), target, **options)
