"""A manifest is refused if one bit is wrong and, however well signed, before it costs memory."""

from __future__ import annotations

import json
import random
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megads.checkpoint.manifest import (
    DamageError,
    cover_problem,
    decode,
    encode,
    hash_bytes,
)
from megads.checkpoint.reader import open_step
from megads.checkpoint.save import save
from megads.errors import CheckpointError
from megads.parallel.control import Control
from megads.parallel.shard import Box
from tests.checkpoint.samples import random_boxes, small_state, whole


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = save(
        tmp_path_factory.mktemp("run"),
        1,
        pieces=whole(small_state()),
        objects={"text": "ü", "rate": 1e-05},
        control=Control(0, 1),
    )
    return (path / "manifest.json").read_bytes()


def sign(tree: Any) -> bytes:
    """What an attacker writes who knows the format."""
    text = tree if isinstance(tree, str) else json.dumps(tree, sort_keys=True, separators=(",", ":"))
    body = text[:-1].encode() + b",\n"
    return body + b'"blake3": "' + hash_bytes(body).encode() + b'"}\n'


def tree_of(data: bytes) -> dict[str, Any]:
    tree: dict[str, Any] = json.loads(data)
    del tree["blake3"]
    return tree


def test_encoding_is_one_json_text_that_round_trips(data: bytes) -> None:
    manifest = decode(data, where="m")
    assert encode(manifest) == data
    assert sign(tree_of(data)) == data
    assert json.loads(data)["step"] == 1


def test_any_flipped_bit_and_any_cut_is_refused(data: bytes) -> None:
    rng = random.Random(0)
    for index in range(len(data)):
        damaged = bytearray(data)
        damaged[index] ^= 1 << rng.randrange(8)
        with pytest.raises(DamageError):
            decode(damaged, where="m")
        with pytest.raises(DamageError):
            decode(data[:index], where="m")
    for extra in (b"\n", b" ", b"\0" * 512):
        with pytest.raises(DamageError):
            decode(data + extra, where="m")


def on_tensor(change: Callable[[dict[str, Any]], object]) -> Callable[[dict[str, Any]], object]:
    return lambda tree: change(tree["tensors"]["model/w"])


def on_chunk(**values: Any) -> Callable[[dict[str, Any]], object]:
    return lambda tree: tree["tensors"]["model/w"]["chunks"][0].update(values)


def rename_file(name: str) -> Callable[[dict[str, Any]], object]:
    def change(tree: dict[str, Any]) -> None:
        tree["files"] = {name: tree["files"].popitem()[1]}
        for entry in tree["tensors"].values():
            for chunk in entry["chunks"]:
                chunk["file"] = name

    return change


