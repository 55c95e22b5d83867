"""Name tables, safetensors files out and in; every hostile file is refused by name and nothing outside is read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megads.checkpoint import hf
from megads.checkpoint.foreign import Values
from megads.checkpoint.hf import Weights, check_names, write_weights
from megads.checkpoint.hf_names import Entry, Row, grouped, match
from megads.checkpoint.proof import prove
from megads.checkpoint.store import Store
from megads.errors import CheckpointError
from megads.parallel.shard import Cut, ShardSpec

pytest.importorskip("safetensors")
ROWS = (
    Row("layers.*.qkv.weight", ("h.*.q", "h.*.k", "h.*.v")),
    Row("layers.*.up.weight", ("h.*.up",), is_transposed=True),
    Row("norm.weight", ("norm",)),
)
DECLARED = {
    "layers.0.qkv.weight": ShardSpec((8, 3), (Cut(0, "tp", (4, 2, 2)),)),
    "layers.0.up.weight": ShardSpec((5, 3), (Cut(0, "tp", (5,)),)),
    "layers.11.qkv.weight": ShardSpec((8, 3), (Cut(0, "tp", (4, 2, 2)),)),
    "layers.11.up.weight": ShardSpec((5, 3), (Cut(0, "tp", (5,)),)),
    "norm.weight": ShardSpec((3,)),
}
ENTRIES = match(ROWS, DECLARED)
VALUES = {
    name: torch.randn(spec.shape, generator=torch.Generator().manual_seed(i))
    for i, (name, spec) in enumerate(DECLARED.items())
}


def read(entry: Entry) -> torch.Tensor:
    return VALUES[entry.name][entry.box.slices]


def tensors(read: Callable[[Entry], torch.Tensor], dtype: torch.dtype = torch.float32) -> dict[str, Values]:
    """All of Hugging Face's tensors, unread."""
    return {
        e.foreign: Values.of_whole(e.shape, dtype, whole=lambda e=e: e.to_foreign(read(e)))  # type: ignore[misc]
        for e in ENTRIES
    }


def written(directory: Path, max_bytes: int = 1 << 20) -> Path:
    directory.mkdir()
    write_weights(directory, tensors(read), max_shard_bytes=max_bytes, store=Store())
    return directory


def test_parts_follow_the_declaration() -> None:
    by_name = {entry.foreign: entry for entry in ENTRIES}
    assert list(by_name) == [
        "h.0.q",
        "h.0.k",
        "h.0.v",
        "h.0.up",
        "h.11.q",
        "h.11.k",
        "h.11.v",
        "h.11.up",
        "norm",
    ]
    k = by_name["h.11.k"]
    assert (k.name, k.box.start, k.box.stop) == ("layers.11.qkv.weight", (4, 0), (6, 3))
    assert by_name["h.0.up"].shape == (3, 5)
    with pytest.raises(CheckpointError, match=r"layers\.\*\.down \(2\)"):
        match(ROWS, DECLARED | {f"layers.{n}.down": ShardSpec((3,)) for n in range(2)})


def check_bits(weights: Weights, expected: Callable[[Entry], torch.Tensor]) -> None:
    """Every written tensor is what it was made of, bit for bit."""

    def values(tensor: torch.Tensor) -> Values:
        return Values.of_whole(tuple(tensor.shape), tensor.dtype, whole=lambda: tensor)

    prove((e.foreign, values(e.to_foreign(expected(e))), values(weights.tensor(e.foreign))) for e in ENTRIES)


@pytest.mark.parametrize("max_bytes", [1 << 20, 100, 1])
def test_the_library_reads_what_is_written(max_bytes: int, tmp_path: Path) -> None:
    import safetensors.torch

    directory = written(tmp_path / "out", max_bytes)
    files = sorted(directory.glob("*.safetensors"))
    found: dict[str, torch.Tensor] = {}
    for file in files:
        found |= safetensors.torch.load_file(file)
        assert int.from_bytes(file.read_bytes()[:8], "little") % 8 == 0
    assert (len(files) == 1) == (max_bytes == 1 << 20) == (not (directory / hf.INDEX_NAME).exists())
    assert len(files) == 9 or max_bytes > 1
    assert torch.equal(found["h.11.v"], VALUES["layers.11.qkv.weight"][6:])
    assert torch.equal(found["h.0.up"], VALUES["layers.0.up.weight"].t())
    weights = Weights(directory)
    check_names(ENTRIES, weights)
    check_bits(weights, read)


@pytest.mark.parametrize("dtype", hf.FORMAT_DTYPES.values(), ids=str)
def test_every_dtype_keeps_its_bits(dtype: torch.dtype, tmp_path: Path) -> None:
    odd = {name: (values * 1e-3).to(dtype) for name, values in VALUES.items()}
    odd["norm.weight"] = torch.tensor([float("nan"), -0.0, float("inf")], dtype=dtype)

    def values(entry: Entry) -> torch.Tensor:
        return odd[entry.name][entry.box.slices]

    write_weights(tmp_path, tensors(values, dtype), max_shard_bytes=200, store=Store())
    check_bits(Weights(tmp_path), values)
    odd["norm.weight"] = torch.tensor([float("nan"), 0.0, float("inf")], dtype=dtype)  # only the sign of zero
    with pytest.raises(CheckpointError, match="norm"):
        check_bits(Weights(tmp_path), values)


