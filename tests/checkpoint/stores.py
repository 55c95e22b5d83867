"""Stores that fail on purpose.

`FaultStore` works on real files and raises the error it is told to. `MemoryStore` knows, for every file and
directory, what is safe and what a power cut may take: bytes become safe by syncing their file, names by
syncing their directory.
"""

from __future__ import annotations

import errno
import itertools
import os
import random
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megads.checkpoint.store import Store

CHANGES = (
    "create",
    "write",
    "sync",
    "close",
    "make_directory",
    "sync_directory",
    "rename",
    "unlink",
    "remove_directory",
)
SURVIVALS = ("all", "safe", "names", "random")


class PowerCut(BaseException):
    """The process is gone."""


class FaultStore(Store):
    """Real files; before each change asks `fault(number, operation, path)` for an errno to raise."""

    def __init__(self, fault: Callable[[int, str, str], int | None]) -> None:
        self.count = 0
        self.paths: dict[int, str] = {}
        for operation in CHANGES:
            setattr(self, operation, self._wrap(operation, getattr(super(), operation), fault))

    def _wrap(self, operation: str, call: Callable[..., Any], fault: Any) -> Callable[..., Any]:
        def wrapped(target: Any, *rest: Any) -> Any:
            path = self.paths.get(target, "") if isinstance(target, int) else str(target)
            code = fault(self.count, operation, path)
            self.count += 1
            if operation == "close":
                call(target)
            if code is not None:
                name = (path,) if operation not in ("write", "sync", "close") else ()
                raise OSError(code, os.strerror(code), *name)
            if operation == "close":
                return None
            result = call(target, *rest)
            if operation == "create":
                self.paths[result] = path
            return result

        return wrapped


@dataclass(eq=False)
class _File:
    data: bytearray = field(default_factory=bytearray)
    safe: bytes = b""


@dataclass(eq=False)
class _Directory:
    names: dict[str, Any] = field(default_factory=dict)
    safe: dict[str, Any] = field(default_factory=dict)


class MemoryStore(Store):
    """A file system in memory that dies at change number `crash_at`, half-way if that is a write."""

    def __init__(self, root: _Directory | None = None, *, renames: bool = True) -> None:
        self.root = root or _Directory()
        self.renames = renames  # whether directories can be renamed
        self.count = 0
        self.crash_at: int | None = None
        self._handles: dict[int, _File] = {}
        self._numbers = itertools.count()
        self._lock = threading.RLock()

    def survivors(self, survival: str, seed: int) -> MemoryStore:
        """What is found after the crash.

        all: the process was killed, the machine lives. safe: nothing that was not synced. names: every
        name, but only synced bytes. random: any of these, for each name and file.
        """
        rng = random.Random(seed)
        done: dict[int, Any] = {}

        def keep() -> bool:
            return rng.random() < 0.5

        def copy(node: Any) -> Any:
            if id(node) in done:
                return done[id(node)]
            if isinstance(node, _File):
                late = survival == "all" or (survival == "random" and keep())
                data = bytes(node.data) if late else node.safe
                done[id(node)] = _File(bytearray(data), data)
                return done[id(node)]
            done[id(node)] = result = _Directory()
            for name in sorted({*node.names, *node.safe}):
                late = survival in ("all", "names") or (survival == "random" and keep())
                child = (node.names if late else node.safe).get(name)
                if child is not None:
                    result.names[name] = result.safe[name] = copy(child)
            return result

        return MemoryStore(copy(self.root), renames=self.renames)

    def lock(self, path: Path) -> None:
        """There are no other processes."""

    def _change(self) -> None:
        if self.crash_at is not None and self.count >= self.crash_at:
            raise PowerCut
        self.count += 1

    def _node(self, path: Path) -> Any:
        node: Any = self.root
        for name in path.parts[1:]:
            if not isinstance(node, _Directory):
                raise NotADirectoryError(errno.ENOTDIR, "not a directory", str(path))
            if name not in node.names:
                raise FileNotFoundError(errno.ENOENT, "no such file", str(path))
            node = node.names[name]
        return node

    def _add(self, path: Path, node: Any) -> None:
        parent = self._node(path.parent)
        if path.name in parent.names:
            raise FileExistsError(errno.EEXIST, "file exists", str(path))
        parent.names[path.name] = node

    def kind(self, path: Path) -> Any:
        try:
            return "file" if isinstance(self._node(path), _File) else "directory"
        except FileNotFoundError:
            return "missing"

    def is_link(self, path: Path) -> bool:
        return False

    def entries(self, path: Path) -> list[str]:
        return sorted(self._node(path).names)

    def size(self, path: Path) -> int:
        return len(self._node(path).data)

    def free(self, path: Path) -> int:
        return 1 << 40

    def read_into(self, path: Path, *, offset: int, into: memoryview) -> int:
        data = self._node(path).data[offset : offset + len(into)]
        into[: len(data)] = data
        return len(data)

    def create(self, path: Path) -> int:
        with self._lock:
            self._change()
            node, handle = _File(), next(self._numbers)
            self._add(path, node)
            self._handles[handle] = node
            return handle

    def write(self, handle: int, data: Any) -> int:
        with self._lock:
            torn = self.crash_at is not None and self.count >= self.crash_at
            count = max(1, len(data) // 2)  # short writes are legal at any time
            self._handles[handle].data += bytes(data[: count // 2 if torn else count])
            self._change()
            return count

    def sync(self, handle: int) -> None:
        with self._lock:
            self._change()
            self._handles[handle].safe = bytes(self._handles[handle].data)

    def close(self, handle: int) -> None:
        del self._handles[handle]

    def make_directory(self, path: Path) -> None:
        with self._lock:
            self._change()
            self._add(path, _Directory())

    def sync_directory(self, path: Path) -> None:
        with self._lock:
            self._change()
            node = self._node(path)
            node.safe = dict(node.names)

    def rename(self, source: Path, target: Path) -> None:
        if not self.renames:
            raise OSError(errno.ENOSYS, "not supported", str(source))
        with self._lock:
            self._change()
            self._add(target, self._node(source))
            del self._node(source.parent).names[source.name]

    def unlink(self, path: Path) -> None:
        with self._lock:
            self._change()
            del self._node(path.parent).names[path.name]

    def remove_directory(self, path: Path) -> None:
        self.unlink(path)
