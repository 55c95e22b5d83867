"""Files that torch.load reads: foreign ones in, without running what is in them; own ones out, tensor by tensor.

    FILE (zip, not compressed)   archive/data.pkl      the tree; a tensor in it is a reference to a storage
                                 archive/byteorder     "little"
                                 archive/data/0, 1 ..  the storages' bytes, each beginning at a multiple of 64
                                 archive/version       "3"

Reading maps the file, so that only what is used is read. A pickle may name classes: those of `_INERT` become a
`Remnant`, which keeps what it was given and does nothing; any other is refused by name. Nothing of another program is
imported. The only file that calls torch.load, and the only one that imports pickle (to write, and for its error).
"""

from __future__ import annotations

import io
import itertools
import math
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from megads.checkpoint.foreign import Values
from megads.checkpoint.store import Buffer, Store, describe_failure, write_file
from megads.errors import CheckpointError

MAX_TREE_BYTES = 1 << 28
"""Largest data.pkl that is read."""
ALIGNMENT = 64
BLOCK_BYTES = 4 << 20

_INERT = re.compile(
    r"""argparse\.Namespace | _?io\.BytesIO | pathlib\.\w+
    | numpy(\._?core)?\.(multiarray|numeric)\.(_reconstruct|scalar|_frombuffer) | numpy\.(ndarray|dtype)
    | numpy\.dtypes\.\w+
    | types\.SimpleNamespace
    | megatron\.(\w+\.)*(enums|rerun_state_machine|grad_scaler)\.\w+
    | megatron\.(model|core\.optimizer|optimizer)\.(\w+\.)*\w+Scaler
    | deepspeed\.runtime\.(zero\.config|fp16\.loss_scaler|base_optimizer)\.\w+
    | deepspeed\.utils\.tensor_fragment\.fragment_address
    | deepspeed\.checkpoint\.universal_checkpoint\.SubparamShape
    | torch\.optim\.(\w+\.)?\w+""",
    re.VERBOSE,
)
"""Classes and functions that other trainers' files name beside tensors; none of them is called or imported."""

_STORAGES: Mapping[torch.dtype, type] = MappingProxyType(
    {
        torch.float64: torch.DoubleStorage,
        torch.float32: torch.FloatStorage,
        torch.bfloat16: torch.BFloat16Storage,
        torch.float16: torch.HalfStorage,
        torch.int64: torch.LongStorage,
        torch.uint8: torch.ByteStorage,
    }
)


class Remnant:
    """What stands for an object of another program: the arguments and the state that its pickle gives, and no code."""

    def __new__(cls, *args: object) -> Remnant:
        made = super().__new__(cls)
        made.__dict__["args"] = args
        return made

    def __init__(self, *args: object) -> None:
        """Takes what the other class takes; kept by `__new__`."""

    def __setstate__(self, state: object) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)
        else:
            self.__dict__["state"] = state


def read_torch_file(path: Path) -> Any:
    """The tree of a file: dicts, lists, numbers, mapped tensors, and `Remnant`s.

    Raises:
        CheckpointError: damaged, too large, compressed, of torch before 1.6, or it names a class that is not expected.
    """
    _check_archive(path)
    try:
        named = get_unsafe_globals_in_checkpoint(str(path))
        strange = sorted(name for name in named if not _INERT.fullmatch(name))
        if strange:
            raise CheckpointError(
                f"{path}: names classes that are not expected in such a file, so it is not read",
                found=", ".join(strange[:8]),
                allowed="tensors, numbers, texts, and what Megatron-LM and DeepSpeed are known to put beside them",
            )
        with safe_globals([(Remnant, name) for name in named]):
            tree = torch.load(str(path), map_location="cpu", weights_only=True, mmap=True)
    except (
        pickle.UnpicklingError,
        RuntimeError,
        ValueError,
        TypeError,
        KeyError,
        IndexError,
        EOFError,
    ) as error:
        raise CheckpointError(f"{path}: not a readable file of torch", found=str(error)[:500]) from error
    except (AttributeError, AssertionError, MemoryError, OverflowError, UnicodeError) as error:
        raise CheckpointError(f"{path}: not a readable file of torch", found=type(error).__name__) from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read", found=describe_failure(error)) from error
    return tree


def _check_archive(path: Path) -> None:
    """Refuse what would make torch allocate more than the file holds."""
    try:
        size = path.stat().st_size
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (OSError, RuntimeError, zipfile.BadZipFile) as error:
        raise CheckpointError(
            f"{path}: not a file of torch",
            found=error,
            allowed="a file that torch 1.6 or newer has saved",
            do="load an older one in torch and save it again",
        ) from error
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise CheckpointError(f"{path}: compressed, as torch never writes it", allowed="stored members")
    if sum(member.file_size for member in members) > size:
        raise CheckpointError(f"{path}: its members claim more bytes than it has", allowed=f"{size} bytes")
    trees = [m.file_size for m in members if m.filename.endswith("data.pkl")]
    if len(trees) != 1 or trees[0] > MAX_TREE_BYTES:
        raise CheckpointError(
            f"{path}: no tree of a size that is read",
            found=trees,
            allowed=f"one, of at most {MAX_TREE_BYTES} bytes",
        )


