"""Several GPUs of one host: collectives, layouts, schedules and scaling, one command, one table.

    python -m tools.bench.multi_gpu                     every case that fits the GPUs here (8 GPUs: about 9 minutes)
    python -m tools.bench.multi_gpu --only llama1b      cases whose name holds a word
    python -m tools.bench.multi_gpu --nproc 2 --tiny    2 gloo ranks on the CPU, to see that it runs

Each case is a job of its own under torchrun, with random tokens: a job that fails or hangs costs its row alone.
Ceilings (matrix product, copy, bus bandwidth) are of the same command. A step is forward, backward, clipping and AdamW,
the median of 8; MFU is of the data sheet's dense bf16. `of one` is tokens a second and GPU over those of the same model
on the fewest GPUs in this table. `naive` is GPipe with one micro-batch: a layer split in which one GPU works at a time.
`predicted` is `pipeline/simulate` on this run's own stage times, without communication, plus the optimizer.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tools.bench import collectives, multi_rank
from tools.bench.measure import ceilings, print_table

MAX_SECONDS = 170  # of one job, with its start
PEAK_TFLOPS = 989.0  # H100 and H200, dense bf16


@dataclass(frozen=True, slots=True)
class Shape:
    """A model and how it is trained: keys of the sections `model` and `data`, rows of one replica's micro-batch."""

    name: str
    model: str
    seq: int
    micro: int


LLAMA1B = Shape(
    "llama1b", "family: llama, layers: 24, hidden: 2048, heads: 16, ffn: 5632, vocab: 32000", 4096, 2
)
GPT1B = Shape("gpt1.3b", "family: gpt, layers: 24, hidden: 2048, heads: 16, vocab: 50304", 1024, 8)
LLAMA8B = Shape(
    "llama8b",
    "family: llama, layers: 32, hidden: 4096, heads: 32, kv_heads: 8, ffn: 14336, vocab: 128256",
    8192,
    1,
)
MOE = Shape(
    "moe",  # a quarter of the depth of a model of DeepSeek's 16B shape
    "family: llama, layers: 6, hidden: 2048, heads: 16, ffn: 10944, vocab: 102400, experts: 64, "
    "experts_per_token: 6, expert_ffn: 1408, shared_experts: 2, dense_layers: 1",
    4096,
    1,
)
TINY = Shape("tiny", "family: llama, layers: 6, hidden: 32, heads: 4, ffn: 48, vocab: 64", 16, 2)


@dataclass(frozen=True, slots=True)
class Case:
    """One job.

    Attributes:
        what: the layout in a few words.
        num_ranks: GPUs.
        rows: samples of a step over all ranks.
        parallel, optim: keys of these sections.
        micro: rows of a micro-batch; None: the shape's.
    """

    shape: Shape
    what: str
    num_ranks: int
    rows: int
    parallel: str = ""
    optim: str = "zero_stage: 1"
    micro: int | None = None

    @property
    def config(self) -> str:
        """The case as a config."""
        shape = self.shape
        return "\n".join(
            (
                "run: {steps: 1000}",
                f"model: {{{shape.model}}}",
                f"batch: {{global: {self.rows}, micro: {self.micro or shape.micro}}}",
                f"data: {{train: random, tokenizer: none, sequence_length: {shape.seq}}}",
                f"optim: {{lr: 1e-4, precision: bf16, {self.optim}}}",
                f"parallel: {{{self.parallel}}}",
            )
        )


def pipelines(shape: Shape, *, ranks: int, rows: int) -> list[Case]:
    """Every schedule on `ranks` stages, and the naive layer split."""
    cases = [
        Case(shape, "naive split", ranks, rows, f"pipeline: {ranks}, schedule: gpipe", micro=rows),
    ]
    for schedule in ("gpipe", "one_f_one_b", "interleaved", "zero_bubble_h1", "zbv", "dualpipe_v"):
        chunks = 2 if schedule in ("interleaved", "zbv", "dualpipe_v") else 1
        keys = f"pipeline: {ranks}, schedule: {schedule}, virtual_stages: {chunks}"
        cases.append(Case(shape, f"PP{ranks} {schedule}", ranks, rows, keys))
    return cases


