"""Real gloo ranks for tests: forked after `import torch`, joined through a file, torn down with the reason.

A rank that raises, crashes or hangs fails the test within seconds, with the earliest traceback and every rank's stack.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def _child(
    function: Callable[[int, int], Any], rank: int, size: int, path: str, timeout: float, out: Connection
) -> None:
    log = os.open(f"{path}/{rank}.log", os.O_CREAT | os.O_WRONLY)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    faulthandler.enable(sys.stderr)
    faulthandler.register(signal.SIGUSR1, sys.stderr, all_threads=True)
    code = 1
    try:
        torch.set_num_threads(1)
        if size > 1:
            store = dist.FileStore(f"{path}/store", size)
            limit = timedelta(seconds=timeout)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)
        value = function(rank, size)
        if size > 1:
            dist.barrier()
        out.send_bytes(pickle.dumps((time.time(), True, value)))
        code = 0
    except BaseException:
        out.send_bytes(pickle.dumps((time.time(), False, traceback.format_exc())))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run_ranks(function: Callable[[int, int], Any], size: int, *, timeout: float = 60.0) -> list[Any]:
    """Run `function(rank, size)` on `size` connected ranks; returns their values in rank order.

    Raises:
        AssertionError: a rank failed or the time is over; the message has the earliest traceback.
    """
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as path:
        readers, processes = [], []
        for rank in range(size):
            reader, writer = context.Pipe(duplex=False)
            process = context.Process(target=_child, args=(function, rank, size, path, timeout, writer))
            process.start()
            writer.close()
            readers.append(reader)
            processes.append(process)
        results = _collect(readers, processes, timeout=timeout)
        bad = [(r, v) for r, v in results.items() if not v[1]]
        if bad or len(results) < size:
            logs = "\n".join(
                f"--- rank {r}\n" + Path(path, f"{r}.log").read_text()[-3000:] for r in range(size)
            )
            codes = [p.exitcode for p in processes]
            first = min(bad, key=lambda item: item[1][0], default=None)
            reason = f"rank {first[0]}:\n{first[1][2]}" if first else "no rank gave a reason"
            raise AssertionError(f"exit codes {codes}; {reason}\n{logs}")
    return [results[rank][2] for rank in range(size)]


def _collect(
    readers: list[Connection], processes: list[Any], *, timeout: float
) -> dict[int, tuple[float, bool, Any]]:
    """Results by rank, until all are in, one is bad, or the time is over; then no process is left."""
    results: dict[int, tuple[float, bool, Any]] = {}
    pending = {reader: rank for rank, reader in enumerate(readers)}
    deadline = time.monotonic() + timeout
    while pending and (left := deadline - time.monotonic()) > 0:
        for reader in wait(list(pending), timeout=left):
            rank = pending.pop(reader)
            try:
                results[rank] = pickle.loads(reader.recv_bytes())
            except EOFError:  # died without a word
                processes[rank].join(1)
                results[rank] = (time.time(), False, f"died with exit code {processes[rank].exitcode}")
            if not results[rank][1]:
                deadline = min(deadline, time.monotonic() + 0.5)
    if pending:
        for process in processes:
            if process.is_alive():
                os.kill(process.pid, signal.SIGUSR1)
        time.sleep(0.3)
    for process in processes:
        if pending:
            process.kill()
        process.join(5)
    return results
