"""What a conversion did: the report that is printed, and stored in the result as conversion.json."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from megads.assemble.compare import Comparison
from megads.assemble.origin import Origin
from megads.checkpoint.foreign import Format
from megads.checkpoint.hf import write_json
from megads.checkpoint.proof import PROOF_NAME, Proof
from megads.checkpoint.store import Store

FORMAT = "megads-conversion"
VERSION = 1


@dataclass(frozen=True, slots=True)
class Report:
    """What a conversion did.

    Attributes:
        to: format of the result.
        proofs: name in the result -> the tensor as it was read back.
        comparison: of logits; None: not with Hugging Face, or transformers is not installed.
        notes: what the user should know.
    """

    origin: Origin
    to: Format
    proofs: Mapping[str, Proof]
    comparison: Comparison | None
    notes: tuple[str, ...]

    @property
    def num_tensors(self) -> int:
        """Tensors that were written."""
        return len(self.proofs)

    @property
    def num_bytes(self) -> int:
        """Bytes of these tensors."""
        return sum(proof.size for proof in self.proofs.values())

    def write(self, directory: Path, *, store: Store) -> None:
        """Write and sync conversion.json."""
        tree = {
            "format": FORMAT,
            "version": VERSION,
            "from": {"format": self.origin.format, "path": str(self.origin.path)},
            "to": self.to,
            "step": self.origin.objects.get("step", 0),
            "notes": list(self.notes),
            "comparison": None if self.comparison is None else self.comparison.to_json(),
            "tensors": {name: proof.to_json() for name, proof in self.proofs.items()},
        }
        write_json(directory / PROOF_NAME, tree, store=store)


@dataclass(frozen=True, slots=True)
class Renaming:
    """One row of a dry run: a tensor's names in the source, in megads, and in the result, with its shape."""

    source: tuple[str, ...]
    name: str
    target: tuple[str, ...]
    shape: tuple[int, ...]


def table_of(rows: Iterable[Renaming]) -> str:
    """The rows as text, columns aligned."""
    cells = [
        (" + ".join(row.source), row.name, " + ".join(row.target), "x".join(map(str, row.shape)) or "scalar")
        for row in rows
    ]
    head = ("in the source", "in megads", "in the result", "shape")
    widths = [max(len(row[column]) for row in (head, *cells)) for column in range(4)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (head, *cells)
    )
