"""The command line of tools/convert_checkpoint.py: from any format that is known to any that is written.

SRC --detect--> import_*.py --> Origin --> import_checkpoint.py or export_*.py --> DST, whole or not at all
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from megads.assemble import export_deepspeed, export_hf, export_megatron
from megads.assemble.conversion import Renaming, Report, table_of
from megads.assemble.export_deepspeed import Names
from megads.assemble.export_megatron import MegatronLayout
from megads.assemble.import_checkpoint import import_checkpoint
from megads.assemble.import_deepspeed import open_deepspeed_checkpoint
from megads.assemble.import_hf import open_hf
from megads.assemble.import_megatron import open_megatron_lm
from megads.assemble.origin import Hints, Origin, open_megads
from megads.checkpoint.foreign import PROGRAMS, detect
from megads.checkpoint.proof import PROOF_NAME
from megads.checkpoint.store import Store, describe_failure
from megads.errors import ConfigError, MegadsError
from megads.model.megatron import TransformerImpl
from megads.optim.precision import COMPUTE_DTYPES

UNITS = ("", "KB", "MB", "GB", "TB")
ONLY_FOR: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "tensor": ("megatron",),
        "pipeline": ("megatron",),
        "expert": ("megatron",),
        "virtual_stages": ("megatron",),
        "transformer_impl": ("megatron",),
        "names": ("deepspeed",),
        "max_shard_size": ("hf",),
        "dtype": ("hf", "megatron"),
        "fp8": ("hf",),
    }
)
"""Option -> the targets that it has a meaning for."""
NEXT: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "hf": ('transformers.AutoModelForCausalLM.from_pretrained("{target}")',),
        "megads": (
            "fill in {target}/config.yaml; python -m megads train {target}/config.yaml checkpoint.load={target}",
            "python -m megads generate {target} --prompt TEXT",
        ),
        "megatron": ("Megatron-LM: --load {target} --use-checkpoint-args --ckpt-format torch --finetune",),
        "deepspeed": (
            'DeepSpeed: "checkpoint": {{"load_universal": true}} in its config, engine.load_checkpoint("{target}")',
        ),
    }
)


def main(argv: Sequence[str]) -> int:
    """Run the tool; returns its exit code."""
    options = _parser().parse_args(argv)
    start = time.monotonic()
    try:
        _check(options)
        origin = open_origin(options.source, Hints(options.config, options.tokenizer, options.vocab))
        if options.dry_run:
            print(f"{origin.path}: {PROGRAMS[origin.format]}; nothing is written\n")
            print(table_of(renamings(origin, options)))
            return 0
        report = convert(origin, options)
    except MegadsError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(describe_failure(error), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; nothing was written", file=sys.stderr)
        return 130
    _say(report, options.target, to=options.to)
    print(f"{time.monotonic() - start:.1f} s. Next:")
    for line in NEXT[options.to]:
        print(f"  {line.format(target=options.target)}")
    return 0


def open_origin(source: Path, hints: Hints, *, store: Store | None = None) -> Origin:
    """Open a checkpoint of whatever format.

    Raises:
        CheckpointError: nothing there, no known format, damaged, or of a model that megads does not have.
        ConfigError: impossible sizes.
    """
    store = store or Store()
    found = detect(source, store=store)
    if found.format == "megads":
        return open_megads(found.path, hints, store=store)
    if found.format == "hf":
        return open_hf(found.path, hints)
    if found.format == "megatron":
        return open_megatron_lm(found.path, hints, store=store)
    return open_deepspeed_checkpoint(found, hints, store=store)


def convert(origin: Origin, options: argparse.Namespace) -> Report:
    """Write `origin` as the command line asks."""
    given: dict[str, Any] = {"weights": options.weights}
    if options.to == "megads":
        return import_checkpoint(origin, options.target, **given)
    if options.to == "deepspeed":
        return export_deepspeed.export_deepspeed(origin, options.target, names=options.names or "hf", **given)
    given["dtype"] = COMPUTE_DTYPES[options.dtype] if options.dtype else None
    if options.to == "hf":
        given["fp8"] = options.fp8
        if options.max_shard_size is not None:
            given["max_shard_bytes"] = options.max_shard_size
        return export_hf.export_hf(origin, options.target, **given)
    layout = MegatronLayout(options.tensor or 1, options.pipeline or 1, options.virtual_stages or 1)
    impl: TransformerImpl = options.transformer_impl or "transformer_engine"
    return export_megatron.export_megatron(origin, options.target, layout=layout, impl=impl, **given)


def renamings(origin: Origin, options: argparse.Namespace) -> list[Renaming]:
    """The rows of a dry run."""
    if options.to == "hf":
        return export_hf.renamings(origin)
    if options.to == "megatron":
        return export_megatron.renamings(origin, impl=options.transformer_impl or "transformer_engine")
    names: Names = "megads" if options.to == "megads" else options.names or "hf"
    return export_deepspeed.renamings(origin, names=names)


def _check(options: argparse.Namespace) -> None:
    """Refuse options that the target has no use for."""
    for name, targets in ONLY_FOR.items():
        if getattr(options, name) is not None and options.to not in targets:
            raise ConfigError(
                f"--{name.replace('_', '-')}: not with --to {options.to}",
                found=getattr(options, name),
                allowed=f"--to {' or '.join(targets)}",
            )
    if options.expert not in (None, 1):
        raise ConfigError(
            "--expert: the families that Megatron's table names have no experts",
            found=options.expert,
            allowed="1",
        )


def _say(report: Report, target: Path, *, to: str) -> None:
    print(f"{target}: {report.num_tensors} tensors, {report.num_bytes:,} bytes, every bit read back")
    print(f"from {report.origin.path} ({PROGRAMS[report.origin.format]}); hashes: {target / PROOF_NAME}")
    if report.comparison is not None:
        print(f"logits of transformers and megads: {report.comparison}")
    for note in report.notes:
        print(f"note: {note}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="convert_checkpoint.py",
        description="Convert a checkpoint; the result is compared with the source before it exists.",
    )
    add = parser.add_argument
    add(
        "source",
        type=Path,
        metavar="SRC",
        help="run or step of megads, Hugging Face directory, Megatron-LM or DeepSpeed checkpoint",
    )
    add("target", type=Path, metavar="DST", help="a new directory")
    add("--to", required=True, choices=tuple(NEXT), help="format of DST (deepspeed: universal)")
    add(
        "--dry-run",
        action="store_true",
        help="print what each tensor is called on both sides and write nothing",
    )
    add("--weights", default="model", metavar="KIND", help="model, or an average such as ema_0.999")
    add("--tokenizer", type=Path, metavar="FILE", help="default: the one that SRC names or holds")
    add(
        "--config",
        type=Path,
        metavar="FILE",
        help="config.json or config.yaml of a DeepSpeed checkpoint's model",
    )
    add(
        "--vocab",
        type=_count,
        metavar="N",
        help="token ids without padding, of a Megatron or DeepSpeed checkpoint",
    )
    for name in ("tensor", "pipeline", "expert", "virtual-stages"):
        add(f"--{name}", type=_count, metavar="N", help="layout of a Megatron checkpoint (default 1)")
    add(
        "--transformer-impl",
        choices=("transformer_engine", "local"),
        help="layers of the Megatron run that will load it (default transformer_engine)",
    )
    add("--names", choices=("hf", "megads"), help="of parameters in a DeepSpeed checkpoint (default hf)")
    add("--dtype", choices=tuple(COMPUTE_DTYPES), help="of exported weights (default: as they were saved)")
    add(
        "--fp8",
        choices=("float", "ue8m0"),
        help="store projections in FP8 with scales of their blocks, as DeepSeek-V3 (float) or V3.1 (powers of two)",
    )
    add("--max-shard-size", type=_size, metavar="SIZE", help="largest safetensors file (default 5GB)")
    return parser


def _count(text: str) -> int:
    if not re.fullmatch(r"[1-9]\d{0,8}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no number (allowed: 1, 2, ...)")
    return int(text)


def _size(text: str) -> int:
    """Bytes of a text such as 5GB (powers of 1000)."""
    match = re.fullmatch(r"(\d{1,15})([KMGT]B)?", text)
    if match is None or int(match[1]) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no size (allowed: such as 500MB or 5GB)")
    factor: int = 1000 ** UNITS.index(match[2] or "")
    return int(match[1]) * factor
