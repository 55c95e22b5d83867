"""A folder of nasty files: what each holds, the texts in it, and all that is to be said about the rest.

`LIMIT` bytes are the most that a line or document may have here.
"""

from __future__ import annotations

import gzip
import json

import pyarrow

LIMIT = 1000


def zstd(content: bytes) -> bytes:
    target = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(target, "zstd") as stream:
        stream.write(content)
    return bytes(target.getvalue())


def line(text: str) -> bytes:
    return json.dumps({"text": text}, ensure_ascii=False).encode("utf-8") + b"\n"


MANY = b"".join(line(f"number {i}") for i in range(3000))
TRUNCATED = gzip.compress(MANY, 9)[:-100]
LINES = line("a") + line("b")
# name -> content, texts, messages
NASTY: dict[str, tuple[bytes, list[str], list[str]]] = {
    "a_plain.jsonl": (LINES, ["a", "b"], []),
    "b_mark.jsonl": (b"\xef\xbb\xbf" + LINES, ["a", "b"], []),
    "c_crlf.jsonl": (LINES.replace(b"\n", b"\r\n"), ["a", "b"], []),
    "d_blank.json": (b"\n \t\r\n" + line("a") + b"\n\n" + line("b") + b"  ", ["a", "b"], []),
    "e_open_end.jsonl": (LINES[:-1], ["a", "b"], []),
    "f_unicode.jsonl": (
        b'{"text": "\\u00e9 \xc3\xa9 \\ud83d\\ude00 \\u0000 a\\r\\nb"}\n',
        ["é é 😀 \0 a\r\nb"],
        [],
    ),
    "g_empty.jsonl": (b"", [], []),
    "h_only_blank.jsonl": (b"\n\n\r\n", [], []),
    "i_cut.jsonl": (
        LINES + b'{"text": "unfin',
        ["a", "b"],
        ["i_cut.jsonl:3 (byte 28): not JSON (Unterminated string starting at column 10)"],
    ),
    "j_types.jsonl": (
        b'{"text": null}\n{"txt": 1}\n' + line("a") + b"[]\nnull\n",
        ["a"],
        [
            "j_types.jsonl:1 (byte 0): the value of 'text' is null, not text",
            "j_types.jsonl:2 (byte 15): no key 'text' (keys: 'txt')",
            "j_types.jsonl:4 (byte 40): an array, not an object",
            "j_types.jsonl:5 (byte 43): null, not an object",
        ],
    ),
    "k_not_utf8.jsonl": (
        line("a") + b'{"text": "\xff"}\n' + line("b"),
        ["a", "b"],
        ["k_not_utf8.jsonl:2 (byte 14): not UTF-8 (byte 11 of the line)"],
    ),
    "l_surrogate.jsonl": (
        b'{"text": "\\ud800"}\r\n' + line("b"),
        ["b"],
        ["l_surrogate.jsonl:1 (byte 0): the value of 'text' holds half of a surrogate pair (character 0)"],
    ),
    "m_two_on_a_line.jsonl": (
        b'{"text": "a"}{"text": "b"}\n{"text": "c"\n}\n',
        [],
        [
            "m_two_on_a_line.jsonl:1 (byte 0): not JSON (Extra data at column 14)",
            "m_two_on_a_line.jsonl:2 (byte 27): not JSON (Expecting ',' delimiter at column 13)",
            "m_two_on_a_line.jsonl:3 (byte 40): not JSON (Expecting value at column 1)",
        ],
    ),
    "n_long.jsonl": (
        line("a") + line("x" * 3000) + line("b"),
        ["a", "b"],
        [
            "n_long.jsonl:2 (byte 14): a line of 3012 bytes, above the limit of 1000 "
            "(cut it, or raise --max-document-bytes)"
        ],
    ),
    "o_members.jsonl.gz": (gzip.compress(line("a")) + gzip.compress(line("b")), ["a", "b"], []),
    "p_frames.jsonl.zst": (zstd(LINES[:5]) + zstd(LINES[5:-1]), ["a", "b"], []),
    "q_bare.gz": (gzip.compress(b"\xef\xbb\xbf" + LINES), ["a", "b"], []),
    "r_truncated.json.gz": (
        gzip.compress(LINES)[:-8],
        ["a", "b"],
        [
            "r_truncated.json.gz:3 (byte 28 uncompressed): the archive is damaged here (Truncated compressed stream):"
            " all that follows is lost"
        ],
    ),
    "s_not_gzip.jsonl.gz": (
        LINES,
        [],
        [
            "s_not_gzip.jsonl.gz:1 (byte 0 uncompressed): the archive is damaged here (zlib inflate failed: "
            "incorrect header check): all that follows is lost"
        ],
    ),
    "t_empty.jsonl.zst": (
        b"",
        [],
        [
            "t_empty.jsonl.zst:1 (byte 0 uncompressed): the archive is damaged here (the file is empty):"
            " all that follows is lost"
        ],
    ),
    "u_text.txt": (b"\xef\xbb\xbfline\r\nline\n", ["line\r\nline\n"], []),
    "v_binary.txt": (b"a\x00b", [], ["v_binary.txt: not UTF-8 text"]),
    "w_latin.py": (b"# caf\xe9", [], ["w_latin.py: not UTF-8 text"]),
    "x_large.md": (
        b"x" * 1500,
        [],
        [
            "x_large.md: a document of 1500 bytes, above the limit of 1000 (cut it, or raise --max-document-bytes)"
        ],
    ),
    "y_packed.py.gz": (gzip.compress(b"def f(): pass\n"), ["def f(): pass\n"], []),
    "z_cut.txt.zst": (
        zstd(b"text" * 1000)[:-5],
        [],
        ["z_cut.txt.zst: the archive is damaged (Truncated compressed stream): the document is lost"],
    ),
}
