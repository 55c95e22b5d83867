"""JSON lines: the fast path equals the exact one on anything, and every bad line is told in full."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megads.data.chat import open_template
from megads.data.documents import Found, Texts
from megads.data.json_line import JsonLineReader
from megads.data.line import LineBlock
from megads.data.record import BadRecord, RecordOptions

OPTIONS = (
    RecordOptions(),
    RecordOptions(key="a.b"),
    RecordOptions(key="a.b.c"),
    RecordOptions(columns=("text", "x"), separator=" + "),
    RecordOptions(columns=("a.b", "text", "a.c")),
    RecordOptions(max_document_bytes=24),
    RecordOptions(min_bytes=2, max_bytes=4),
)
# fmt: off
KEYS = ('"text"', '"text"', '"text"', '"a"', '"x"', '"b"', '"te\\u0078t"', '"text\\u0000"', '""', "text", '"t')
VALUES = (
    '"ok"', '"ok"', '"ok"', '"é你"', '"\\u00e9"', '"\\ud83d\\ude00"', '"\\ud800"', '"\\udc00"', '"\\ud800\\u0041"',
    '"\x7f"', '"\\u0000"', '"\0"', '"\t"', '"\\q"', '""', '"a\\nb"', '"Inf}"', '"NaN,"', '"} null {"', "null", "true",
    "3", "-1.5e3", "1e999", "01", "1.", "-", "NaN", "-NaN", "Inf", "-Inf", "Infinity", "-Infinity", "[]", "{}",
    '[1,{"text":"z"}]', '{"b":"x"}', '{"b":null}', '{"b":"x","b":"y"}', '{"b":3}', '{"c":1}', '{"b":{"c":"deep"}}',
    '{"b":"x","c":"y"}', "[" * 1500 + "]" * 1500, '{"a":' * 1200 + "1" + "}" * 1200, "9" * 5000,
)
TAILS = (
    "", "", "", "", "", "", "\r", " ", "\t", " null", " {}", '{"text":"b"}', ",", "]", "}", "junk", "\x0b", "\0", " 3",
    ' null {"text":"b"}', ',{"text":"b"}', "//",
)
WHOLE = (
    "", "", "  ", "\r", "\t\r", "null", "true", "[]", '"a"', "{", "}", "{}", "NaN", '\ufeff{"text":"a"}',
    '{"text":', '"z"}', '"c":1}', '{"text":"a","x":[1,', "2]}", '{"text":"good"}', '{"text":"good"}',
)
# fmt: on


@st.composite
def nasty_lines(draw: st.DrawFn) -> bytes:
    """A line that is valid, nearly valid, or neither."""
    if draw(st.integers(0, 3)) == 0:
        return draw(st.sampled_from(WHOLE)).encode("utf-8")
    members = draw(st.lists(st.tuples(st.sampled_from(KEYS), st.sampled_from(VALUES)), max_size=3))
    line = "{" + ", ".join(f"{key}: {value}" for key, value in members) + "}" + draw(st.sampled_from(TAILS))
    content = line.encode("utf-8")
    if draw(st.integers(0, 7)) == 0:
        at = draw(st.integers(0, len(content)))
        rest = at + draw(st.integers(0, 1))
        bad = draw(
            st.sampled_from((b"\xff", b"\xc3", b"\xed\xa0\x80", b"\n", b'"', b"{", b"}", b"\\", b"", b"\0"))
        )
        content = content[:at] + bad + content[rest:]
    return content


class ExactReader(JsonLineReader):
    """Never asks Arrow for a block."""

    def _read_fast(self, lines: object, whys: object) -> Texts | None:
        return None


def shown(found: Found) -> tuple[object, ...]:
    texts = found.texts
    return texts.texts.to_pylist(), texts.records.tolist(), found.bad, found.num_filtered, found.num_records


@settings(max_examples=400, deadline=None)
@given(st.lists(nasty_lines(), min_size=1, max_size=5), st.sampled_from(OPTIONS), st.booleans())
def test_fast_equals_exact(lines: list[bytes], options: RecordOptions, is_ended: bool) -> None:
    content = b"\n".join(lines) + b"\n" * is_ended
    if not content:
        return
    block = LineBlock(content, offset=7)
    fast = JsonLineReader(0, options).read(block, 3)
    assert shown(fast) == shown(ExactReader(0, options).read(block, 3))
    one_by_one = [
        document
        for line in content.split(b"\n")
        if line
        for document in JsonLineReader(0, options).read(LineBlock(line, 0), 0).texts.texts.to_pylist()
    ]
    assert fast.texts.texts.to_pylist() == one_by_one


@pytest.mark.parametrize(
    ("content", "texts", "num_bad"),
    [
        (
            b'{"text":"a"}{"text":"b","x":\n{}}',
            [],
            2,
        ),  # two rows on two lines, but one object goes over the line end
        (b'{"text":"a"}{"text":"b"}\n{"text":\n"c"}', [], 3),
        (b'{"text":"a","x":\n{}}', [], 2),
        (b'{"text":"a","x":null}\n{"text":null,"x":"b"}\n{"text":"c","x":"d"}', ["a", "c"], 1),
        (b'null\n{"text":"a"}', ["a"], 1),  # would crash Arrow 26
    ],
)
def test_what_arrow_alone_would_take_otherwise(content: bytes, texts: list[str], num_bad: int) -> None:
    for options in (RecordOptions(), RecordOptions(columns=("text", "x"))):
        fast = JsonLineReader(0, options).read(LineBlock(content, 0), 0)
        assert shown(fast) == shown(ExactReader(0, options).read(LineBlock(content, 0), 0))
        if not options.columns:
            assert (fast.texts.texts.to_pylist(), len(fast.bad)) == (texts, num_bad)


def test_the_fast_path_is_taken_where_it_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blank lines, CRLF, indentation, unread values of any kind and nulls do not slow a block down."""
    seen = []
    monkeypatch.setattr(JsonLineReader, "_add", lambda self, gatherer, number, *, line: seen.append(line))
    content = (
        b'{"text": "a", "meta": [NaN, Inf, {"text": 1}]}\r\n\n \r\n  {"id": 9, "text": "b\\ud83d\\ude00"} \n'
        b'{"text": null}\n{"text": "\xe4\xbd\xa0"}'
    )
    found = JsonLineReader(0, RecordOptions()).read(LineBlock(content, 0), 0)
    assert found.texts.texts.to_pylist() == ["a", "b😀", "你"]
    assert found.texts.records.tolist() == [0, 3, 5]
    assert seen == [b'{"text": null}']


