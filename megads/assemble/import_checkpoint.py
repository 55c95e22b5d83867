"""Anything as a step of megads with a config.yaml; compared before it exists.

    DST/checkpoints/step-00000000/    weights, and moments if the source has them
        config.yaml                   section `model`; the rest to be filled in, or the run's own
        tokenizer/                    verbatim
        conversion.json               hashes of what was read back, and the comparison with transformers

A step of another program becomes step 0: which data it has read is not known here. Adam's own count of steps is kept
with its moments.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import overload

from megads.assemble.compare import NOT_COMPARED, SAMPLE, Comparison, compare, sample_tokens
from megads.assemble.conversion import Report
from megads.assemble.origin import Origin, config_text, tensors_of
from megads.assemble.tokenizer_files import copy_tokenizer
from megads.checkpoint import hf
from megads.checkpoint.directory import built
from megads.checkpoint.foreign import PROGRAMS, Values
from megads.checkpoint.proof import pairs_of, prove
from megads.checkpoint.reader import open_step
from megads.checkpoint.save import save
from megads.checkpoint.store import Store, write_file
from megads.config.load import dump
from megads.config.root import Config
from megads.data.tokenizer import open_tokenizer
from megads.optim.precision import initial_dtype
from megads.parallel.control import Control
from megads.parallel.parameter import Piece
from megads.parallel.shard import Box

FP8_NOT_COMPARED = (
    "FP8 weights times their scales, every bit read back; no logits were compared, as transformers computes in FP8: "
    "--to hf exports the result and compares it"
)


def import_checkpoint(
    origin: Origin, target: Path, *, weights: str = "model", store: Store | None = None
) -> Report:
    """Write `origin` as the run `target`: one step, config.yaml and tokenizer.

    Memory: at most four times the largest tensor; with transformers also the model as it loads it.

    Args:
        weights: the kind of weights that becomes the model; another one than `model` leaves the moments out.

    Raises:
        CheckpointError: `target` is there, or the source is not what its config says.
        OSError: with the path.
    """
    store = store or Store()
    file = origin.tokenizer if origin.tokenizer is not None and origin.tokenizer.is_file() else None
    tensors = _tensors(origin, weights)
    config = origin.config
    if file is not None:
        new = target / "tokenizer" / f"tokenizer{file.suffix}"
        config = replace(config, data=replace(config.data, tokenizer=str(new)))
    notes = origin.notes
    if file is None:
        notes = (*notes, "no tokenizer.model or tokenizer.json there: set data.tokenizer")
    with built(target, store=store) as directory:
        step = save(
            directory / "checkpoints",
            int(origin.objects.get("step", 0)),
            pieces=LazyPieces(tensors),
            objects=_objects(origin, config, file, is_whole=weights == "model"),
            control=Control(0, 1),
            store=store,
        )
        write_file(store, directory / "config.yaml", blocks=[_config_file(origin, config).encode()])
        if file is not None:
            store.make_directory(directory / "tokenizer")
            copy_tokenizer(directory / "tokenizer", file, store=store)
            store.sync_directory(directory / "tokenizer")
        written = tensors_of(open_step(step, store=store))
        proofs = prove(pairs_of(tensors, written))
        comparison = None
        if origin.format == "hf":
            reason = _not_compared(origin)
            comparison = _comparison(origin, written, file) if reason is None else None
            notes = notes if reason is None else (*notes, reason)
        report = Report(origin, "megads", proofs, comparison, notes)
        report.write(directory, store=store)
    return report


def _tensors(origin: Origin, weights: str) -> dict[str, Values]:
    """What the step will hold, in the dtype of masters."""
    dtype = initial_dtype(origin.config.optim.precision)
    chosen = {f"model/{name}": values.to(dtype) for name, values in origin.weights(weights).items()}
    if weights == "model":
        rest = {name: values for name, values in origin.tensors.items() if name not in chosen}
        chosen |= rest
    return chosen


def _objects(origin: Origin, config: Config, file: Path | None, *, is_whole: bool) -> dict[str, object]:
    known = {
        key: value for key, value in origin.objects.items() if key != "step" and (is_whole or key != "optim")
    }
    words = {} if file is None else {"tokenizer": open_tokenizer(file).fingerprint}
    return {"tokenizer": "", **known, **words, "config": dump(config)}


def _config_file(origin: Origin, config: Config) -> str:
    if origin.format == "megads":
        return dump(config)
    return config_text(config, origin=PROGRAMS[origin.format])


class LazyPieces(Sequence[Piece]):
    """Whole tensors as pieces that are read when they are asked for, so that one is in memory at a time."""

    def __init__(self, tensors: Mapping[str, Values]) -> None:
        self._tensors = tuple(tensors.items())

    def __len__(self) -> int:
        return len(self._tensors)

    @overload
    def __getitem__(self, index: int) -> Piece: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Piece]: ...

    def __getitem__(self, index: int | slice) -> Piece | Sequence[Piece]:
        if isinstance(index, slice):
            return LazyPieces(dict(self._tensors[index]))
        name, values = self._tensors[index]
        return Piece(name, values.shape, Box.whole(values.shape), values.whole())


def _not_compared(origin: Origin) -> str | None:
    """Why transformers is not asked about the model in `origin`; None: it is."""
    if hf.Weights(origin.path).has_fp8:
        return FP8_NOT_COMPARED
    return None if hf.has_transformers() else NOT_COMPARED


def _comparison(origin: Origin, written: Mapping[str, Values], file: Path | None) -> Comparison:
    """Logits of the model in `origin` by transformers against those of the step that was written."""
    spec = origin.spec
    ids = list(range(spec.vocab)) if file is None else open_tokenizer(file).encode_batch([SAMPLE])[0].tolist()
    return compare(
        origin.path,
        spec,
        tokens=sample_tokens(ids, spec),
        read=lambda name: written[f"model/{name}"].whole(),
        dtype=initial_dtype(origin.config.optim.precision),
    )
