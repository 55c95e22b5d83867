"""The command line of tools/preprocess_data.py as a value.

Lives here: the options and their help. Does not live here: what is done with them (preprocess).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field

from megads.data.chat import open_template
from megads.data.engine_choice import ENGINES, EngineName
from megads.data.record import FORMATS, MAX_DOCUMENT_BYTES, Format, RecordOptions
from megads.data.tokenizer import SPECIAL_TOKENS, SpecialTokens

UNIT_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Shard:
    """One of several tasks that make a corpus together."""

    number: int
    """From 0."""
    count: int


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line says."""

    inputs: tuple[str, ...]
    tokenizer: str
    output_prefix: str
    append_eod: bool = False
    workers: int = 1
    records: RecordOptions = field(default_factory=RecordOptions)
    input_format: Format | None = None
    skip_bad: bool = False
    special_tokens: SpecialTokens = "text"
    engine: EngineName = "auto"
    dedup: bool = False
    shuffle_seed: int | None = None
    valid_fraction: float | None = None
    pack: tuple[int, ...] = ()
    shard: Shard | None = None
    mpi: bool = False
    unit_bytes: int = UNIT_BYTES


def parse_arguments(argv: Sequence[str]) -> Options:
    """The options of a command line.

    Raises:
        DataError: options that exclude each other, or a chat template that cannot be read.
        SystemExit: help, or an argument of the wrong kind.
    """
    parser = argparse.ArgumentParser(
        prog="preprocess_data.py",
        description="Text to a tokenized corpus in Megatron's format: P.bin P.idx, P.json (manifest), P.src. Stopped"
        " at any moment, the same command goes on where it was.",
    )
    _add_corpus_arguments(parser)
    _add_record_arguments(parser.add_argument_group("what is read"))
    _add_document_arguments(parser.add_argument_group("what becomes of documents"))
    _add_work_arguments(parser.add_argument_group("who does the work"))
    given = parser.parse_args(argv)
    if given.mpi and given.shard:
        parser.error("--mpi and --shard: give one of them")
    return Options(
        inputs=tuple(given.input),
        tokenizer=given.tokenizer,
        output_prefix=given.output_prefix,
        append_eod=given.append_eod,
        workers=given.workers,
        records=RecordOptions(
            key=given.key,
            columns=tuple(given.columns.split(",")) if given.columns is not None else (),
            separator=given.separator,
            template=None if given.chat_template is None else open_template(given.chat_template),
            messages_key=given.messages_key,
            role_key=given.role_key,
            content_key=given.content_key,
            min_bytes=given.min_bytes,
            max_bytes=given.max_bytes,
            max_document_bytes=given.max_document_bytes,
        ),
        input_format=given.input_format,
        skip_bad=given.on_error == "skip",
        special_tokens=given.special_tokens,
        engine=given.engine,
        dedup=given.dedup,
        shuffle_seed=given.shuffle_seed,
        valid_fraction=given.valid_fraction,
        pack=tuple(given.pack),
        shard=given.shard,
        mpi=given.mpi,
        unit_bytes=given.unit_bytes,
    )


def _add_corpus_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--input",
        required=True,
        nargs="+",
        metavar="PATH",
        help="JSON lines, Parquet, text or source files, .gz or .zst of them, folders, globs, or - (standard input)",
    )
    parser.add_argument(
        "--tokenizer", required=True, metavar="FILE", help="SentencePiece .model or tokenizer.json"
    )
    parser.add_argument("--output-prefix", required=True, metavar="P", help="write P.bin P.idx P.json P.src")
    parser.add_argument(
        "--append-eod", action="store_true", help="end each document with the end-of-document token"
    )


def _add_record_arguments(parser: argparse._ArgumentGroup) -> None:
    parser.add_argument(
        "--key",
        default="text",
        help="JSON key or Parquet column of the text; a.b steps into objects (default text)",
    )
    parser.add_argument("--columns", metavar="A,B", help="several keys whose texts together are the document")
    parser.add_argument(
        "--separator",
        default="\n\n",
        metavar="TEXT",
        help="between the texts of --columns (default an empty line)",
    )
    parser.add_argument("--input-format", choices=FORMATS, help="what the files hold, whatever their suffix")
    parser.add_argument(
        "--chat-template",
        metavar="NAME",
        help="conversations: plain, chatml, llama3, or a YAML file; writes P.mask (what the loss counts)",
    )
    for name, default in (("messages", "messages"), ("role", "role"), ("content", "content")):
        parser.add_argument(f"--{name}-key", default=default, metavar="KEY", help=f"(default {default})")
    parser.add_argument(
        "--on-error",
        choices=("error", "skip"),
        default="error",
        help="what to do with a record that cannot be read: stop (default), or leave it out, count it and write it to"
        " P.bad.jsonl",
    )
    parser.add_argument(
        "--max-document-bytes",
        type=_at_least_one,
        default=MAX_DOCUMENT_BYTES,
        metavar="N",
        help=f"larger documents and lines cannot be read (default {MAX_DOCUMENT_BYTES})",
    )


def _add_document_arguments(parser: argparse._ArgumentGroup) -> None:
    parser.add_argument(
        "--special-tokens",
        choices=SPECIAL_TOKENS,
        default="text",
        help="special tokens inside documents: keep as text (default), parse, or refuse",
    )
    parser.add_argument(
        "--min-bytes",
        type=int,
        default=0,
        metavar="N",
        help="leave out documents with less text than N bytes",
    )
    parser.add_argument(
        "--max-bytes", type=int, metavar="N", help="leave out documents with more text than N bytes"
    )
    parser.add_argument(
        "--dedup",
        action="store_true",
        help="leave out documents whose text is exactly that of an earlier one",
    )
    parser.add_argument(
        "--shuffle-seed", type=int, metavar="N", help="write the documents in this random order"
    )
    parser.add_argument(
        "--valid-fraction",
        type=_fraction,
        metavar="F",
        help="hold out this share of the documents as P_valid, chosen by a hash of the text",
    )
    parser.add_argument(
        "--pack",
        type=_at_least_one,
        nargs="+",
        default=(),
        metavar="L",
        help="also write P.pack-L: rows of at most L tokens with whole documents",
    )


def _add_work_arguments(parser: argparse._ArgumentGroup) -> None:
    parser.add_argument(
        "--workers", type=_at_least_one, default=1, metavar="N", help="threads that tokenize (default 1)"
    )
    parser.add_argument(
        "--engine",
        choices=ENGINES,
        default="auto",
        help="what turns text into ids; auto (default): gigatoken where it is installed and gives the ids of the"
        " tokenizer's own library",
    )
    parser.add_argument(
        "--shard",
        type=_shard,
        metavar="I/N",
        help="do part I (from 0) of the work, of N tasks over the same output, on any hosts; the last to end merges",
    )
    parser.add_argument(
        "--mpi",
        action="store_true",
        help="share the work among MPI ranks: mpiexec -n N python -m mpi4py tools/preprocess_data.py --mpi ...",
    )
    parser.add_argument(
        "--unit-bytes",
        type=_at_least_one,
        default=UNIT_BYTES,
        metavar="N",
        help=f"input bytes that are done or not after a stop (default {UNIT_BYTES})",
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


def _shard(text: str) -> Shard:
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and int(number) < int(count)):
        raise argparse.ArgumentTypeError(f"{text}: allowed is I/N with I in 0..N-1, e.g. 0/4")
    return Shard(int(number), int(count))