BAD_LINES = {
    b'{"text": "cut': "not JSON (Unterminated string starting at column 10)",
    b"plain text": "not JSON (Expecting value at column 1)",
    b'{"text": "a"} {"text": "b"}': "not JSON (Extra data at column 15)",
    b'{"text": "a"}{"text": "b"}': "not JSON (Extra data at column 14)",
    b'{"text": "a"} null {"text": "b"}': "not JSON (Extra data at column 15)",
    b'{"text": "a",}': "not JSON (Expecting property name enclosed in double quotes at column 14)",
    b'{"text": "tab\there"}': "not JSON (Invalid control character at column 14)",
    b'{"text": "nul\x00"}': "not JSON (Invalid control character at column 14)",
    b'{"text": "\\q"}': "not JSON (Invalid \\escape at column 11)",
    b'["a"]': "an array, not an object",
    b'"a"': "a string, not an object",
    b"3": "a number, not an object",
    b"true": "a boolean, not an object",
    b"null": "null, not an object",
    b"{}": "no key 'text' (keys: none)",
    b'{"txt": "a", "Text": "b"}': "no key 'text' (keys: 'txt', 'Text')",
    b'{"text": null}': "the value of 'text' is null, not text",
    b'{"text": 3.5}': "the value of 'text' is a number, not text",
    b'{"text": false}': "the value of 'text' is a boolean, not text",
    b'{"text": ["a"]}': "the value of 'text' is an array, not text",
    b'{"text": {"a": "b"}}': "the value of 'text' is an object, not text",
    b'{"text": "a\\ud800"}': "the value of 'text' holds half of a surrogate pair (character 1)",
    b'{"text": "\\udc00\\ud800"}': "the value of 'text' holds half of a surrogate pair (character 0)",
    b'{"text": "\xff\xfe"}': "not UTF-8 (byte 11 of the line)",
    b'{"text": "a", "unread": "\xed\xa0\x80"}': "not UTF-8 (byte 26 of the line)",
    b"[" * 100_000: "not JSON, or nested too deeply",
    b"\x00": "not JSON (Expecting value at column 1)",
    b"\x0b": "not JSON (Expecting value at column 1)",
    '{"text": "a"}'.encode("utf-16-le"): (
        "not JSON (Expecting property name enclosed in double quotes at column 2)"
    ),
    b'{"text": "' + b"x" * 1000 + b'"}': (
        "a line of 1012 bytes, above the limit of 1000 (cut it, or raise --max-document-bytes)"
    ),
}


