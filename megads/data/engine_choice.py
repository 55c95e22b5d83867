"""Which engine turns the text into ids: the self-check and the choice.

    auto                        gigatoken where it is installed and gives the ids of the reference for every string it
                                is tried on; otherwise the reference
    tokenizers, sentencepiece   the reference: what these libraries give is right by definition
    gigatoken                   the same as auto, but an error where it cannot be used

The strings are those of `probes` and the first documents of the job. Later on, sampled documents are compared again
(encode).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

from megads.data.engine import Engine, ReferenceEngine, first_different
from megads.data.fast_engine import GigatokenEngine, UnsuitableTokenizerError
from megads.data.probe import probes
from megads.data.tokenizer import SpecialTokens, Tokenizer
from megads.errors import DataError

EngineName = Literal["auto", "tokenizers", "sentencepiece", "gigatoken"]
ENGINES: tuple[EngineName, ...] = ("auto", "tokenizers", "sentencepiece", "gigatoken")


@dataclass(frozen=True, slots=True)
class Choice:
    """The engine that was chosen, and why, in words for the user."""

    engine: Engine
    reference: ReferenceEngine
    why: str

    @property
    def is_reference(self) -> bool:
        """Whether the engine defines what is right, so that there is nothing to compare it with."""
        return self.engine is self.reference


def choose_engine(
    tokenizer: Tokenizer, wanted: EngineName, *, special_tokens: SpecialTokens, samples: Iterable[str] = ()
) -> Choice:
    """The engine for `wanted`.

    Args:
        tokenizer: opened with the same `special_tokens`.
        wanted: a name out of `ENGINES`.
        special_tokens: what becomes of special text; the self-check holds the engine to it.
        samples: text of the job, tried beside the built-in strings.

    Raises:
        DataError: the engine asked for is not installed, not for this kind of tokenizer, or gives other ids.
    """
    reference = ReferenceEngine(tokenizer)
    if wanted == tokenizer.library:
        return Choice(reference, reference, "as asked")
    if wanted in ("tokenizers", "sentencepiece"):
        raise DataError(
            f"--engine {wanted}: not for this kind of tokenizer",
            found=f"a {tokenizer.kind} tokenizer",
            allowed=f"auto, {tokenizer.library}, gigatoken",
        )
    try:
        engine = _fast_engine(tokenizer, special_tokens)
        texts = (*probes(tokenizer), *samples)
        _check_equal(engine, reference, texts=texts)
    except UnsuitableTokenizerError as error:
        if wanted == "gigatoken":
            raise DataError(
                "--engine gigatoken: cannot be used", found=error, allowed=f"auto, {tokenizer.library}"
            ) from error
        return Choice(reference, reference, f"gigatoken is not used: {error}")
    return Choice(engine, reference, f"gave the ids of {reference.name} for {len(texts)} strings")


def _fast_engine(tokenizer: Tokenizer, special_tokens: SpecialTokens) -> GigatokenEngine:
    if find_spec("gigatoken") is None:
        raise UnsuitableTokenizerError('not installed; pip install "megads[fast]" is 10 to 20 times faster')
    return GigatokenEngine(tokenizer.file, parse_special_tokens=special_tokens == "parse")


def _check_equal(engine: Engine, reference: Engine, *, texts: Sequence[str]) -> None:
    import pyarrow

    array = pyarrow.array(texts, type=pyarrow.large_string())
    at = first_different(engine.encode(array), reference.encode(array))
    if at is not None:
        raise UnsuitableTokenizerError(
            f"its ids differ from those of {reference.name} for {texts[at][:60]!a}"
        )
