"""A SentencePiece BPE model as a `tokenizer.json`, so that the library `tokenizers` gives the same ids.

Lives here: the translation and its proof. Transformers translates such a model by itself, but not exactly: a text that
begins with a space gets no other one before it, and runs of spaces and text like `<unk>` are cut differently. So the
translation is made here and compared with SentencePiece on every piece and on texts full of spaces before it is given
out. Does not live here: using a tokenizer (tokenizer).

Both merge the neighbours whose union has the best score, leftmost first. SentencePiece looks the union up, `tokenizers`
ranks pairs: one merge for each way to split a piece. Pieces of equal score (the runs of spaces) must grow from the
left, so longer left parts come first.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megads.errors import DataError

if TYPE_CHECKING:
    import sentencepiece

SPACE = "\u2581"
"""How SentencePiece writes a space."""
PROBES = (
    "",
    " ",
    "a b  c   d    e",
    "  x\n\n    y\t\tz \n",
    "def f(x):\n        return x  # <s> </s> <unk>\n",
    "na\u00efve \u4f60\u597d\uff0c\u4e16\u754c \U0001f600 \ufb01 e\u0301 \u2581\u2581",
    "1234567890 3.14159 ===== !!!! ------",
    " " * 40 + "end" + " " * 17,
)


def tokenizer_json(file: Path) -> str:
    """The text of a `tokenizer.json` that is equal to the SentencePiece model in `file`.

    Raises:
        DataError: not readable, or of a kind that cannot be translated exactly (Unigram models, normalisation).
    """
    import sentencepiece
    import tokenizers

    engine = sentencepiece.SentencePieceProcessor(model_proto=file.read_bytes())
    text = json.dumps(_tree(engine), ensure_ascii=False)
    translated = tokenizers.Tokenizer.from_str(text)
    for probe in _probes(engine):
        if engine.encode(probe) != translated.encode(probe, add_special_tokens=False).ids:
            raise DataError(
                f"{file}: cannot be translated exactly into a tokenizer.json",
                found=f"other token ids for {probe[:60]!r}",
                allowed="a BPE model without text normalisation, as tools/train_tokenizer.py makes",
            )
    return text


def _tree(engine: sentencepiece.SentencePieceProcessor) -> dict[str, Any]:
    vocabulary = {engine.id_to_piece(i): i for i in range(engine.vocab_size())}
    unknown = engine.id_to_piece(engine.unk_id())
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": SPACE},
                {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unknown,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": _merges(engine, vocabulary),
        },
    }


def _merges(engine: sentencepiece.SentencePieceProcessor, vocabulary: dict[str, int]) -> list[str]:
    """Every way to put a piece together from two others, best first."""
    usable = {
        piece: engine.get_score(i)
        for piece, i in vocabulary.items()
        if not (engine.is_control(i) or engine.is_unknown(i) or engine.is_byte(i) or engine.is_unused(i))
    }
    found = [
        (-score, -end, piece[:end], piece[end:])
        for piece, score in usable.items()
        for end in range(1, len(piece))
        if piece[:end] in usable and piece[end:] in usable
    ]
    return [f"{left} {right}" for _, _, left, right in sorted(found)]


def _probes(engine: sentencepiece.SentencePieceProcessor) -> Iterator[str]:
    yield from PROBES
    pieces = [engine.id_to_piece(i).replace(SPACE, " ") for i in range(engine.vocab_size())]
    yield from (" ".join(pieces[start : start + 64]) for start in range(0, len(pieces), 64))
    yield from ("".join(pieces[start : start + 64]) for start in range(0, len(pieces), 64))
