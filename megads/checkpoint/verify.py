"""Read every byte of a step and say what is not as it was saved. No torch, no GPU."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from blake3 import blake3

from megads.checkpoint.manifest import MANIFEST_NAME, Chunk, DamageError
from megads.checkpoint.reader import StepReader, open_step
from megads.checkpoint.store import Store


def verify(step_directory: str | Path, *, store: Store | None = None) -> list[str]:
    """All problems of a step, each naming file and tensor; empty: every byte is as it was saved.

    Memory: one chunk.

    Raises:
        CheckpointError: no step there, or of a newer format.
    """
    try:
        reader = open_step(step_directory, store=store)
    except DamageError as error:
        return [str(error)]
    by_file: defaultdict[str, list[tuple[Chunk, str]]] = defaultdict(list)
    for name, entry in reader.manifest.tensors.items():
        for chunk in entry.chunks:
            by_file[chunk.file].append((chunk, name))
    problems = []
    for file in sorted(reader.manifest.files):
        chunks = sorted(by_file[file], key=lambda item: item[0].offset)
        problems += _file_problems(reader, file, chunks)
    known = {MANIFEST_NAME, *reader.manifest.files}
    problems += [
        f"{reader.path / name}: not in the manifest"
        for name in reader.store.entries(reader.path)
        if name not in known
    ]
    return problems


def _file_problems(reader: StepReader, file: str, chunks: list[tuple[Chunk, str]]) -> list[str]:
    """Problems of one file; its chunks in order of offset."""
    problem = reader.file_problem(file)
    if problem is not None:
        return [f"{problem} (tensors: {', '.join(sorted({name for _, name in chunks}))})"]
    problems, hasher = [], blake3()
    for chunk, name in chunks:
        try:
            hasher.update(reader.read_chunk(chunk, name=name))
        except DamageError as error:
            problems.append(str(error))
    if not problems and hasher.hexdigest() != reader.manifest.files[file].blake3:
        problems.append(f"{reader.path / file}: its hash is not that of its manifest")
    return problems
