"""One small face for both kinds of tokenizer: a SentencePiece `.model` and a Hugging Face `tokenizer.json`.

Lives here: opening, encoding, decoding, the end-of-document id, the fingerprint, and what becomes of special
text. Does not live here: reading documents or writing corpora. `sentencepiece` and `tokenizers` are imported
here and nowhere else, and only once a file asks for one of them.

Special text is a decision. A document that holds the characters `<|endoftext|>` may

    text    keep them as ordinary text: a document cannot forge its own end (default)
    parse   turn them into the control token, as Megatron does with Hugging Face tokenizers
    error   be refused
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from megads.errors import DataError

if TYPE_CHECKING:
    import sentencepiece
    import tokenizers

SpecialTokens = Literal["text", "parse", "error"]
SPECIAL_TOKENS: tuple[SpecialTokens, ...] = ("text", "parse", "error")
END_OF_DOCUMENT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")
"""Names of the end-of-document token, tried in this order where tokenizer_config.json names none."""
MAX_VOCAB_SIZE = 1 << 24


class Tokenizer(Protocol):
    """Text to token ids and back."""

    @property
    def kind(self) -> str:
        """`sentencepiece` or `huggingface`."""

    @property
    def library(self) -> str:
        """The library that defines its ids: `sentencepiece` or `tokenizers`."""

    @property
    def file(self) -> Path:
        """The tokenizer file."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""

    @property
    def eod(self) -> int:
        """The id that ends a document. Raises DataError where the tokenizer has none."""

    @property
    def eod_text(self) -> str:
        """How the vocabulary writes that token, e.g. `</s>`. Raises DataError where there is none."""

    @property
    def fingerprint(self) -> str:
        """BLAKE3 of the tokenizer file, 64 hex digits."""

    @property
    def control_tokens(self) -> Mapping[str, int]:
        """The texts of the control tokens, such as `</s>`, and their ids."""

    def encode_batch(self, texts: Sequence[str]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Ids of all texts one after another [sum of lengths], and the length of each [num texts].

        Nothing is put before or after a text. Safe to call from several threads at once, which then run in
        parallel. Texts must be valid Unicode (no lone surrogates).
        """

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`."""


def open_tokenizer(path: str | Path, *, special_tokens: SpecialTokens = "text") -> Tokenizer:
    """Open a `.model` or `tokenizer.json` file, or a folder that holds exactly one of the two.

    Raises:
        DataError: the file is absent, of neither kind or damaged, or the policy does not exist for its kind.
    """
    file = tokenizer_file(Path(path))
    if special_tokens not in SPECIAL_TOKENS:
        raise DataError(
            "unknown special token policy", found=special_tokens, allowed=", ".join(SPECIAL_TOKENS)
        )
    if file.suffix == ".json":
        return HuggingFaceTokenizer(file, parse_special_tokens=special_tokens == "parse")
    if special_tokens == "parse":
        raise DataError(
            f"{file}: SentencePiece never reads control tokens out of text",
            found="special tokens: parse",
            allowed="text, error",
            do="leave --special-tokens at text; that is also what Megatron does for SentencePiece",
        )
    return SentencePieceTokenizer(file)


class HuggingFaceTokenizer:
    """A `tokenizer.json` through the library `tokenizers`."""

    kind = "huggingface"
    library = "tokenizers"

    def __init__(self, file: Path, *, parse_special_tokens: bool) -> None:
        import tokenizers

        content = file.read_bytes()
        try:
            engine = tokenizers.Tokenizer.from_str(content.decode("utf-8"))
        except Exception as error:  # the library raises bare Exception for every kind of damage
            raise DataError(
                f"{file}: not a readable tokenizer.json",
                found=f"{len(content)} bytes ({error})",
                allowed="a complete tokenizer.json of the library tokenizers",
            ) from error
        engine.no_padding()
        engine.no_truncation()
        engine.encode_special_tokens = not parse_special_tokens
        vocabulary = engine.get_vocab(with_added_tokens=True)
        self.file = file
        self._engine: tokenizers.Tokenizer = engine
        self._eod = _named_eod(file, vocabulary)
        self.fingerprint = blake3(content).hexdigest()
        self.vocab_size = _checked_vocab_size(file, max(vocabulary.values(), default=-1) + 1)
        self.control_tokens = {
            token.content: i for i, token in engine.get_added_tokens_decoder().items() if token.special
        }

    @property
    def eod(self) -> int:
        if self._eod is None:
            raise DataError(
                f"{self.file}: the tokenizer names no end-of-document token",
                found="no eos_token in tokenizer_config.json beside it",
                allowed="eos_token, or one of the tokens " + " ".join(END_OF_DOCUMENT),
                do='put {"eos_token": "..."} in tokenizer_config.json beside the tokenizer',
            )
        return self._eod

    @property
    def eod_text(self) -> str:
        return str(self._engine.id_to_token(self.eod))

    def encode_batch(self, texts: Sequence[str]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        encodings = self._engine.encode_batch_fast(list(texts), add_special_tokens=False)
        return _flatten([encoding.ids for encoding in encodings])

    def decode(self, ids: Sequence[int]) -> str:
        return self._engine.decode([int(i) for i in ids], skip_special_tokens=False)


class SentencePieceTokenizer:
    """A SentencePiece `.model`. Its control tokens are never read out of text."""

    kind = "sentencepiece"
    library = "sentencepiece"

    def __init__(self, file: Path) -> None:
        import sentencepiece

        content = file.read_bytes()
        try:
            engine = sentencepiece.SentencePieceProcessor(model_proto=content)
            vocab_size = engine.vocab_size()
        except (RuntimeError, OSError, TypeError) as error:
            raise DataError(
                f"{file}: not a readable SentencePiece model",
                found=f"{len(content)} bytes ({error})",
                allowed="a complete .model file, as tools/train_tokenizer.py writes it",
            ) from error
        self.file = file
        self._engine: sentencepiece.SentencePieceProcessor = engine
        self.fingerprint = blake3(content).hexdigest()
        self.vocab_size = _checked_vocab_size(file, vocab_size)
        self.control_tokens = {engine.id_to_piece(i): i for i in range(vocab_size) if engine.is_control(i)}

    @property
    def eod(self) -> int:
        eod = int(self._engine.eos_id())
        if eod < 0:
            raise DataError(
                f"{self.file}: the tokenizer has no end-of-document token",
                found="eos_id = -1",
                allowed="a SentencePiece model with an eos piece",
                do="train the model with eos_id >= 0 (tools/train_tokenizer.py does)",
            )
        return eod

    @property
    def eod_text(self) -> str:
        return str(self._engine.id_to_piece(self.eod))

    def encode_batch(self, texts: Sequence[str]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        return _flatten(self._engine.encode(list(texts), out_type=int, num_threads=1))

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._engine.decode([int(i) for i in ids]))


def encode_parsed(tokenizer: Tokenizer, text: str) -> NDArray[np.int32]:
    """Ids of `text` with every control token in it read as one, whatever the policy for documents.

    For text that a person declared, such as a chat template. What stands between control tokens is encoded by
    itself.
    """
    known = tokenizer.control_tokens
    pattern = "|".join(re.escape(control) for control in sorted(known, key=len, reverse=True))
    parts = re.split(f"({pattern})", text) if known else [text]
    encoded = [
        np.array([known[part]], dtype=np.int32) if i % 2 else tokenizer.encode_batch([part])[0]
        for i, part in enumerate(parts)
    ]
    return np.concatenate(encoded)


def tokenizer_file(path: Path) -> Path:
    if path.is_dir():
        found = [*sorted(path.glob("*.model")), *path.glob("tokenizer.json")]
        if len(found) != 1:
            raise DataError(
                f"{path}: the folder does not hold exactly one tokenizer",
                found=", ".join(file.name for file in found) or "none",
                allowed="one *.model or one tokenizer.json",
                do="name the file itself",
            )
        return found[0]
    if not path.is_file():
        raise DataError(
            f"{path}: no such tokenizer file",
            found="nothing there" if not path.exists() else "something that is no file",
            allowed="a SentencePiece .model or a Hugging Face tokenizer.json",
        )
    if path.suffix not in (".model", ".json"):
        raise DataError(
            f"{path}: not a kind of tokenizer that megads reads",
            found=path.suffix or "no suffix",
            allowed="a SentencePiece .model or a Hugging Face tokenizer.json",
        )
    return path


def _checked_vocab_size(file: Path, vocab_size: int) -> int:
    if not 1 <= vocab_size <= MAX_VOCAB_SIZE:
        raise DataError(
            f"{file}: impossible vocabulary size", found=vocab_size, allowed=f"1..{MAX_VOCAB_SIZE}"
        )
    return vocab_size


def _named_eod(file: Path, vocabulary: dict[str, int]) -> int | None:
    """The id of the eos token of tokenizer_config.json beside `file`, or of a token with a customary name."""
    beside = file.parent / "tokenizer_config.json"
    if beside.is_file():
        try:
            named = json.loads(beside.read_bytes()).get("eos_token")
        except (ValueError, AttributeError, RecursionError) as error:
            raise DataError(f"{beside}: not readable as a JSON object", found=error) from error
        token = named.get("content") if isinstance(named, dict) else named
        if isinstance(token, str):
            if token not in vocabulary:
                raise DataError(
                    f"{beside}: eos_token is not in the vocabulary of {file.name}",
                    found=repr(token),
                    allowed="a token of the vocabulary",
                )
            return vocabulary[token]
    return next((vocabulary[token] for token in END_OF_DOCUMENT if token in vocabulary), None)


def _flatten(sequences: Sequence[Sequence[int]]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    lengths = np.fromiter(map(len, sequences), dtype=np.int64, count=len(sequences))
    ids = np.empty(int(lengths.sum()), dtype=np.int32)
    end = 0
    for sequence in sequences:
        start, end = end, end + len(sequence)
        ids[start:end] = sequence
    return ids, lengths
