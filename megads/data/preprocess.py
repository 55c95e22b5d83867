"""Text to corpus: the work of tools/preprocess_data.py.

Lives here: the command line, the pipeline from documents to tokens, and the summary. Does not live here:
reading files (source), tokenizers (tokenizer), the corpus on disk (corpus). Imports neither torch nor
deepspeed.

    reader (this thread) --batches--> `workers` threads: encode, add eod, split --in input order--> writer
    (this thread)

The tokenizers release the interpreter while they work, so threads suffice. At most `2 * workers` batches are
under way: memory does not grow with the corpus. Batches are cut and written in input order: the bytes do not
depend on `workers`.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from megads.data.corpus import SOURCE_DTYPE, CorpusWriter, Manifest
from megads.data.indexed import token_dtype
from megads.data.progress import open_progress
from megads.data.source import BadRecord, Document, Inputs, find_inputs, read_documents
from megads.data.tokenizer import SPECIAL_TOKENS, SpecialTokens, Tokenizer, open_tokenizer
from megads.errors import DataError, MegadsError

BATCH_BYTES = 1 << 19
"""Input bytes after which a batch is full."""
BATCH_DOCUMENTS = 1024
NUM_NAMED_BAD = 20
"""Bad records that are named in the log and the manifest; the others are only counted."""

NUM_NAMED_KINDS = 8
"""Kinds of files left out that the summary names."""


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line says."""

    inputs: tuple[str, ...]
    tokenizer: str
    output_prefix: str
    append_eod: bool = False
    workers: int = 1
    key: str = "text"
    skip_bad: bool = False
    special_tokens: SpecialTokens = "text"
    shuffle_seed: int | None = None
    valid_fraction: float | None = None


@dataclass(frozen=True, slots=True)
class Encoded:
    """A batch of documents for one part of the corpus."""

    ids: NDArray[np.int32]
    lengths: NDArray[np.int64]
    sources: NDArray[np.void]
    text_bytes: int
    num_empty: int


@dataclass(frozen=True, slots=True)
class Report:
    """What was made."""

    manifests: tuple[Manifest, ...]
    left_out: Mapping[str, int]
    """Files inside input folders that are of no known kind: suffix -> how many."""


@dataclass(slots=True)
class Part:
    """One corpus that is being written, and its counts so far."""

    name: str
    writer: CorpusWriter
    text_bytes: int = 0
    num_empty: int = 0

    def add(self, encoded: Encoded) -> None:
        self.writer.add(encoded.ids, encoded.lengths, sources=encoded.sources)
        self.text_bytes += encoded.text_bytes
        self.num_empty += encoded.num_empty


@dataclass(slots=True)
class BadRecords:
    """Count bad records, or refuse the first."""

    inputs: Inputs
    skip: bool
    count: int = 0
    named: list[str] = field(default_factory=list)

    def add(self, bad: BadRecord) -> None:
        place = f"{self.inputs.files[bad.file]}:{bad.record}"
        if not self.skip:
            raise DataError(
                f"{place}: {bad.why}",
                found=bad.head,
                allowed="one document with text",
                do="repair it, or leave out and count all such records with --on-error skip",
            )
        self.count += 1
        if len(self.named) < NUM_NAMED_BAD:
            self.named.append(f"{place}: {bad.why}")
            print(f"skipped {place}: {bad.why}", file=sys.stderr)


@dataclass(frozen=True, slots=True)
class Encoder:
    """Encode a batch and deal its documents to the parts of the corpus; called from several threads."""

    tokenizer: Tokenizer
    eod: int | None
    valid_fraction: float | None

    def __call__(self, documents: Sequence[Document]) -> tuple[Encoded, ...]:
        contents = [document.text.encode("utf-8") for document in documents]
        ids, lengths = self.tokenizer.encode_batch([document.text for document in documents])
        sizes = np.array([len(content) for content in contents])
        sources = np.array([(document.file, document.record) for document in documents], dtype=SOURCE_DTYPE)
        parts = np.array([is_valid(content, self.valid_fraction) for content in contents])
        numbers = (0,) if self.valid_fraction is None else (0, 1)
        full = lengths > 0
        dealt = []
        for part in numbers:
            mine = parts == part
            kept = mine & full
            dealt.append(
                Encoded(
                    ids=self._with_eod(ids[np.repeat(mine, lengths)], lengths[kept]),
                    lengths=lengths[kept] + (self.eod is not None),
                    sources=sources[kept],
                    text_bytes=int(sizes[kept].sum()),
                    num_empty=int((mine & ~full).sum()),
                )
            )
        return tuple(dealt)

    def _with_eod(self, ids: NDArray[np.int32], lengths: NDArray[np.int64]) -> NDArray[np.int32]:
        return ids if self.eod is None else np.insert(ids, np.cumsum(lengths), self.eod)


