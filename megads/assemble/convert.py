"""The command line of tools/convert_checkpoint.py: from a step to Hugging Face, and back."""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from megads.assemble.export_hf import export_hf
from megads.assemble.import_hf import import_hf
from megads.checkpoint.store import describe_failure
from megads.errors import MegadsError
from megads.optim.precision import COMPUTE_DTYPES

UNITS = ("", "KB", "MB", "GB", "TB")


def main(argv: Sequence[str]) -> int:
    """Run the tool; returns its exit code."""
    options = _parser().parse_args(argv)
    start = time.monotonic()
    try:
        if options.to == "hf":
            report = export_hf(
                options.source,
                options.target,
                dtype=COMPUTE_DTYPES[options.dtype] if options.dtype else None,
                max_shard_bytes=options.max_shard_size,
                tokenizer=options.tokenizer,
            )
        else:
            report = import_hf(options.source, options.target, tokenizer=options.tokenizer)
    except MegadsError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(describe_failure(error), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; nothing was written", file=sys.stderr)
        return 130
    print(f"{options.target}: {report.num_tensors} tensors, {report.num_bytes:,} bytes, every bit read back")
    if report.comparison is not None:
        print(f"logits of transformers and megads: {report.comparison}")
    for note in report.notes:
        print(f"note: {note}")
    print(f"{time.monotonic() - start:.1f} s. Next:")
    if options.to == "hf":
        print(f'  transformers.AutoModelForCausalLM.from_pretrained("{options.target}")')
    else:
        print(f"  fill in {options.target / 'config.yaml'}")
        print(f"  python -m megads generate {options.target} --prompt TEXT")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="convert_checkpoint.py",
        description="Convert a checkpoint; the result is compared with the source before it exists.",
    )
    parser.add_argument(
        "source", type=Path, metavar="SRC", help="run, checkpoints or step; Hugging Face directory"
    )
    parser.add_argument("target", type=Path, metavar="DST", help="a new directory")
    parser.add_argument("--to", required=True, choices=("hf", "megads"), help="format of DST")
    parser.add_argument(
        "--dtype", choices=tuple(COMPUTE_DTYPES), help="of exported weights (default: as they were saved)"
    )
    parser.add_argument(
        "--max-shard-size",
        type=_size,
        default="5GB",
        metavar="SIZE",
        help="largest exported file, e.g. 500MB (default %(default)s)",
    )
    parser.add_argument(
        "--tokenizer", type=Path, metavar="FILE", help="default: the one that SRC names or holds"
    )
    return parser


def _size(text: str) -> int:
    """Bytes of a text such as 5GB (powers of 1000)."""
    match = re.fullmatch(r"(\d{1,15})([KMGT]B)?", text)
    if match is None or int(match[1]) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no size (allowed: such as 500MB or 5GB)")
    factor: int = 1000 ** UNITS.index(match[2] or "")
    return int(match[1]) * factor
