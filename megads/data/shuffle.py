"""Documents in random order, in bounded memory: an external sort by random places.

    place of document n = mix(seed, n), 64 bits             n counts the documents that come in
    documents --by the head of the place--> buckets         on disk; a bucket that is too large is dealt out again
    each bucket sorted by place, one after another          the order of all places, whatever the number of buckets

So the order is a function of the seed and the documents alone. `mix` is one to one: no two places are equal.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megads.data.bucket import Buckets, num_buckets
from megads.data.frame import Frame, join_frames, read_frames, write_frame

BUCKET_BYTES = 64 << 20
"""A bucket is sorted in memory, which takes about three times as much."""
OUT_BYTES = 4 << 20
"""Ids of about as many bytes are given out at once."""
MAX_BITS = 64


class Shuffle:
    """Takes frames in and gives the same documents out in the order of a seed.

    Args:
        folder: for scratch files; removed when all was given out.
        seed: of the order.
        dtype: of the ids.
        total_bytes: about as many bytes of frames will come.
    """

    def __init__(self, folder: Path, seed: int, *, dtype: np.dtype[np.generic], total_bytes: int) -> None:
        self._folder = folder
        self._seed = seed
        self._dtype = dtype
        self._num_documents = 0
        self._num_bits = num_buckets(total_bytes, BUCKET_BYTES).bit_length() - 1
        self._buckets = Buckets(folder, 1 << self._num_bits)

    def add(self, frame: Frame) -> None:
        """Take documents in."""
        numbers = np.arange(self._num_documents, self._num_documents + frame.num_documents, dtype=np.uint64)
        self._num_documents += frame.num_documents
        keys = np.stack([places(self._seed, numbers), numbers], axis=1)
        _deal(self._buckets, replace(frame, keys=keys), shift=MAX_BITS - self._num_bits)

    def drain(self) -> Iterator[Frame]:
        """All documents in their new order; only once."""
        with self._buckets:
            pass
        yield from self._drain(self._buckets, shift=MAX_BITS - self._num_bits)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _drain(self, buckets: Buckets, *, shift: int) -> Iterator[Frame]:
        for bucket in range(buckets.count):
            path = buckets.path(bucket)
            if not path.exists():
                continue
            size = path.stat().st_size
            bits = num_buckets(size, BUCKET_BYTES).bit_length() - 1
            if bits and shift >= bits:
                finer = Buckets(path.with_name(f"{path.name}.d"), 1 << bits)
                with finer, open(path, "rb") as file:
                    mask = (1 << bits) - 1
                    for frame in read_frames(file, self._dtype, stop=size):
                        _deal(finer, frame, shift=shift - bits, mask=mask)
                path.unlink()
                yield from self._drain(finer, shift=shift - bits)
            else:
                yield from _sorted(path, self._dtype)
                path.unlink()


def places(seed: int, numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A random 64-bit place for each number: SplitMix64 (Steele, Lea, Flood 2014) of the mixed seed."""
    with np.errstate(over="ignore"):
        start = _mix(np.array([seed % 2**64], dtype=np.uint64) + np.uint64(0x9E3779B97F4A7C15))
        return _mix(start + (numbers + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15))


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _deal(buckets: Buckets, frame: Frame, *, shift: int, mask: int = -1) -> None:
    """Append each document to the bucket that the bits of its place above `shift` name."""
    if frame.keys is None or not frame.num_documents:
        return
    if shift == MAX_BITS:
        write_frame(buckets.file(0), frame)
        return
    which = (frame.keys[:, 0] >> np.uint64(shift)) & np.uint64(mask % 2**64)
    order = np.argsort(which, kind="stable")
    dealt, which = frame.take(order), which[order]
    found, starts = np.unique(which, return_index=True)
    stops = [*starts[1:].tolist(), which.size]
    for bucket, start, stop in zip(found.tolist(), starts.tolist(), stops, strict=True):
        write_frame(buckets.file(bucket), dealt.slice(start, stop))


def _sorted(path: Path, dtype: np.dtype[np.generic]) -> Iterator[Frame]:
    """The documents of a bucket by place, in frames of bounded size."""
    with open(path, "rb") as file:
        frame = join_frames(list(read_frames(file, dtype, stop=path.stat().st_size)))
    if frame.keys is None:
        return
    order = np.argsort(frame.keys[:, 0])
    ends = np.cumsum(frame.lengths[order], dtype=np.int64) * dtype.itemsize
    start = 0
    while start < order.size:
        done = int(ends[start - 1]) if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, done + OUT_BYTES, side="right")))
        yield frame.take(order[start:stop])
        start = stop