def is_valid(content: bytes, valid_fraction: float | None) -> bool:
    """Whether a document is held out: a function of its text alone, so that equal texts stay together."""
    if valid_fraction is None:
        return False
    return int.from_bytes(blake3(content).digest(8), "little") < valid_fraction * 2.0**64


def preprocess(options: Options) -> Report:
    """Make the corpus, or with a valid fraction both corpora.

    Raises:
        DataError: an input, the tokenizer or the text is not usable; nothing is left behind under the final
        names.
    """
    tokenizer = open_tokenizer(options.tokenizer, special_tokens=options.special_tokens)
    encoder = Encoder(tokenizer, tokenizer.eod if options.append_eod else None, options.valid_fraction)
    inputs = find_inputs(options.inputs)
    bad = BadRecords(inputs, options.skip_bad)
    names = ("all",) if options.valid_fraction is None else ("train", "valid")
    progress = open_progress("preprocess", sum(inputs.sizes))
    with ExitStack() as stack:
        stack.callback(progress.close)
        parts = []
        for name in names:
            parts.append(_open_part(name, options, vocab_size=tokenizer.vocab_size))
            stack.enter_context(parts[-1].writer)
        forbidden = tokenizer.control_texts if options.special_tokens == "error" else ()
        batches = cut_batches(usable_documents(inputs, options.key, bad=bad, forbidden=forbidden))
        for read_bytes, dealt in encode_in_order(batches, encoder, workers=options.workers):
            for part, encoded in zip(parts, dealt, strict=True):
                part.add(encoded)
            progress.update(read_bytes, f"{sum(part.writer.num_tokens for part in parts) / 1e6:.2f} M tokens")
        for part in parts:
            _check_not_empty(part, options)
        manifests = [_finish(part, options, tokenizer=tokenizer, inputs=inputs, bad=bad) for part in parts]
    return Report(tuple(manifests), inputs.left_out)


def usable_documents(
    inputs: Inputs, key: str, *, bad: BadRecords, forbidden: Sequence[str] = ()
) -> Iterator[Document]:
    """Documents with their bad records dealt with; a text that holds one of `forbidden` is a bad record
    too."""
    for record in read_documents(inputs, key):
        if isinstance(record, BadRecord):
            bad.add(record)
            continue
        special = next((text for text in forbidden if text in record.text), None)
        if special is None:
            yield record
        else:
            head = record.text[record.text.index(special) :][:80].encode("utf-8")[:80]
            bad.add(
                BadRecord(record.file, record.record, f"the text holds the special token {special!r}", head)
            )