def test_one_tensor_is_in_memory_at_a_time(tmp_path: Path) -> None:
    log: list[str] = []

    class Logged(Store):
        def write(self, handle: int, data: Any) -> int:
            log.append("write")
            return super().write(handle, data)

    def logged(entry: Entry) -> torch.Tensor:
        log.append("read")
        return read(entry)

    write_weights(tmp_path, tensors(logged), max_shard_bytes=1 << 20, store=Logged())
    assert log == ["write"] + ["read", "write"] * len(ENTRIES)


def test_names_are_grouped_by_what_is_wrong(tmp_path: Path) -> None:
    weights = Weights(written(tmp_path / "out"))
    more = DECLARED | {"layers.3.up.weight": ShardSpec((5, 3)), "norm.weight": ShardSpec((4,))}
    del more["layers.11.qkv.weight"]
    with pytest.raises(CheckpointError) as told:
        check_names(match(ROWS, more), weights)
    assert "1 missing: h.*.up" in str(told.value)
    assert "3 unexpected: h.*.k, h.*.q, h.*.v" in str(told.value)
    assert "1 misshapen: norm (3,) for (4,)" in str(told.value)
    assert grouped(["a.0.b", "a.1.b", "c"]) == "a.*.b (2), c"


def file_of(header: object, data: bytes = b"\0" * 8, *, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def tensor(shape: object = (2,), offsets: object = (0, 8), dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


BROKEN_FILES = {
    "empty": b"",
    "cut in the length": b"\1\0\0",
    "length beyond the file": file_of({"a": tensor()}, length=1 << 20),
    "length of 2^63": file_of({"a": tensor()}, length=(1 << 64) - 1),
    "header above 100 MB": file_of(b"{" + b" " * 100_000_001),
    "not JSON": file_of(b"{nonsense"),
    "a list": file_of([1]),
    "deep": file_of(b"[" * 100_000),
    "cut data": file_of({"a": tensor()}, b"\0" * 7),
    "more data": file_of({"a": tensor()}, b"\0" * 9),
    "overlap": file_of({"a": tensor(), "b": tensor()}),
    "hole": file_of({"a": tensor(), "b": tensor((2,), (12, 20))}, b"\0" * 20),
    "past the end": file_of({"a": tensor((4,), (0, 16))}),
    "backwards": file_of({"a": tensor((2,), (8, 0))}),
    "negative": file_of({"a": tensor((-2,), (0, 8))}),
    "product overflows": file_of({"a": tensor((1 << 33, 1 << 33), (0, 8))}),
    "shape and bytes differ": file_of({"a": tensor((3,), (0, 8))}),
    "unknown dtype": file_of({"a": tensor(dtype="F13")}),
    "pickle": b"\x80\x02}q\0.",
}


@pytest.mark.parametrize("content", BROKEN_FILES.values(), ids=BROKEN_FILES)
def test_a_broken_file_is_refused_by_name(content: bytes, tmp_path: Path) -> None:
    (tmp_path / hf.SINGLE_NAME).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        Weights(tmp_path)


def test_the_broken_files_are_broken_in_one_thing(tmp_path: Path) -> None:
    (tmp_path / hf.SINGLE_NAME).write_bytes(file_of({"a": tensor()}))
    assert Weights(tmp_path).tensor("a").tolist() == [0.0, 0.0]


def index(weight_map: object) -> Callable[[Path], None]:
    return lambda directory: (directory / hf.INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))  # type: ignore[return-value]


@pytest.mark.parametrize(
    "place",
    [
        "../secret.safetensors",
        "/etc/secret.safetensors",
        "a/b.safetensors",
        "model.bin",
        "",
        ".safetensors",
        7,
    ],
)
def test_an_index_leads_nowhere_else(place: object, tmp_path: Path) -> None:
    (tmp_path / "secret.safetensors").write_bytes(file_of({"a": tensor()}))
    directory = tmp_path / "model"
    directory.mkdir()
    index({"a": place})(directory)
    with pytest.raises(CheckpointError, match="not the name of a file in this directory"):
        Weights(directory)


@pytest.mark.parametrize("content", ["[]", "{", '{"weight_map": {}}', '{"weight_map": [1]}', "[" * 100_000])
def test_a_broken_index_is_told(content: str, tmp_path: Path) -> None:
    (tmp_path / hf.INDEX_NAME).write_text(content)
    with pytest.raises(CheckpointError, match=r"index\.json"):
        Weights(tmp_path)


def test_index_and_files_agree(tmp_path: Path) -> None:
    (tmp_path / "one.safetensors").write_bytes(file_of({"a": tensor()}))
    index({"a": "one.safetensors", "b": "one.safetensors"})(tmp_path)
    with pytest.raises(CheckpointError, match="b"):
        Weights(tmp_path)
    index({"a": "two.safetensors"})(tmp_path)
    with pytest.raises(CheckpointError, match=r"two\.safetensors"):
        Weights(tmp_path)


def test_pickles_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02}q\0.")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin") as told:
        Weights(tmp_path)
    assert "pickles can run code" in str(told.value)
