"""The main job, end to end, on text that every machine has: the source of Python's standard library.

Started by `bash launch/quickstart.sh`. Every step is one of megads' own commands, printed before it runs, so
this file is also the example of how they fit together. What is done already is skipped.
"""

from __future__ import annotations

import argparse
import gzip
import json
import lzma
import os
import shlex
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

PACKAGES = (
    "asyncio",
    "collections",
    "concurrent",
    "email",
    "html",
    "http",
    "json",
    "logging",
    "unittest",
    "urllib",
)
HELD_OUT = 15  # every 15th file
CONFIG = "configs/quickstart.yaml"


def run(*command: str, capture: bool = False) -> str:
    """Print a command and run it; a failing one ends the quickstart with its exit code."""
    shown = ["python" if word == sys.executable else word for word in command]
    text = " ".join(map(shlex.quote, shown))
    print(f"\n$ {text if len(text) < 400 else text[:396] + ' ...'}", flush=True)
    done = subprocess.run(command, stdout=subprocess.PIPE if capture else None, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)
    return done.stdout or ""


def megads(*arguments: str, capture: bool = False) -> str:
    """Run a verb of megads."""
    return run(sys.executable, "-m", "megads", *arguments, capture=capture)


def source_files() -> tuple[list[Path], list[Path]]:
    """The standard library's source in order of name, split by file: (train, held out)."""
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted([*root.glob("*.py"), *(f for p in PACKAGES for f in (root / p).rglob("*.py"))])
    return [f for i, f in enumerate(files) if i % HELD_OUT], files[::HELD_OUT]


def prepare(data: Path) -> list[Path]:
    """Tokenizer and corpora; returns the held-out files."""
    train, valid = source_files()
    tokenizer = data / "tokenizer.model"
    data.mkdir(parents=True, exist_ok=True)
    if not tokenizer.exists():
        run(
            sys.executable, "tools/train_tokenizer.py", "--vocab-size", "4096", "--output", str(tokenizer),
            "--input", *map(str, train),
        )  # fmt: skip
    for name, files in (("train", train), ("valid", valid)):
        if not (data / f"{name}.json").exists():
            run(
                sys.executable, "tools/preprocess_data.py", "--tokenizer", str(tokenizer), "--append-eod",
                "--workers", "2", "--shuffle-seed", "1", "--output-prefix", str(data / name),
                "--input", *map(str, files),
            )  # fmt: skip
    return valid


def train(steps: int, overrides: list[str]) -> None:
    """First half on 4 ranks, tensor 2 x pipeline 2; second half on 2 ranks, data 2, from the checkpoint."""
    half = [f"run.steps={steps}", *overrides]
    megads("launch", "--nproc", "4", "--", "train", CONFIG, f"run.stop_after={steps // 2}", *half)
    megads(
        "launch", "--nproc", "2", "--", "train", CONFIG,
        "parallel.tensor=1", "parallel.pipeline=1", "batch.micro=8", *half,
    )  # fmt: skip


def main() -> None:
    """Run the whole job."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--dir", default="runs/quickstart", help="where everything goes (default %(default)s)"
    )
    parser.add_argument("--steps", type=int, default=800, help="optimizer steps (default %(default)s)")
    options = parser.parse_args()
    start = time.monotonic()
    home = Path(options.dir)
    data = home / "data"
    valid = prepare(data)
    overrides = [
        f"run.dir={home}", f"data.train={data}/train", f"data.valid={data}/valid",
        f"data.tokenizer={data}/tokenizer.model",
    ]  # fmt: skip
    train(options.steps, overrides)
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    score = json.loads(megads("evaluate", str(home), "--data", f"{data}/valid", "--json", capture=True))
    sample = megads(
        "generate", str(home), "--prompt", "def main(", "--tokens", "60", "--temperature", "0.7", capture=True
    )
    exported = home / "huggingface"
    if not exported.exists():
        run(sys.executable, "tools/convert_checkpoint.py", str(home), str(exported), "--to", "hf")
    text = b"".join(f.read_bytes() for f in valid)
    packed = {"gzip -9": gzip.compress(text, 9), "xz -9": lzma.compress(text, preset=9)}
    print(f"\nsample:\n{sample}")
    print(f"held-out text: {len(valid)} files, {len(text):,} bytes, step {score['step']}")
    print(f"  perplexity {score['perplexity']:.1f} a token")
    print(f"  {'this model':12}{score['bits_per_byte']:.3f} bits per byte")
    for name, content in packed.items():
        print(f"  {name:12}{8 * len(content) / len(text):.3f} bits per byte")
    print(f"done in {time.monotonic() - start:.0f} s. Next:")
    print(f"  python -m megads generate {home} --prompt 'import os' --temperature 0")
    print("  python -m megads schedule one_f_one_b --stages 4 --micro-batches 8 --svg schedule.svg")
    print(f"  python tools/inspect_checkpoint.py {home} --verify")


if __name__ == "__main__":
    main()
