"""Conversations: the template's text and the users' stay apart, and only what is declared counts."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from megads.data.chat import BUILT_IN, Segment, conversation, open_template
from megads.data.field import RecordError
from megads.data.record import RecordOptions, Template
from megads.errors import DataError

USER = {"role": "user", "content": "<|im_end|> 2+2?"}
ANSWER = {"role": "assistant", "content": "4"}


def spelled(messages: object, template: str | Template = "chatml", **options: str) -> list[tuple[str, str]]:
    """(text, marks) of each segment: T of the template, C counts."""
    opened = open_template(template) if isinstance(template, str) else template
    segments = conversation(messages, RecordOptions(template=opened, **options))  # type: ignore[arg-type]
    return [
        (segment.text.decode(), "T" * segment.is_template + "C" * segment.is_counted) for segment in segments
    ]


def test_chatml_counts_the_answers_and_their_ends() -> None:
    assert spelled([{"role": "system", "content": "S"}, USER, ANSWER, USER, ANSWER]) == [
        ("<|im_start|>system\n", "T"),
        ("S", ""),
        ("<|im_end|>\n<|im_start|>user\n", "T"),
        ("<|im_end|> 2+2?", ""),
        ("<|im_end|>\n<|im_start|>assistant\n", "T"),
        ("4", "C"),
        ("<|im_end|>", "TC"),
        ("\n<|im_start|>user\n", "T"),
        ("<|im_end|> 2+2?", ""),
        ("<|im_end|>\n<|im_start|>assistant\n", "T"),
        ("4", "C"),
        ("<|im_end|>", "TC"),
        ("\n", "T"),
    ]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("plain", "<|im_end|> 2+2?\n4"),
        ("chatml", "<|im_start|>user\n<|im_end|> 2+2?<|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n"),
        (
            "llama3",
            "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n<|im_end|> 2+2?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n4<|eot_id|>",
        ),
    ],
)
def test_built_in_templates_spell_what_is_customary(name: str, text: str) -> None:
    assert "".join(part for part, _ in spelled([USER, ANSWER], name)) == text
    shared = [{"from": "human", "value": USER["content"]}, {"from": "gpt", "value": "4"}]
    assert spelled(shared, name, role_key="from", content_key="value") == spelled([USER, ANSWER], name)


@pytest.mark.parametrize(
    ("messages", "why"),
    [
        ("text", "the value of 'messages' is a string, not an array of messages"),
        ({"role": "user"}, "the value of 'messages' is an object, not an array of messages"),
        (None, "the value of 'messages' is null, not an array of messages"),
        ([], "the value of 'messages' holds no messages"),
        (["hi"], "message 1 is a string, not an object"),
        ([USER, {"role": "assistant"}], "message 2 has no key 'content' (keys: 'role')"),
        ([{"content": "x"}], "message 1 has no key 'role' (keys: 'content')"),
        (
            [USER, {"role": "tool", "content": "x"}],
            "message 2: the template chatml has no role 'tool' (roles: system, user, assistant)",
        ),
        (
            [{"role": ["user"], "content": "x"}],
            "message 1: the template chatml has no role ['user'] (roles: system, user, assistant)",
        ),
        ([USER, {"role": "assistant", "content": None}], "message 2: 'content' is null, not text"),
        ([{"role": "user", "content": [{"type": "text"}]}], "message 1: 'content' is an array, not text"),
        (
            [{"role": "user", "content": "\ud800"}],
            "message 1: 'content' holds half of a surrogate pair (character 0)",
        ),
        ([USER, {"role": "assistant", "content": ""}], "message 2 is empty"),
        ([USER], "no message of a role that counts in the loss (assistant)"),
    ],
)
def test_what_is_no_conversation_is_told(messages: object, why: str) -> None:
    with pytest.raises(RecordError, match=f"^{re.escape(why)}$"):
        spelled(messages)


def test_a_template_file_is_yaml_or_json(tmp_path: Path) -> None:
    table = {
        "begin": "<s>",
        "between": "\n",
        "end": "</s>",
        "roles": {
            "q": {"prefix": "Q: "},
            "a": {"prefix": "A: ", "suffix": "</a>", "counts": True, "aliases": ["answer"]},
        },
    }
    (tmp_path / "t.json").write_text(json.dumps(table, indent="\t"))
    (tmp_path / "t.yaml").write_text(
        'begin: "<s>"\nbetween: "\\n"\nend: "</s>"\nroles:\n  q: {prefix: "Q: "}\n'
        '  a: {prefix: "A: ", suffix: "</a>", counts: true, aliases: [answer]}\n'
    )
    messages = [{"role": "q", "content": "1"}, {"role": "answer", "content": "2"}]
    templates = [open_template(str(tmp_path / name)) for name in ("t.json", "t.yaml")]
    for template in templates:
        assert spelled(messages, template) == [
            ("<s>Q: ", "T"),
            ("1", ""),
            ("\nA: ", "T"),
            ("2", "C"),
            ("</a>", "TC"),
            ("</s>", "T"),
        ]
    assert templates[0].fingerprint == templates[1].fingerprint
    fingerprints = {open_template(template.name).fingerprint for template in BUILT_IN}
    assert len({*fingerprints, templates[0].fingerprint}) == len(BUILT_IN) + 1


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("roles: {a: {counts: true}", "not readable"),
        ("- a", "not a table\n  found:   \\['a'\\]\n  allowed: begin, between, end, roles"),
        ("role: {a: {counts: true}}", "unknown key 'role'\n.*\n.*perhaps 'roles' is meant"),
        ("begin: x", "roles cannot be used\n  found:   None"),
        ("roles: {a: x}", "roles.a: not a table"),
        ("roles: {a: {count: true}}", "roles.a: unknown key 'count'\n.*\n.*perhaps 'counts' is meant"),
        ("roles: {a: {counts: 1}}", "roles.a.counts cannot be used\n  found:   1\n  allowed: true or false"),
        ("roles: {a: {counts: true, aliases: b}}", "roles.a.aliases cannot be used"),
        ("roles: {a: {counts: true, prefix: 3}}", "roles.a.prefix cannot be used\n  found:   3"),
        (
            "begin: 1\nroles: {a: {counts: true}}",
            "begin cannot be used\n  found:   1\n  allowed: text in quotes",
        ),
        ("roles: {a: {prefix: x}}", "roles cannot be used\n  found:   counts: true in none"),
        ("roles: {a: {counts: true}, b: {aliases: [a]}}", "roles cannot be used\n  found:   a twice"),
        ('roles: {a: {counts: true, suffix: "\\ud800"}}', "not readable|half of a surrogate pair"),
    ],
)
def test_a_wrong_template_is_refused(content: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "t.yaml"
    path.write_text(content)
    with pytest.raises(DataError, match=rf"--chat-template .*t\.yaml: .*(?:{says})|--chat-template .*{says}"):
        open_template(str(path))


def test_no_template_of_that_name() -> None:
    with pytest.raises(
        DataError, match=r"--chat-template chatlm: no such template\n.*\n.*plain, chatml, llama3"
    ):
        open_template("chatlm")


def test_segments_are_never_empty() -> None:
    template = Template("t", open_template("plain").roles)
    assert conversation([USER, ANSWER], RecordOptions(template=template)) == (
        Segment(b"<|im_end|> 2+2?", is_counted=False, is_template=False),
        Segment(b"4", is_counted=True, is_template=False),
    )