def cases_for(num_ranks: int) -> list[Case]:
    """What is run on a host of this many GPUs."""
    cases = [Case(LLAMA1B, "one", 1, 4, optim="zero_stage: 0")]
    sizes = [n for n in (2, 4, 8) if n <= num_ranks]
    for n in sizes:
        cases += [
            Case(LLAMA1B, f"DP{n} ZeRO-1", n, 4 * n),
            Case(LLAMA1B, f"TP{n}+SP", n, 4, f"tensor: {n}, sequence: true"),
        ]
    top = sizes[-1] if sizes else 1
    if top > 1:
        cases += [
            Case(LLAMA1B, f"DP{top} strong", top, max(4, top), micro=1),
            *(
                Case(LLAMA1B, f"CP{top} {kind}", top, 4, f"context: {top}, context_kind: {kind}")
                for kind in ("ring", "ulysses", "all_gather")
            ),
            *pipelines(LLAMA1B, ranks=top, rows=4 * top),
            Case(GPT1B, f"DP{top} ZeRO-1", top, 16 * top),
            Case(MOE, f"EP{top}", top, 4 * top, f"expert: {top}", micro=1),
            Case(MOE, f"EP{top} TP2+SP", top, 2 * top, f"expert: {top // 2}, tensor: 2, sequence: true"),
        ]
    if top >= 8:
        full = "recompute: full"
        cases += [
            Case(LLAMA8B, "DP8 ZeRO-1", 8, 8, full),
            Case(LLAMA8B, "TP2+SP DP4", 8, 8, f"tensor: 2, sequence: true, {full}"),
            Case(LLAMA8B, "TP8+SP", 8, 4, "tensor: 8, sequence: true"),
            Case(LLAMA8B, "TP2+SP PP4", 8, 16, "tensor: 2, sequence: true, pipeline: 4"),
            Case(
                LLAMA8B, "TP4+SP CP2", 8, 4, "tensor: 4, sequence: true, context: 2, recompute: [attention]"
            ),
        ]
    return cases


def tiny_cases(num_ranks: int) -> list[Case]:
    """One case of each kind, small enough for a CPU."""
    return [
        Case(TINY, "one", 1, 8, optim="zero_stage: 0"),
        Case(TINY, f"DP{num_ranks} ZeRO-1", num_ranks, 4 * num_ranks),
        *pipelines(TINY, ranks=num_ranks, rows=8)[:3],
    ]


def run(module: str, *arguments: str, num_ranks: int, on_cpu: bool) -> str | None:
    """The output of a job under torchrun; None, with its last words printed, if it failed or took too long."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
    command += [str(num_ranks), "-m", module, *arguments]
    environment = {"PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1", **os.environ}
    if on_cpu:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as job:
        try:
            output, _ = job.communicate(timeout=MAX_SECONDS)
        except subprocess.TimeoutExpired:
            job.terminate()  # torchrun takes its ranks with it
            output, _ = job.communicate()
            output += f"\nnot done after {MAX_SECONDS} s"
    if job.returncode == 0:
        return output
    words = [line for line in output.splitlines() if line.strip() and "elastic" not in line]
    print("\n".join(words[-12:]), flush=True)
    return None


def result_of(output: str | None, mark: str) -> Any:
    """The JSON behind `mark` in a job's output, or None."""
    lines = (output or "").splitlines()
    return next((json.loads(line.removeprefix(mark)) for line in lines if line.startswith(mark)), None)


