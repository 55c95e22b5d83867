"""Writing a corpus: PREFIX.bin .idx .src, for chat data .mask, then the manifest.

Lives here: the files of a corpus, which get their names together. Does not live here: where documents come from and in
which order (merge).

    PREFIX.*.tmp --fsync--> sealed --> old .json .idx gone --> .mask .src .json .bin named --> .idx named

The .idx is last: whatever stops the process before that, there is no corpus, and no corpus without its manifest.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from megads.data.corpus import (
    FORMAT,
    SOURCE_HEADER,
    SOURCE_MAGIC,
    Manifest,
    fingerprint,
    write_durably,
)
from megads.data.indexed import IndexedWriter, idx_path, mask_path, sync_file

NUM_NAMED_SOURCES = 100
"""Input files that the manifest itself lists."""


@dataclass(frozen=True, slots=True)
class Source:
    """An input file."""

    name: str
    size: int
    """Bytes; 0 for standard input."""
    hash: str
    """BLAKE3, 64 hex digits; empty for standard input."""


class CorpusWriter:
    """Write a corpus in bounded memory.

    As a context manager it removes everything unfinished when the block leaves by an exception.

    Args:
        prefix: PREFIX of the files to be.
        dtype: of the ids in the .bin.
        has_mask: whether documents come with a loss mask.
    """

    def __init__(self, prefix: str | Path, dtype: np.dtype[np.generic], *, has_mask: bool = False) -> None:
        self.prefix = str(prefix)
        self._tokens = IndexedWriter(prefix, dtype)
        self._sources: BinaryIO = open(f"{prefix}.src.tmp", "wb")  # noqa: SIM115 - closed by finish or abort
        self._sources.write(SOURCE_HEADER.pack(SOURCE_MAGIC, 0, 0))
        Path(f"{prefix}.mask.tmp").unlink(missing_ok=True)  # of a killed run
        self._mask: BinaryIO | None = open(f"{prefix}.mask.tmp", "wb") if has_mask else None  # noqa: SIM115
        self._mask_hash = blake3()

    @property
    def num_documents(self) -> int:
        """Documents added so far."""
        return self._tokens.num_documents

    @property
    def num_tokens(self) -> int:
        """Tokens added so far."""
        return self._tokens.num_tokens

    def add(
        self,
        ids: NDArray[np.integer],
        lengths: NDArray[np.integer],
        *,
        sources: NDArray[np.void],
        mask: NDArray[np.uint8] | None = None,
    ) -> None:
        """Append documents; `sources` has one (file, record) of `SOURCE_DTYPE` each, `mask` one byte a token."""
        if (mask is None) != (self._mask is None) or (mask is not None and mask.size != ids.size):
            raise ValueError(f"a mask of {None if mask is None else mask.size} for {ids.size} ids")
        self._tokens.add(ids, lengths)
        self._sources.write(sources.tobytes())
        if self._mask is not None and mask is not None:
            content = mask.tobytes()
            self._mask.write(content)
            self._mask_hash.update(content)

    def finish(self, sources: Sequence[Source], facts: Mapping[str, Any]) -> Manifest:
        """Complete the corpus and return its manifest.

        Args:
            sources: the input files, in the order that documents count them.
            facts: the fields of `Manifest` that only the caller knows.
        """
        sealed_bin, sealed_idx = self._tokens.seal()
        hashes = self._tokens.hashes
        if self._mask is not None:
            sync_file(self._mask)
            self._mask.close()
            hashes["mask"] = self._mask_hash.hexdigest()
        table = self._finish_sources(sources)
        manifest = Manifest(
            format=FORMAT,
            documents=self._tokens.num_documents,
            tokens=self._tokens.num_tokens,
            dtype=self._tokens.dtype.name,
            hashes=hashes,
            fingerprint=fingerprint(sealed_bin, sealed_idx),
            num_inputs=len(sources),
            sources=tuple(asdict(source) for source in sources[:NUM_NAMED_SOURCES]),
            sources_fingerprint=blake3(table).hexdigest(),
            **facts,
        )
        content = json.dumps(asdict(manifest), indent=2).encode()
        for path in (f"{self.prefix}.json", idx_path(self.prefix), mask_path(self.prefix)):
            Path(path).unlink(missing_ok=True)  # what belonged to an older corpus of this name
        if self._mask is not None:
            os.replace(f"{self.prefix}.mask.tmp", mask_path(self.prefix))
        os.replace(f"{self.prefix}.src.tmp", f"{self.prefix}.src")
        write_durably(Path(f"{self.prefix}.json"), content)
        self._tokens.publish()
        return manifest

    def abort(self) -> None:
        """Close and remove everything unfinished."""
        self._tokens.abort()
        self._sources.close()
        if self._mask is not None:
            self._mask.close()
        for suffix in ("src.tmp", "json.tmp", "mask.tmp"):
            Path(f"{self.prefix}.{suffix}").unlink(missing_ok=True)

    def __enter__(self) -> CorpusWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self.abort()

    def _finish_sources(self, sources: Sequence[Source]) -> bytes:
        """Complete PREFIX.src; returns its table of input files."""
        names = [source.name.encode("utf-8", "surrogateescape") for source in sources]
        table = b"".join(len(name).to_bytes(8, "little") + name for name in names)
        table += b"".join(
            source.size.to_bytes(8, "little") + bytes.fromhex(source.hash).ljust(32, b"\0")
            for source in sources
        )
        self._sources.write(table)
        self._sources.seek(0)
        self._sources.write(SOURCE_HEADER.pack(SOURCE_MAGIC, self.num_documents, len(sources)))
        sync_file(self._sources)
        self._sources.close()
        return table