def cut_batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Consecutive documents, up to `BATCH_BYTES` (characters) or `BATCH_DOCUMENTS` at once."""
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= BATCH_BYTES or len(batch) == BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def encode_in_order(
    batches: Iterable[list[Document]],
    encode: Callable[[Sequence[Document]], tuple[Encoded, ...]],
    *,
    workers: int,
) -> Iterator[tuple[int, tuple[Encoded, ...]]]:
    """(input bytes read, encoded batch) in input order, with at most 2 * workers batches under way."""
    under_way: deque[tuple[int, Future[tuple[Encoded, ...]]]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for batch in batches:
                under_way.append((batch[-1].read_bytes, pool.submit(encode, batch)))
                if len(under_way) >= 2 * workers:
                    read_bytes, future = under_way.popleft()
                    yield read_bytes, future.result()
            while under_way:
                read_bytes, future = under_way.popleft()
                yield read_bytes, future.result()
        finally:
            for _, future in under_way:
                future.cancel()


def _open_part(name: str, options: Options, *, vocab_size: int) -> Part:
    prefix = options.output_prefix + ("_valid" if name == "valid" else "")
    try:
        Path(prefix).parent.mkdir(parents=True, exist_ok=True)
        return Part(name, CorpusWriter(prefix, token_dtype(vocab_size), shuffle_seed=options.shuffle_seed))
    except OSError as error:
        raise DataError(
            f"--output-prefix {options.output_prefix}: cannot be written",
            found=f"{error.filename}: {error.strerror}",
            allowed="a folder with write permission, and a name in it",
        ) from error


def _check_not_empty(part: Part, options: Options) -> None:
    if part.writer.num_documents:
        return
    if part.name == "all":
        raise DataError(
            "no document has any text", found=f"{part.num_empty} empty documents", allowed="1 or more"
        )
    raise DataError(
        f"the {part.name} part of the split has no documents",
        found=f"--valid-fraction {options.valid_fraction}",
        allowed="a fraction that leaves documents on both sides",
        do="choose another fraction; documents are dealt by a hash of their text",
    )


def _finish(
    part: Part, options: Options, *, tokenizer: Tokenizer, inputs: Inputs, bad: BadRecords
) -> Manifest:
    facts = {
        "text_bytes": part.text_bytes,
        "append_eod": options.append_eod,
        "special_tokens": options.special_tokens,
        "tokenizer_kind": tokenizer.kind,
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "part": part.name,
        "valid_fraction": options.valid_fraction,
        "num_inputs": len(inputs.files),
        "num_empty": part.num_empty,
        "num_bad": bad.count,
        "bad": tuple(bad.named),
    }
    return part.writer.finish((str(file) for file in inputs.files), facts)


def parse_arguments(argv: Sequence[str]) -> Options:
    """The command line of tools/preprocess_data.py."""
    parser = argparse.ArgumentParser(
        prog="preprocess_data.py",
        description="Text to a tokenized corpus in Megatron's format: P.bin P.idx, P.json (manifest), P.src.",
    )
    parser.add_argument(
        "--input",
        required=True,
        nargs="+",
        metavar="PATH",
        help="JSON lines, Parquet, text or source files, or folders",
    )
    parser.add_argument(
        "--tokenizer", required=True, metavar="FILE", help="SentencePiece .model or tokenizer.json"
    )
    parser.add_argument("--output-prefix", required=True, metavar="P", help="write P.bin P.idx P.json P.src")
    parser.add_argument(
        "--append-eod", action="store_true", help="end each document with the end-of-document token"
    )
    parser.add_argument(
        "--workers", type=_at_least_one, default=1, metavar="N", help="threads that tokenize (default 1)"
    )
    parser.add_argument("--key", default="text", help="JSON key or Parquet column of the text (default text)")
    parser.add_argument(
        "--on-error",
        choices=("error", "skip"),
        default="error",
        help="what to do with a record that cannot be read: stop (default), or leave it out and count it",
    )
    parser.add_argument(
        "--special-tokens",
        choices=SPECIAL_TOKENS,
        default="text",
        help="special tokens inside documents: keep as text (default), parse, or refuse",
    )
    parser.add_argument(
        "--shuffle-seed", type=int, metavar="N", help="write the documents in this random order"
    )
    parser.add_argument(
        "--valid-fraction",
        type=_fraction,
        metavar="F",
        help="hold out this share of the documents as P_valid",
    )
    given = parser.parse_args(argv)
    return Options(
        inputs=tuple(given.input),
        tokenizer=given.tokenizer,
        output_prefix=given.output_prefix,
        append_eod=given.append_eod,
        workers=given.workers,
        key=given.key,
        skip_bad=given.on_error == "skip",
        special_tokens=given.special_tokens,
        shuffle_seed=given.shuffle_seed,
        valid_fraction=given.valid_fraction,
    )


def _at_least_one(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value}: allowed are 1 and more")
    return value


def _fraction(text: str) -> float:
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{value}: allowed are fractions between 0 and 1")
    return value


def print_summary(options: Options, report: Report, *, seconds: float) -> None:
    """What was made, and what to do next."""
    manifests = report.manifests
    prefixes = (options.output_prefix, options.output_prefix + "_valid")
    for prefix, manifest in zip(prefixes, manifests, strict=False):
        print(
            f"{prefix}: {manifest.documents} documents, {manifest.tokens} tokens, {manifest.text_bytes} bytes"
            f" ({manifest.tokens / manifest.text_bytes:.4f} tokens per byte), {manifest.num_empty} empty ones"
        )
    if manifests[0].num_bad:
        print(f"{manifests[0].num_bad} records could not be read and were left out (see the manifest)")
    if report.left_out:
        most = sorted(report.left_out.items(), key=lambda item: -item[1])[:NUM_NAMED_KINDS]
        kinds = ", ".join(f"{count} {suffix}" for suffix, count in most)
        print(f"{sum(report.left_out.values())} files of other kinds were left out, most: {kinds}")
    rate = sum(manifest.text_bytes for manifest in manifests) / 1e6 / max(seconds, 1e-9)
    print(f"{seconds:.1f} s, {rate:.1f} MB/s")
    valid = f" data.valid={prefixes[1]}" if len(manifests) > 1 else ""
    data = f"data.train={prefixes[0]}{valid} data.tokenizer={options.tokenizer}"
    print(f"next: python -m megads train CONFIG {data}")


def main(argv: Sequence[str]) -> int:
    """Run the tool; returns its exit code."""
    options = parse_arguments(argv)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # our threads are the workers
    start = time.monotonic()
    try:
        report = preprocess(options)
        print_summary(options, report, seconds=time.monotonic() - start)
    except MegadsError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"{error.filename or options.output_prefix}: {error.strerror or error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; nothing was written", file=sys.stderr)
        return 130
    return 0
