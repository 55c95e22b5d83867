"""Files of torch: what is written torch reads, and what is read runs nothing and allocates no more than it holds."""

from __future__ import annotations

import argparse
import enum
import io
import os
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from megads.checkpoint.foreign import Values, detect
from megads.checkpoint.proof import bits
from megads.checkpoint.store import Store
from megads.checkpoint.torch_file import Remnant, read_torch_file, values_of, write_torch_file
from megads.errors import CheckpointError


def lazy(tensor: torch.Tensor) -> Values:
    return Values(tuple(tensor.shape), tensor.dtype, lambda box: tensor[box.slices])


TENSORS = {
    "matrix": torch.arange(15, dtype=torch.float64).view(3, 5),
    "half": torch.randn(1000, 1300).bfloat16(),
    "float16": torch.tensor([float("nan"), -0.0]).half(),
    "empty": torch.zeros(0, 4),
    "scalar": torch.tensor(3.5),
    "integer": torch.tensor([1, -2]),
}


@pytest.mark.parametrize("maps", [False, True])
def test_torch_reads_what_is_written(maps: bool, tmp_path: Path) -> None:
    tree = {name: lazy(tensor) for name, tensor in TENSORS.items()}
    args = argparse.Namespace(layers=3, dtype=torch.bfloat16)
    size = write_torch_file(
        Store(), tmp_path / "x.pt", tree={**tree, "again": [tree["half"]], "args": args, "n": None}
    )
    assert size == sum(t.nbytes for t in TENSORS.values())  # shared: once
    with torch.serialization.safe_globals([argparse.Namespace]):
        found = torch.load(tmp_path / "x.pt", weights_only=True, mmap=maps)
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        assert bits(found[name]).equal(bits(tensor))
    assert found["args"] == args
    assert found["again"][0].equal(TENSORS["half"])
    assert zipfile.ZipFile(tmp_path / "x.pt").testzip() is None  # the sums are right
    reader = torch._C.PyTorchFileReader(str(tmp_path / "x.pt"))
    assert all(reader.get_record_offset(f"data/{number}") % 64 == 0 for number in range(len(TENSORS)))
    assert read_torch_file(tmp_path / "x.pt")["args"].layers == 3


class Trap:
    """Its pickle makes a file when it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


class Stranger(enum.Enum):
    ONE = 1


def saved(path: Path, tree: object) -> Path:
    torch.save(tree, path)
    return path


def test_nothing_runs_and_strangers_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"posix\.mkdir|nt\.mkdir"):
        read_torch_file(saved(tmp_path / "trap.pt", {"a": Trap(tmp_path / "mark")}))
    assert not (tmp_path / "mark").exists()
    with pytest.raises(CheckpointError, match=r"test_torch_file\.Stranger"):
        read_torch_file(saved(tmp_path / "stranger.pt", {"a": Stranger.ONE}))


def test_known_objects_become_remnants(tmp_path: Path) -> None:
    import numpy as np

    args = argparse.Namespace(hidden_size=8, where=Path("/nowhere"))
    rng = np.random.RandomState(1).get_state()
    tree = {
        "args": args,
        "rng": rng,
        "state": io.BytesIO(b"fp8"),
        "shape": torch.Size([2]),
        "o": OrderedDict(a=1),
    }
    found = read_torch_file(saved(tmp_path / "x.pt", tree))
    assert type(found["args"]) is Remnant
    assert found["args"].hidden_size == 8
    assert type(found["rng"][1]) is Remnant
    assert found["shape"] == (2,)


def test_damage_and_lies_are_refused(tmp_path: Path) -> None:
    good = saved(tmp_path / "good.pt", {"w": torch.randn(64, 64)}).read_bytes()
    bad = tmp_path / "bad.pt"
    for data in (b"", b"no zip", good[: len(good) // 2], good[:-40], good.replace(b"storage", b"st0rage")):
        bad.write_bytes(data)
        with pytest.raises(CheckpointError, match=r"bad\.pt"):
            values_of(read_torch_file(bad)["w"], where=str(bad))
    with zipfile.ZipFile(bad, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", b"\x80\x02}." + b" " * 10_000_000)
    with pytest.raises(CheckpointError, match="compressed"):
        read_torch_file(bad)
    old = tmp_path / "old.pt"
    torch.save({"w": torch.zeros(2)}, old, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"torch 1\.6"):
        read_torch_file(old)
    with pytest.raises(CheckpointError, match=r"cannot be read|not a file"):
        read_torch_file(tmp_path / "absent.pt")


def test_a_tensor_larger_than_its_bytes_is_refused(tmp_path: Path) -> None:
    wide = torch.zeros(1).expand(1 << 40)
    tree = read_torch_file(
        saved(tmp_path / "x.pt", {"wide": wide, "sparse": torch.eye(3).to_sparse(), "n": 3})
    )
    for name in tree:
        with pytest.raises(CheckpointError, match=r"larger than|not a dense"):
            values_of(tree[name], where=name)


@pytest.mark.parametrize("tracker", ["latest", "latest_universal", "latest_checkpointed_iteration.txt"])
@pytest.mark.parametrize("name", ["../outside", "/etc", "", "a/b", "x" * 2_000_000])
def test_a_tracker_names_only_what_lies_beside_it(tracker: str, name: str, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / tracker).write_text(name)
    with pytest.raises(CheckpointError, match=tracker):
        detect(inside, store=Store())


def test_other_formats_are_told_apart(tmp_path: Path) -> None:
    for names, told in ((("metadata.json", "common.pt"), "ckpt-format torch"), (("x",), "not a checkpoint")):
        place = tmp_path / names[0]
        place.mkdir()
        for name in names:
            (place / name).touch()
        with pytest.raises(CheckpointError, match=told):
            detect(place, store=Store())
    with pytest.raises(CheckpointError, match="no checkpoint there"):
        detect(tmp_path / "absent", store=Store())
