"""What tools/preprocess_data.py prints at its end.

Lives here: the report and its table. Does not live here: progress while it works (progress).
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from megads.data.corpus import Manifest
from megads.data.pack import PackManifest
from megads.data.preprocess_options import Options
from megads.data.progress import duration

NUM_NAMED_KINDS = 8
"""Kinds of files left out that the summary names."""


@dataclass(frozen=True, slots=True)
class Report:
    """What was made."""

    prefixes: tuple[str, ...]
    """PREFIX of each corpus."""
    manifests: tuple[Manifest, ...]
    """Of each corpus."""
    left_out: Mapping[str, int]
    """Files inside input folders that are of no known kind: suffix -> how many."""
    packs: tuple[PackManifest, ...]
    input_bytes: int
    seconds: float


def print_summary(options: Options, report: Report) -> None:
    """What was made, and what to do next."""
    rows = list(_rows(report))
    width = max(len(name) for name, _ in rows)
    for name, text in rows:
        print(f"{name:<{width}}  {text}")
    first = report.manifests[0]
    for line in first.bad:
        print(f"skipped {line}")
    if first.num_bad > len(first.bad):
        print(f"all {first.num_bad} stand in {options.output_prefix}.bad.jsonl")
    keys = [
        f"data.{part}={prefix}" for part, prefix in zip(("train", "valid"), report.prefixes, strict=False)
    ]
    print(f"next: python -m megads train CONFIG {shlex.join((*keys, f'data.tokenizer={options.tokenizer}'))}")


def _rows(report: Report) -> Iterator[tuple[str, str]]:
    for prefix, manifest in zip(report.prefixes, report.manifests, strict=True):
        yield "corpus", prefix + (f" ({manifest.part})" if manifest.part != "all" else "")
        yield "  documents", f"{manifest.documents:,}"
        yield "  tokens", f"{manifest.tokens:,}"
        yield "  text", f"{manifest.text_bytes:,} bytes, {manifest.text_bytes / manifest.tokens:.3f} a token"
        yield "  longest", f"{manifest.longest:,} tokens"
    for pack in report.packs:
        yield "packed", f"{pack.rows:,} rows of {pack.length:,} tokens, {100 * pack.fill:.1f}% full"
    first = report.manifests[0]
    for name, count in (
        ("empty", first.num_empty),
        ("filtered", first.num_filtered),
        ("duplicates", first.num_duplicates),
        ("skipped", first.num_bad),
    ):
        if count:
            yield name, f"{count:,} document{'s' * (count != 1)}"
    if report.left_out:
        most = sorted(report.left_out.items(), key=lambda item: -item[1])[:NUM_NAMED_KINDS]
        kinds = ", ".join(f"{count} {suffix}" for suffix, count in most)
        yield "left out", f"{sum(report.left_out.values()):,} files of other kinds, most: {kinds}"
    yield "engine", first.engine
    tokens = sum(manifest.tokens for manifest in report.manifests)
    read, made = (count / 1e6 / report.seconds for count in (report.input_bytes, tokens))
    yield "time", f"{duration(report.seconds)} ({read:.1f} MB/s of input, {made:.2f} M tokens/s)"