def tensor_of(tree: Any, *, where: str) -> Tensor:
    """`tree` as a dense tensor that is no larger than the bytes it stands on.

    Raises:
        CheckpointError: something else.
    """
    if not isinstance(tree, Tensor) or tree.layout != torch.strided or tree.is_quantized:
        raise CheckpointError(f"{where}: not a dense tensor", found=type(tree).__name__)
    if tree.device.type != "cpu" or tree.numel() * tree.element_size() > tree.untyped_storage().nbytes():
        raise CheckpointError(f"{where}: larger than the bytes it stands on", found=tuple(tree.shape))
    return tree.detach()


def values_of(tree: Any, *, where: str) -> Values:
    """A mapped tensor of a file.

    Raises:
        CheckpointError: as `tensor_of`.
    """
    tensor = tensor_of(tree, where=where)
    return Values(tuple(tensor.shape), tensor.dtype, lambda box: tensor[box.slices])


@dataclass(frozen=True, slots=True)
class _Storage:
    """The reference of a tensor to its bytes, in the form that torch.load asks for."""

    key: str
    values: Values

    @property
    def reference(self) -> tuple[object, ...]:
        count = math.prod(self.values.shape)
        return ("storage", _STORAGES[self.values.dtype], self.key, "cpu", count)


class _TreePickler(pickle.Pickler):
    """Writes a tree in which each `Values` is a tensor whose bytes come later."""

    def __init__(self, stream: io.BytesIO) -> None:
        super().__init__(stream, protocol=2)
        self.storages: list[_Storage] = []

    def persistent_id(self, obj: Any) -> Any:
        return obj.reference if isinstance(obj, _Storage) else None

    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, Values):
            return NotImplemented
        storage = _Storage(str(len(self.storages)), obj)
        self.storages.append(storage)
        strides = [math.prod(obj.shape[dim + 1 :]) for dim in range(len(obj.shape))]
        arguments: tuple[object, ...] = (storage, 0, obj.shape, tuple(strides), False, OrderedDict())
        return torch._utils._rebuild_tensor_v2, arguments


class _Sink(io.RawIOBase):
    """Where a zip is written to: keeps what has not been taken yet."""

    def __init__(self) -> None:
        self.position = 0
        self._blocks: list[Buffer] = []

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return False

    def write(self, data: Any) -> int:
        size = memoryview(data).nbytes
        self._blocks.append(data)
        self.position += size
        return size

    def take(self) -> list[Buffer]:
        blocks, self._blocks = self._blocks, []
        return blocks


def write_torch_file(store: Store, path: Path, *, tree: object) -> int:
    """Write and sync a file that torch.load reads (weights_only); returns the bytes of its tensors.

    Memory: one tensor of `tree` at a time.

    Args:
        tree: dicts, lists, tuples, numbers, texts, None, argparse.Namespace; `Values` become tensors.

    Raises:
        OSError: with the path.
    """
    stream = io.BytesIO()
    pickler = _TreePickler(stream)
    pickler.dump(tree)
    write_file(store, path, blocks=_file_blocks(path.stem, stream.getvalue(), pickler.storages))
    return sum(storage.values.size for storage in pickler.storages)


def _file_blocks(stem: str, tree: bytes, storages: list[_Storage]) -> Iterator[Buffer]:
    sink = _Sink()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_STORED) as archive:
        small = ((f"{stem}/data.pkl", tree), (f"{stem}/byteorder", b"little"), (f"{stem}/version", b"3\n"))
        for name, data in small:
            yield from _member(archive, sink, name=name, blocks=iter([data]), size=len(data))
        for storage in storages:
            name = f"{stem}/data/{storage.key}"
            yield from _member(
                archive, sink, name=name, blocks=_bytes_of(storage.values), size=storage.values.size
            )
    yield from sink.take()


def _member(
    archive: zipfile.ZipFile, sink: _Sink, *, name: str, blocks: Iterator[Buffer], size: int
) -> Iterator[Buffer]:
    info = zipfile.ZipInfo(name)
    info.file_size = size
    is_large = size >= zipfile.ZIP64_LIMIT // 2
    before = sink.position + 30 + len(name.encode()) + (20 if is_large else 0) + 4
    padding = -before % ALIGNMENT
    info.extra = b"FB" + padding.to_bytes(2, "little") + bytes(padding)
    with archive.open(info, "w", force_zip64=is_large) as member:
        for block in blocks:
            member.write(block)
            yield from sink.take()


def _bytes_of(values: Values) -> Iterator[Buffer]:
    flat = values.whole().contiguous().reshape(-1).view(torch.uint8).numpy().data
    for start in itertools.count(0, BLOCK_BYTES):
        if start >= len(flat):
            return
        yield flat[start : start + BLOCK_BYTES]
