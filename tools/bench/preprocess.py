"""tools/preprocess_data.py beside Megatron-LM's two tools: the same text, the same bytes out, in turns, in one run.

    python -m tools.bench.preprocess --peer MEGATRON_LM --peer-python PYTHON [--text FOLDER] [--rounds 2]

    preprocess_data.py        one document a call, a pool of processes                  real text 2 times   ~30 MB
    preprocess_data_fast.py   gigatoken on whole files, no SentencePiece                real text 18 times  ~285 MB

Without --peer, ours alone. The peer's Python needs torch, transformers, sentencepiece and gigatoken, and 3.12 for
`typing.override`. CPU seconds are those of the whole command with its children; memory is the largest sum of the
proportional set sizes of all its processes. `--workers` counts threads: one of ours reads, the others encode. Rates are
of bytes of text and decimal. A ratio is ours over the peer's of the same round; the table has medians.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import torch

from megads.data.part import hash_file
from megads.data.preprocess import make, open_workshop
from megads.data.preprocess_options import Options
from megads.data.unit import read_unit
from tools.bench.measure import print_table

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared" / "data"
TOKENIZERS = (
    ("gpt2", SHARED / "tokenizers/gpt2/tokenizer.json", "tokenizers"),
    ("sp", SHARED / "tokenizers/sp_bpe_32k/tokenizer.model", "sentencepiece"),
)
SAMPLE_SECONDS = 0.1
NUM_LOOPS = 5
"""Passes over the text in memory that measure the tokenizer alone."""


@dataclass(frozen=True, slots=True)
class Run:
    """One command, measured."""

    wall: float
    cpu: float
    peak_bytes: int
    hashes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Contender:
    """A way to make the corpus."""

    name: str
    command: tuple[str, ...]
    """`OUT` in it stands for the output prefix."""
    output: str
    """PREFIX of the .bin and .idx; `OUT` as above."""
    folder: Path


def proportional_bytes(pid: int) -> int:
    """Memory of a process and its descendants, shared pages counted by share."""
    total, pids = 0, [pid]
    while pids:
        here = pids.pop()
        with contextlib.suppress(OSError, StopIteration):  # it may end meanwhile
            for task in os.listdir(f"/proc/{here}/task"):
                pids += map(int, Path(f"/proc/{here}/task/{task}/children").read_text().split())
            lines = Path(f"/proc/{here}/smaps_rollup").read_text().splitlines()
            total += 1024 * int(next(line for line in lines if line.startswith("Pss:")).split()[1])
    return total


def measure(contender: Contender, folder: Path) -> Run:
    """Run a command to its end; raises SystemExit with its last words if it fails."""
    prefix = folder / "out"
    command = [word.replace("OUT", str(prefix)) for word in contender.command]
    peak = 0
    ended = threading.Event()

    def watch(pid: int) -> None:
        nonlocal peak
        while not ended.wait(SAMPLE_SECONDS):
            peak = max(peak, proportional_bytes(pid))

    with open(folder / "log", "wb") as log:
        start = time.perf_counter()
        process = subprocess.Popen(command, cwd=contender.folder, stdout=log, stderr=log)
        watcher = threading.Thread(target=watch, args=(process.pid,))
        watcher.start()
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        ended.set()
        watcher.join()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}\n{(folder / 'log').read_text()[-2000:]}")
    output = contender.output.replace("OUT", str(prefix))
    hashes = tuple(hash_file(Path(f"{output}.{suffix}")) for suffix in ("bin", "idx"))
    for file in folder.glob("out*"):
        file.unlink()
    return Run(wall, usage.ru_utime + usage.ru_stime, peak, hashes)


def contenders(name: str, text: Path, *, options: argparse.Namespace) -> Iterator[Contender]:
    """Ours with each engine, and the peers that can read this tokenizer."""
    _, tokenizer, library = next(row for row in TOKENIZERS if row[0] == name)
    tool = (sys.executable, str(ROOT / "tools/preprocess_data.py"), "--input", str(text), "--append-eod")
    threads = str(max(1, options.workers - 1))
    for engine in ("gigatoken", library):
        command = (
            *tool, "--tokenizer", str(tokenizer), "--output-prefix", "OUT", "--workers", threads, "--engine", engine,
        )  # fmt: skip
        yield Contender(f"megads, {engine}", command, "OUT", ROOT)
    if options.peer is None:
        return
    kind, model = (
        ("HuggingFaceTokenizer", tokenizer.parent)
        if name == "gpt2"
        else ("SentencePieceTokenizer", tokenizer)
    )
    given = (
        "--input", str(text), "--output-prefix", "OUT", "--append-eod", "--tokenizer-type", kind,
        "--tokenizer-model", str(model),
    )  # fmt: skip
    python, tools = options.peer_python, options.peer / "tools"
    plain = (python, str(tools / "preprocess_data.py"), *given, "--workers", str(options.workers))
    yield Contender("Megatron preprocess_data.py", plain, "OUT_text_document", options.peer)
    if name == "gpt2":
        fast = (python, str(tools / "preprocess_data_fast.py"), *given, "--use-gigatoken")
        yield Contender("Megatron preprocess_data_fast.py", fast, "OUT_text_document", options.peer)


def write_text(folder: Path, target: Path, *, times: int) -> int:
    """All documents of the JSON lines files in `folder`, `times` times; returns the bytes of text."""
    files = sorted(folder.rglob("*.jsonl"))
    if not files:
        raise SystemExit(f"{folder}: no .jsonl files")
    size = 0
    with open(target, "wb") as out:
        for _ in range(times):
            for file in files:
                out.write(file.read_bytes())
    for file in files:
        with open(file, encoding="utf-8") as lines:
            size += times * sum(
                len(json.loads(line)["text"].encode()) for line in lines if not line.isspace()
            )
    return size


def compare(name: str, text: Path, *, text_bytes: int, options: argparse.Namespace) -> list[list[str]]:
    """Rows of the table for one corpus and tokenizer: all contenders in turns."""
    all_of_them = [c for c in contenders(name, text, options=options) if text_bytes < 1e8 or _is_fast(c)]
    runs: dict[str, list[Run]] = {}
    with tempfile.TemporaryDirectory(dir=options.directory) as scratch:
        for _ in range(options.rounds):
            for contender in all_of_them:
                runs.setdefault(contender.name, []).append(measure(contender, Path(scratch)))
                last = runs[contender.name][-1]
                print(
                    f"{name} {text_bytes / 1e6:.0f} MB {contender.name}: {last.wall:.1f} s", file=sys.stderr
                )
    peers = [contender.name for contender in all_of_them if contender.name.startswith("Megatron")]
    hashes = {run.hashes for measured in runs.values() for run in measured}
    rows = []
    for way, measured in runs.items():
        wall, cpu = (statistics.median(getattr(run, key) for run in measured) for key in ("wall", "cpu"))
        row = [f"{name} {text_bytes / 1e6:.0f} MB", way, f"{wall:.2f}", f"{cpu:.2f}"]
        row += [f"{text_bytes / 1e6 / wall:.1f}", f"{text_bytes / 1e6 / cpu:.1f}"]
        row.append(f"{max(run.peak_bytes for run in measured) / 1e6:.0f}")
        for key in ("wall", "cpu"):
            row.append(" / ".join(_ratio(measured, runs[peer], key=key) for peer in peers) or "-")
        rows.append([*row, "yes" if len(hashes) == 1 else "NO"])
    return rows


def _is_fast(contender: Contender) -> bool:
    return "gigatoken" in contender.name or "fast" in contender.name


def _ratio(ours: Sequence[Run], theirs: Sequence[Run], *, key: str) -> str:
    return f"{statistics.median(getattr(b, key) / getattr(a, key) for a, b in zip(ours, theirs, strict=True)):.1f}"


def loop_share(name: str, text: Path, *, text_bytes: int, directory: Path) -> str:
    """The rate of reading, encoding and writing parts, beside that of the tokenizer alone in as many threads."""
    tokenizer = next(row[1] for row in TOKENIZERS if row[0] == name)
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        options = Options((str(text),), str(tokenizer), f"{scratch}/out", append_eod=True, engine="gigatoken")
        opened = open_workshop(options)
        loops = []
        for number in range(NUM_LOOPS + 1):  # the first fills the tokenizer's cache
            shop = replace(opened, job=replace(opened.job, prefix=f"{scratch}/out{number}"))
            shop.job.folder.mkdir()
            start = time.perf_counter()
            make(shop, shop.job.units)
            loops.append(time.perf_counter() - start)
        batches = [
            d.texts for u in shop.job.units for d in read_unit(shop.job.inputs, u, options=options.records)
        ]
        alone = []
        for _ in range(NUM_LOOPS):
            start = time.perf_counter()
            with ThreadPoolExecutor(1) as pool:
                list(pool.map(shop.encoder.choice.engine.encode, batches))
            alone.append(time.perf_counter() - start)
    ours, theirs = (text_bytes / 1e6 / statistics.median(times) for times in (loops[1:], alone))
    return f"{name}: parts {ours:.0f} MB/s, tokenizer alone {theirs:.0f} MB/s, {100 * ours / theirs:.0f}%"


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", type=Path, help="a checkout of Megatron-LM")
    parser.add_argument("--peer-python", default=sys.executable, help="its Python (default this one)")
    parser.add_argument(
        "--text", type=Path, default=SHARED / "train", help="folder of JSON lines (default %(default)s)"
    )
    parser.add_argument(
        "--times", type=int, nargs="+", default=[2, 18], help="how often the text is repeated"
    )
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--tokenizers", nargs="+", choices=("gpt2", "sp"), default=["gpt2", "sp"])
    parser.add_argument("--directory", type=Path, help="where corpora are written (default the system's)")
    options = parser.parse_args()
    rows: list[list[str]] = []
    shares: list[str] = []
    with tempfile.TemporaryDirectory(dir=options.directory) as scratch:
        for times in options.times:
            text = Path(scratch) / f"text{times}.jsonl"
            text_bytes = write_text(options.text, text, times=times)
            for name in options.tokenizers:
                rows += compare(name, text, text_bytes=text_bytes, options=options)
        text_bytes = write_text(options.text, text, times=2)  # fits in memory
        for name in options.tokenizers:
            shares.append(loop_share(name, text, text_bytes=text_bytes, directory=Path(scratch)))
    peer_python = "-"
    if options.peer is not None:
        told = subprocess.run([options.peer_python, "--version"], capture_output=True, text=True, check=True)
        peer_python = told.stdout.strip()
    print_table(
        ("corpus", "tool", "wall s", "CPU s", "MB/s", "MB/CPU-s", "PSS MB", "wall x", "CPU x", "same bytes"),
        rows,
        device=torch.device("cpu"),
        notes=(
            f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the end; Python {platform.python_version()}, "
            + ", ".join(
                f"{name} {version(name)}" for name in ("gigatoken", "tokenizers", "sentencepiece", "pyarrow")
            )
            + f"; peer: {peer_python}",
            "x: times as fast as preprocess_data.py / preprocess_data_fast.py, as far as they ran",
            "reading, encoding and writing, with one thread that encodes: " + "; ".join(shares),
        ),
    )


if __name__ == "__main__":
    main()
