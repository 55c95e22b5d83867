"""Strings that an engine is tried on before it is trusted.

Lives here: text in many scripts, what tokenizers are known to disagree about, special text, and samples of the
vocabulary. Does not live here: the comparison (engine_choice).
"""

from __future__ import annotations

from collections.abc import Iterator

from megads.data.tokenizer import Tokenizer

NUM_VOCABULARY_PROBES = 96
PIECES_PER_PROBE = 48

LANGUAGES = (
    "The quick brown fox jumps over 13 lazy dogs, doesn't it? I'll say: \u201cyes\u201d \u2014 they've won.",
    "Fran\u00e7ois a d\u00e9j\u00e0 vu l\u2019\u0153uvre \u00e0 No\u00ebl; c\u2019est \u00e9tonnant\u2026",
    "F\u00fc\u00dfe, \u00c4rger und Stra\u00dfenbahnhaltestellenschild: 1.234,56 \u20ac",
    "\u00bfQu\u00e9 ser\u00e1 del ni\u00f1o ma\u00f1ana? \u00a1Vaya!",
    "\u0141\u00f3d\u017a, \u017c\u00f3\u0142\u0107, \u010de\u0161tina, \u0130stanbul, \u0131\u011fd\u0131r",
    "\u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440! \u0401\u043b\u043a\u0430.",
    "\u039a\u03b1\u03bb\u03b7\u03bc\u03ad\u03c1\u03b1 \u03ba\u03cc\u03c3\u03bc\u03b5",
    "\u4f60\u597d\uff0c\u4e16\u754c\u3002\u4eca\u5929\u662f2026\u5e7411\u670824\u65e5\u3002\u5e8a\u524d\u660e\u6708\u5149",
    "\u65e5\u672c\u8a9e\u306e\u30c6\u30ad\u30b9\u30c8\uff61\uff76\uff85",
    "\ud55c\uad6d\uc5b4 \ubb38\uc7a5\uc785\ub2c8\ub2e4.",
    "\u0645\u0631\u062d\u0628\u0627 \u0628\u0627\u0644\u0639\u0627\u0644\u0645 \u05e9\u05dc\u05d5\u05dd",
    "\u0939\u093f\u0928\u094d\u0926\u0940 \u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35 \u0ba4\u0bae\u0bbf\u0bb4\u0bcd",
    "def f(x: int) -> str:\n    return f'{x:>08.3f}'  # 100%\n\n\nclass A(B):\n\tpass\n",
    '#include <stdio.h>\nint main(void){ return printf("%d\\n", 0x7fff<<2); }\r\n',
    '{"a": [1, -2.5e-10, null], "b": "\\u00e9\\\\"}',
    "<p class='x'>&nbsp;</p> https://example.org/a?b=c&d=%20#e user@example.org C:\\dir\\file.txt",
    "$\\frac{1}{2}\\sum_{i=0}^{n} x_i^2$ \u2200x\u2208\u211d: x\u00b2\u22650",
)
"""Text as it is, in many scripts."""

ODDITIES = (
    "", " ", "  ", "\n", "\r\n\r\n", "\t\t", "\x00", "\x00\x01\x02\x1f\x7f\x80\x9f", "\x0b\x0c\x1c\x1d\x85",
    "\u00a0\u2002\u2003\u2009\u200a\u202f\u205f\u3000", "\u200b\u200c\u200d\u2060\ufeff", "\u2028\u2029", "\u180e",
    "e\u0301 \u00e9 A\u030a \u00c5 \u212b \u1e9b\u0323", "\ufb01\ufb03 \u2460 \uff21 \u00bd \u2163 \u33a1",
    "\uac00 \u1100\u1161 \u1112\u1161\u11ab",
    "a\u0300\u0301\u0302\u0303" * 9, "\u0130i\u0307 \u1e9e\u00df \u017f\u212a",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea \U0001f44d\U0001f3fd \u2764\ufe0f",
    "\U0001d49c\U0001d7d8\U00020000\U0002f800\U000e0001\U0010ffff", "\ue000\ufdd0\ufffe\uffff\ufffd",
    "0", "00", "007", "1234567890123456789012345678901234567890",
    "3.14 1,000,000 1e-9 0b101 \u0663\u0664\u0665 \u00b2\u00b3",
    "'s 'S 't 'T 're 'RE 've 'm 'll 'd 'D '' '\u2019s \u2019ll", "I'M you'LL we'Ve 'tis don't\u2019t",
    "a b  c   d    e     f      g       h        i", "x\n\n\n\ny\n \n\t\n z", " lead", "trail ", "trail\n",
    "\n lead", "a \n b",
    "!!!!!!!! ?!?! ... ---- ==== ____ ~~~~ ////", "a_b-c.d,e;f:g", "camelCaseHTTPRequest2XML",
    "ALLCAPS lower MiXeD",
    "\u2581", "\u2581\u2581a \u2581", " \u2581 ", "\u0120\u010a\u00c4\u0142", "<0x0A><0x00>", "</", "<|", "|>",
    "<s", "s>",
)  # fmt: skip
"""What tokenizers disagree about."""


def probes(tokenizer: Tokenizer) -> Iterator[str]:
    """Some hundred strings: real, odd, full of special text, long, and out of the vocabulary."""
    yield from LANGUAGES
    yield from ODDITIES
    yield from (
        " ".join(LANGUAGES),
        "".join(LANGUAGES),
        "".join(ODDITIES),
        "\n".join((*ODDITIES, *LANGUAGES)),
    )
    yield from (text.swapcase() for text in LANGUAGES)
    for text in tokenizer.control_tokens:
        yield from (
            text,
            f"a{text}b",
            f"a {text} b",
            f" {text}\n{text}{text} ",
            text[:-1],
            text.upper(),
            text[1:],
        )
    for size in (31, 1500):
        yield from (
            " " * size,
            "a" * size,
            "ab" * size,
            "\u4f60" * size,
            "7" * size,
            "\n" * size,
            " \t" * size,
        )
        yield from (f"x{' ' * size}y", "\U0001f600" * size, "=" * size, "xY9_" * size, "e\u0301" * size)
    step = max(1, tokenizer.vocab_size // NUM_VOCABULARY_PROBES)
    for number, start in enumerate(range(0, tokenizer.vocab_size, step)):
        stop = min(start + PIECES_PER_PROBE, tokenizer.vocab_size)
        yield ("", " ")[number % 2].join(tokenizer.decode([i]) for i in range(start, stop))
