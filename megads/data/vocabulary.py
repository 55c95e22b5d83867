"""Learn a SentencePiece vocabulary from text: the work of tools/train_tokenizer.py.

Lives here: the command line and the training. Does not live here: using a tokenizer (tokenizer), reading
files (source). The model is BPE with byte fallback, so every text can be written and read back unchanged; ids
are 0 unknown, 1 begin, 2 end of document, 3..258 the bytes, then the merges, then the single characters.

SentencePiece sees the text line by line and holds it in memory: at most `--max-bytes` of it, whole documents
chosen by a hash of their text. The result depends on the inputs and the options alone.
"""

from __future__ import annotations

import argparse
import io
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

from megads.data.chat import open_template
from megads.data.corpus import write_durably
from megads.data.part import refused
from megads.data.progress import open_progress
from megads.data.record import Inputs, RecordOptions, Template
from megads.data.source import find_inputs
from megads.data.unit import check_inputs, plan_units, read_unit
from megads.errors import DataError, MegadsError

LINE_BYTES = 4096
"""Longer lines are cut: SentencePiece would silently leave them out."""
MIN_VOCAB_SIZE = 3 + 256 + 1
MAX_BYTES = 100_000_000
UNIT_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line says."""

    inputs: tuple[str, ...]
    output: Path
    vocab_size: int
    max_bytes: int = MAX_BYTES
    key: str = "text"
    template: Template | None = None
    skip_bad: bool = False


def train_tokenizer(options: Options) -> Path:
    """Train and write the model; returns its path.

    Raises:
        DataError: the inputs cannot be read or hold too little text for the vocabulary.
    """
    import sentencepiece

    inputs = find_inputs(options.inputs)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    model = io.BytesIO()
    lines = _Lines(inputs, options)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type="bpe",
            vocab_size=options.vocab_size,
            byte_fallback=True,
            character_coverage=0.9999,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            max_sentence_length=LINE_BYTES,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            num_threads=1,  # stands in the file: more would change its bytes
            minloglevel=2,
        )
    except MegadsError:
        raise
    except (RuntimeError, OSError) as error:
        raise DataError(
            "the vocabulary cannot be learned from this text",
            found=f"--vocab-size {options.vocab_size}, {lines.num_bytes} bytes of text ({error})",
            allowed=_allowed_sizes(str(error)),
            do="set --vocab-size within this, or give more text",
        ) from error
    write_durably(options.output, model.getvalue())
    print(f"{options.output}: {options.vocab_size} ids from {lines.num_bytes} bytes of text")
    if lines.num_bad:
        print(f"{lines.num_bad} records could not be read and were left out")
    return options.output


def _allowed_sizes(message: str) -> str:
    """The bound on the vocabulary size that SentencePiece's message tells."""
    if most := re.search(r"too high.*<= (\d+)", message):
        return f"at most {most[1]} ids for this text"
    if least := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return f"at least {least[1]} ids for the characters of this text"
    return "a vocabulary that the text can fill"


class _Lines:
    """The training text, line by line, with counts of what was given out."""

    def __init__(self, inputs: Inputs, options: Options) -> None:
        self._inputs = inputs
        self._options = options
        self._share = options.max_bytes / max(1, sum(inputs.sizes))
        self.num_bytes = 0
        self.num_documents = 0
        self.num_bad = 0

    def __iter__(self) -> Iterator[str]:
        progress = open_progress("read", sum(self._inputs.sizes))
        records = RecordOptions(key=self._options.key, template=self._options.template)
        check_inputs(self._inputs, records)
        done = 0
        try:
            for unit in plan_units(self._inputs, unit_bytes=UNIT_BYTES):
                for documents in read_unit(self._inputs, unit, options=records):
                    if documents.bad and not self._options.skip_bad:
                        raise refused(documents.bad[0], unit, inputs=self._inputs)
                    self.num_bad += len(documents.bad)
                    progress.update(done + documents.read_bytes, f"{self.num_documents} documents")
                    yield from self._lines(documents.texts.to_pylist())
                done += unit.size
        finally:
            progress.close()
        if not self.num_bytes:
            raise DataError("no text to learn a vocabulary from", found=f"{self.num_documents} documents")

    def _lines(self, texts: Sequence[str]) -> Iterator[str]:
        """The lines of the documents that are in the sample."""
        for text in texts:
            content = text.encode("utf-8")
            if int.from_bytes(blake3(content).digest(8), "big") < self._share * 2.0**64:
                self.num_documents += 1
                self.num_bytes += len(content)
                yield from _cut_lines(text)


def _cut_lines(text: str) -> Iterator[str]:
    step = LINE_BYTES // 4  # a character has at most 4 bytes
    for line in text.splitlines():
        line = line.replace("\0", "")
        yield from (line[start : start + step] for start in range(0, len(line), step))


def parse_arguments(argv: Sequence[str]) -> Options:
    """The command line of tools/train_tokenizer.py."""
    parser = argparse.ArgumentParser(
        prog="train_tokenizer.py",
        description="Learn a SentencePiece BPE vocabulary with byte fallback from text.",
    )
    parser.add_argument(
        "--input",
        required=True,
        nargs="+",
        metavar="PATH",
        help="JSON lines, Parquet, text or source files, or folders",
    )
    parser.add_argument("--vocab-size", required=True, type=int, metavar="N", help="number of token ids")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--output-prefix", metavar="P", help="write P.model")
    where.add_argument("--output", metavar="FILE", help="write FILE, whose name ends with .model")
    parser.add_argument(
        "--max-bytes",
        type=int,
        default=MAX_BYTES,
        metavar="N",
        help=f"learn from about N bytes (default {MAX_BYTES})",
    )
    parser.add_argument("--key", default="text", help="JSON key or Parquet column of the text (default text)")
    parser.add_argument(
        "--on-error",
        choices=("error", "skip"),
        default="error",
        help="what to do with a record that cannot be read: stop (default), or leave it out",
    )
    parser.add_argument(
        "--chat-template",
        metavar="NAME",
        help="learn from conversations (`messages`): plain, chatml, llama3, or a YAML file",
    )
    given = parser.parse_args(argv)
    if given.vocab_size < MIN_VOCAB_SIZE:
        parser.error(f"--vocab-size {given.vocab_size}: allowed are {MIN_VOCAB_SIZE} (all bytes) and more")
    if given.max_bytes < 1:
        parser.error(f"--max-bytes {given.max_bytes}: allowed are 1 and more")
    if given.output is not None and not given.output.endswith(".model"):
        parser.error(f"--output {given.output}: the name of a SentencePiece model ends with .model")
    return Options(
        inputs=tuple(given.input),
        output=Path(given.output or f"{given.output_prefix}.model"),
        vocab_size=given.vocab_size,
        max_bytes=given.max_bytes,
        key=given.key,
        template=None if given.chat_template is None else open_template(given.chat_template),
        skip_bad=given.on_error == "skip",
    )


def main(argv: Sequence[str]) -> int:
    """Run the tool; returns its exit code."""
    start = time.monotonic()
    try:
        options = parse_arguments(argv)
        output = train_tokenizer(options)
    except MegadsError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"{error.filename}: {error.strerror}" if error.filename else str(error), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; nothing was written", file=sys.stderr)
        return 130
    print(f"{time.monotonic() - start:.1f} s")
    given = f"--input {' '.join(options.inputs)} --tokenizer {output}"
    if options.template is not None:
        given += f" --chat-template {options.template.name}"
    print(f"next: python tools/preprocess_data.py {given} --output-prefix P --append-eod")
    return 0