@pytest.mark.parametrize("line", BAD_LINES, ids=range(len(BAD_LINES)))
@pytest.mark.parametrize("reader", [JsonLineReader, ExactReader])
def test_a_bad_line_is_told_and_the_rest_is_kept(line: bytes, reader: type[JsonLineReader]) -> None:
    limit = 1000 if line.startswith(b'{"text": "xxx') else 1 << 20
    content = b'{"text": "before"}\n' + line + b'\n\n{"text": "after"}'
    found = reader(4, RecordOptions(max_document_bytes=limit)).read(LineBlock(content, 1000), 50)
    assert found.texts.texts.to_pylist() == ["before", "after"]
    assert found.texts.records.tolist() == [50, 53]
    assert found.bad == (BadRecord(4, 51, 1019, BAD_LINES[line], line[:80]),)
    assert found.num_records == 4


def test_documents_are_json_s_values() -> None:
    texts = ["a\r\nb", "\0", "\x7f\u2028", "😀é你", '"\\/', "", " ", "x" * 100_000, "\ufeffa"]
    whole = [json.dumps({"text": text}, ensure_ascii=i % 2 == 0) for i, text in enumerate(texts)]
    content = "\n".join(f'{line[:-1]}, "n": {"9" * 5000}}}' for line in whole).encode("utf-8")
    for reader in (JsonLineReader, ExactReader):
        found = reader(0, RecordOptions()).read(LineBlock(content, 0), 0)
        assert found.texts.texts.to_pylist() == texts
        assert not found.bad


def test_keys_go_down_and_columns_are_joined() -> None:
    content = b"""{"a.b": "flat", "a": {"b": "deep"}, "t": "title"}
        {"a": {"c": "x"}, "t": "title"}
        {"a": "text", "t": "title"}
        {"a": null, "t": "title"}
    """

    def read(options: RecordOptions) -> tuple[object, list[str]]:
        found = JsonLineReader(0, options).read(LineBlock(content, 0), 0)
        return found.texts.texts.to_pylist(), [bad.why for bad in found.bad]

    texts, whys = read(RecordOptions(key="a.b"))
    assert texts == ["deep"]
    assert whys == [
        "no key 'b' in 'a' (keys: 'c')",
        "no key 'b' in 'a', which is a string, not an object",
        "no key 'b' in 'a', which is null, not an object",
    ]
    assert read(RecordOptions(key="a\\.b"))[0] == ["flat"]
    assert read(RecordOptions(columns=("t", "a.b"), separator=" | "))[0] == ["title | deep"]


def test_filters_count_and_limits_are_told() -> None:
    content = b"".join(json.dumps({"text": "x" * size}).encode() + b"\n" for size in (0, 1, 2, 3, 9))
    found = JsonLineReader(0, RecordOptions(min_bytes=1, max_bytes=2)).read(LineBlock(content, 0), 0)
    assert found.texts.texts.to_pylist() == ["x", "xx"]
    assert (found.num_filtered, found.bad) == (3, ())
    joined = RecordOptions(columns=("text", "text2"), max_document_bytes=40, separator="-" * 40)
    (bad,) = JsonLineReader(0, joined).read(LineBlock(b'{"text": "a", "text2": "b"}', 5), 0).bad
    assert bad.why.startswith("a document of 42 bytes, above the limit of 40")
    assert (bad.offset, bad.head) == (5, b'{"text": "a", "text2": "b"}')


def test_conversations_keep_their_texts_together() -> None:
    lines = [
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a" * n}]}
        for n in (1, 5)
    ]
    content = "\n".join(map(json.dumps, lines)).encode() + b'\n{"messages": []}'
    options = RecordOptions(template=open_template("plain"), max_bytes=4)
    found = JsonLineReader(0, options).read(LineBlock(content, 0), 0)
    texts = found.texts
    assert texts.texts.to_pylist() == ["q", "\n", "a"]
    assert texts.num_texts is not None
    assert texts.num_texts.tolist() == [3]
    assert texts.is_counted is not None
    assert texts.is_counted.tolist() == [False, False, True]
    assert texts.is_template is not None
    assert texts.is_template.tolist() == [False, True, False]
    assert found.num_filtered == 1
    assert [bad.why for bad in found.bad] == ["the value of 'messages' holds no messages"]
