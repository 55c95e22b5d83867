"""The first batch of a corpus of any size costs the same: bytes read and memory, on sparse files.

.idx of 10^8 documents (2 GB): all but the last few are empty, so that nothing need be written
.bin of 10^8 and 10^10 samples of 16 tokens (up to 320 GB): holes, read as token 0
"""

from __future__ import annotations

import os
import time
import tracemalloc
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from megads.data.corpus import Corpus
from megads.data.curriculum import Root
from megads.data.indexed import HEADER, MAGIC, VERSION
from megads.data.ledger import Ledger
from megads.data.loader import Loader, check_epochs
from megads.data.plan import Ramp, plan_history
from megads.data.segment import CorpusShare, Segment
from megads.data.sequence import Packing

LENGTH = 16
NUM_DOCUMENTS = 10**8
LONGEST = 1 << 30  # tokens of a document; lengths are int32
NUM_CORPORA = 3


@dataclass(frozen=True)
class Cost:
    """What something took: seconds of this process, bytes read or mapped, bytes of Python and numpy at the peak."""

    seconds: float
    read: int
    memory: int


def make_sparse(prefix: Path, num_samples: int) -> None:
    """A corpus of `num_samples` samples and `NUM_DOCUMENTS` documents that takes a few blocks of disk."""
    num_tokens = num_samples * LENGTH + 1
    lengths = [min(LONGEST, num_tokens - start) for start in range(0, num_tokens, LONGEST)]
    first = NUM_DOCUMENTS - len(lengths)
    pointers = np.cumsum([0, *lengths[:-1]]).astype("<i8") * 2
    try:
        with open(f"{prefix}.bin", "wb") as file:
            file.truncate(2 * num_tokens)
    except OSError:
        pytest.skip("the file system has no sparse files of this size")
    with open(f"{prefix}.idx", "wb") as file:
        file.write(HEADER.pack(MAGIC, VERSION, 8, NUM_DOCUMENTS, NUM_DOCUMENTS + 1))
        for offset, width, values in (
            (0, 4, np.array(lengths, dtype="<i4")),
            (4 * NUM_DOCUMENTS, 8, pointers),
            (12 * NUM_DOCUMENTS, 8, np.arange(first, NUM_DOCUMENTS + 1, dtype="<i8")),
        ):
            file.seek(HEADER.size + offset + width * first)
            file.write(values.tobytes())


def bytes_read() -> int:
    """Bytes of read calls, and of files in memory because they were mapped and touched."""
    io = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    status = dict(line.split(":\t", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(io["rchar"]) + int(status["RssFile"].split()[0]) * 1024


def start(prefixes: list[Path]) -> Cost:
    """Open the corpora, plan a run with a ramp and a curriculum, check its epochs and read its first batch."""
    before, began = bytes_read(), time.process_time()
    tracemalloc.start()
    corpora = [Corpus(prefix) for prefix in prefixes]
    shares = tuple(CorpusShare(c.path, c.fingerprint, 1.0 + i) for i, c in enumerate(corpora))
    history = plan_history(
        (),
        Segment(1, 512, LENGTH, LENGTH, shares),
        ramp=Ramp(((0, 64), (10**9, 512)), unit=64),
        curriculum=Root(8, LENGTH, 1000, 2),
        last_step=10**7,
    )
    check_epochs(history, corpora, last_step=10**7, max_epochs={c.path: 1000.0 for c in corpora})
    packing = Packing(vocab_size=10, document_mask=True)
    batch = Loader(corpora, history, seed=1, packing=packing, dp_rank=0, dp_size=1).batch(1)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert batch.tokens.shape == (64, 8)
    return Cost(time.process_time() - began, bytes_read() - before, peak)


@pytest.mark.skipif(not os.path.exists("/proc/self/io"), reason="bytes read are known on Linux alone")
def test_the_first_batch_costs_the_same_at_any_size(tmp_path: Path) -> None:
    costs = {}
    for exponent in (8, 10):
        prefixes = [tmp_path / f"c{exponent}-{number}" for number in range(NUM_CORPORA)]
        for number, prefix in enumerate(prefixes):
            make_sparse(prefix, 10**exponent + number)
        costs[exponent] = start(prefixes)
        print(
            f"10^{exponent} samples, {NUM_DOCUMENTS:.0e} documents, {NUM_CORPORA} corpora: {costs[exponent]}"
        )
    for cost in costs.values():
        assert cost.memory < 5e6
        assert cost.read < NUM_CORPORA * 5e6
        assert cost.seconds < 0.5  # 0.1 with five times the slack


@pytest.mark.skipif(not os.path.exists("/proc/self/io"), reason="bytes read are known on Linux alone")
def test_a_step_far_out_and_its_documents_are_near(tmp_path: Path) -> None:
    """The step at 10^10 samples, and the steps of one of its documents, without walking there."""
    make_sparse(tmp_path / "c", 10**10)
    corpus = Corpus(tmp_path / "c")
    history = (Segment(1, 512, LENGTH, LENGTH, (CorpusShare(corpus.path, corpus.fingerprint, 1.0),)),)
    step = 10**10 // 512
    before = bytes_read()
    tracemalloc.start()
    batch = Loader([corpus], history, seed=1, packing=Packing(10), dp_rank=0, dp_size=1).batch(step)
    entries = list(Ledger([corpus], history, seed=1).step(step))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert batch.tokens.shape == (512, LENGTH)
    assert len(entries) >= 512
    assert peak < 5e6
    assert bytes_read() - before < 20e6  # the pages of the .idx that 512 lookups touch