HOSTILE: dict[str, Callable[[dict[str, Any]], object]] = {
    "path upwards": rename_file("../outside.bin"),
    "absolute path": rename_file("/etc/passwd"),
    "folder": rename_file("a/b.bin"),
    "dot": rename_file("."),
    "dots": rename_file(".."),
    "empty": rename_file(""),
    "null byte": rename_file("a\0b"),
    "new line": rename_file("a.bin\n"),
    "option": rename_file("-rf"),
    "manifest itself": rename_file("manifest.json"),
    "long name": rename_file("a" * 300),
    "unknown file": on_chunk(file="other.bin"),
    "file not a text": on_chunk(file=3),
    "offset past the end": on_chunk(offset=1 << 40),
    "negative offset": on_chunk(offset=-1),
    "overlap in the file": on_chunk(offset=1),
    "offset a float": on_chunk(offset=1.0),
    "offset a bool": on_chunk(offset=True),
    "size off by one": on_chunk(size=95),
    "box outside": on_chunk(stop=[7, 4]),
    "box smaller": on_chunk(stop=[5, 4]),
    "box turned": on_chunk(start=[6, 4], stop=[0, 0]),
    "box of other dims": on_chunk(start=[0], stop=[24]),
    "hash not hex": on_chunk(blake3="z" * 64),
    "hash short": on_chunk(blake3="00"),
    "extra key": on_chunk(code="x"),
    "chunk twice": on_tensor(lambda t: t["chunks"].append(t["chunks"][0])),
    "no chunk": on_tensor(lambda t: t["chunks"].clear()),
    "huge shape": on_tensor(lambda t: t.update(shape=[1 << 40, 1 << 40])),
    "huge dim": on_tensor(lambda t: t.update(shape=[10**30, 4])),
    "negative dim": on_tensor(lambda t: t.update(shape=[-6, -4])),
    "many dims": on_tensor(lambda t: t.update(shape=[1] * 60)),
    "unknown dtype": on_tensor(lambda t: t.update(dtype="object")),
    "dtype that is code": on_tensor(lambda t: t.update(dtype="__class__")),
    "tensor name": lambda t: t["tensors"].update({"a\nb": {"shape": [], "dtype": "int8", "chunks": []}}),
    "step negative": lambda t: t.update(step=-1),
    "step a text": lambda t: t.update(step="1"),
    "no objects": lambda t: t.pop("objects"),
    "objects a list": lambda t: t.update(objects=[]),
    "other format": lambda t: t.update(format="zip"),
    "version 0": lambda t: t.update(version=0),
    "file size": lambda t: t["files"]["chunks-00000.bin"].update(size=1 << 50),
    "file without chunks": lambda t: t["files"].update({"x.bin": {"size": 5, "blake3": "0" * 64}}),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_well_signed_lie_is_refused_before_it_costs_memory(data: bytes, name: str) -> None:
    tree = tree_of(data)
    HOSTILE[name](tree)
    signed = sign(tree)
    tracemalloc.start()
    try:
        with pytest.raises(DamageError, match="not a manifest"):
            decode(signed, where="m")
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000 + "]" * 100_000,
        '{"a":' * 100_000 + "1" + "}" * 100_000,
        '{"step":1' + "0" * 10_000 + "}",
        '{"step":NaN}',
        '{"step":1,"step":2}',
        "{}",
        "[1]",
        '"text"',
    ],
)
def test_odd_json_is_refused(text: str) -> None:
    with pytest.raises(DamageError):
        decode(sign(text), where="m")


def test_a_newer_version_is_no_damage(data: bytes) -> None:
    with pytest.raises(CheckpointError, match=r"written by a newer megads[\s\S]*format version 2") as caught:
        decode(sign(tree_of(data) | {"version": 2, "more": []}), where="m")
    assert not isinstance(caught.value, DamageError)


def test_a_step_under_another_steps_name_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, 1, pieces=whole(small_state()), objects={}, control=Control(0, 1))
    path.rename(tmp_path / "step-00000002")
    with pytest.raises(DamageError, match="of another step"):
        open_step(tmp_path / "step-00000002")
    (tmp_path / "step-00000002").rename(tmp_path / "kept")
    assert open_step(tmp_path / "kept").step == 1


def test_exact_cover_equals_counting() -> None:
    rng = random.Random(1)
    verdicts = set()
    for _ in range(400):
        shape = tuple(rng.randrange(1, 5) for _ in range(rng.randrange(4)))
        boxes = random_boxes(shape, rng)
        for _ in range(rng.randrange(3)):
            kind = rng.randrange(3)
            if kind == 0 and boxes:
                boxes.pop()
            elif kind == 1 and boxes:
                boxes.append(rng.choice(boxes))
            elif boxes and shape:
                box, dim = boxes.pop(), rng.randrange(len(shape))
                stop = list(box.stop)
                stop[dim] = rng.randrange(box.start[dim] + 1, shape[dim] + 1)
                boxes.append(Box(box.start, tuple(stop)))
        counts = np.zeros(shape, dtype=int)
        for box in boxes:
            counts[box.slices] += 1
        expected = bool((counts == 1).all())
        assert (cover_problem(shape, boxes) is None) == expected
        verdicts.add(expected)
    assert verdicts == {True, False}