def collective_rows(readings: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Operation by size: GB/s of the bus."""
    sizes = sorted({reading["mib"] for reading in readings})
    rows = []
    for key in dict.fromkeys((r["operation"], r["num_ranks"]) for r in readings):
        found = {r["mib"]: r for r in readings if (r["operation"], r["num_ranks"]) == key}
        rows.append([key[0], str(key[1]), *(f"{found[size]['bus_gbps']:.1f}" for size in sizes)])
    return rows


def case_row(case: Case, found: dict[str, Any] | None, *, one: float | None) -> list[str]:
    """A line of the table; `one`: tokens a second and GPU of the model on the fewest GPUs."""
    head = [case.shape.name, case.what, str(case.num_ranks), str(case.rows)]
    if found is None:
        return [*head, "failed", *[""] * 8]
    rate = found["tokens"] / found["seconds"] / case.num_ranks
    share = 100 * rate * found["flops_per_token"] / 1e12 / PEAK_TFLOPS
    parts = [found[key] for key in ("exposed", "idle", "predicted")]
    return [
        *head,
        f"{found['seconds'] * 1e3:.1f}",
        f"{100 * found['spread']:.0f}%",
        f"{rate:.0f}",
        f"{share:.1f}",
        "-" if one is None else f"{100 * rate / one:.0f}%",
        *("-" if part is None else f"{part * 1e3:.1f}" for part in parts),
        f"{min(found['peak_bytes']) / 2**30:.1f}-{max(found['peak_bytes']) / 2**30:.1f}",
    ]


HEADER = (
    "model", "layout", "GPUs", "rows", "ms", "spread", "tok/s/GPU", "MFU %", "of one", "exposed ms", "idle ms",
    "predicted ms", "GiB a rank",
)  # fmt: skip


def main() -> int:
    """Run the cases, print the tables; 1 if a case failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nproc", type=int, help="ranks (default: the GPUs here)")
    parser.add_argument("--tiny", action="store_true", help="small models and messages on the CPU")
    parser.add_argument("--only", default="", metavar="WORD", help="cases whose model or layout holds WORD")
    parser.add_argument("--save", type=Path, metavar="FILE", help="collective tables as JSON")
    options = parser.parse_args()
    device = torch.device("cpu" if options.tiny else "cuda")
    num_ranks = options.nproc or torch.cuda.device_count()
    cases = tiny_cases(num_ranks) if options.tiny else cases_for(num_ranks)
    cases = [case for case in cases if options.only in f"{case.shape.name} {case.what}"]
    note = str(ceilings(device, tiny=options.tiny))
    readings: list[dict[str, Any]] = []
    for size in [n for n in (2, 4, 8) if n <= num_ranks]:
        arguments = ["--tiny"] if options.tiny else []
        output = run("tools.bench.collectives", *arguments, num_ranks=size, on_cpu=options.tiny)
        readings += result_of(output, collectives.RESULT) or []
    rows, single, failed = [], dict[str, float](), 0
    for case in cases:
        arguments = [case.config, "--repeats", "3" if options.tiny else "8"]
        found = result_of(
            run("tools.bench.multi_rank", *arguments, num_ranks=case.num_ranks, on_cpu=options.tiny),
            multi_rank.RESULT,
        )
        failed += found is None
        if found is not None:
            rate = found["tokens"] / found["seconds"] / case.num_ranks
            single.setdefault(case.shape.name, rate)
        rows.append(case_row(case, found, one=single.get(case.shape.name)))
        print("  ".join(rows[-1]), flush=True)
    if readings:
        sizes = sorted({reading["mib"] for reading in readings})
        header = ("collective, bus GB/s by MiB", "ranks", *(f"{size:g}" for size in sizes))
        print_table(header, collective_rows(readings), device=device)
    if options.save:
        options.save.parent.mkdir(parents=True, exist_ok=True)
        options.save.write_text(json.dumps(readings, indent=1) + "\n", encoding="utf-8")
    print_table(HEADER, rows, device=device, notes=[f"{note}, one GPU, in this run"])
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
