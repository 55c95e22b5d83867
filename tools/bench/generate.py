"""Generation with a cache beside generation without, in tokens a second, and against what memory allows.

    python -m tools.bench.generate                       on a GPU
    python -m tools.bench.generate --device cpu --tiny   anywhere, to see that it runs

Floor of a token with a cache: every weight is read once, at the copy bandwidth of this run. The first token, for which
the whole prompt is computed, is timed apart. "same": tokens that both ways make alike, greedily (in bf16 the first
near-tie may part them).
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace

import torch

from megads.assemble.wiring import Model
from megads.config.model import ModelConfig
from megads.evaluate.generate import Generator, Sampling
from megads.layers.mla import MLASpec
from megads.model.catalog import describe
from megads.model.decoder import make_blocks
from megads.model.spec import DecoderSpec
from megads.ops.rope import RopeSpec
from megads.parallel.layout import Layout
from megads.parallel.mesh import build_mesh
from megads.parallel.parameter import Scope, fill
from tools.bench.measure import copy_gbps, print_table, seconds_of


@dataclass(frozen=True, slots=True)
class Case:
    """A model and a text: tokens of the prompt, and tokens that are made with the cache and without."""

    name: str
    config: ModelConfig
    prompt: int
    with_cache: int
    without: int
    has_latents: bool = False

    def spec(self) -> DecoderSpec:
        length = self.prompt + self.with_cache
        spec = describe(self.config, vocab=self.config.vocab or 1, sequence_length=length)
        if not self.has_latents:
            return spec
        heads = self.config.heads
        latents = MLASpec(
            heads=heads,
            q_lora=None,
            kv_lora=4 * self.config.hidden // heads,
            nope_dim=128,
            rope_dim=64,
            v_dim=128,
            norm_eps=1e-6,
            scale=192**-0.5,
        )
        return replace(spec, attention=latents, rope=RopeSpec(10000.0, is_interleaved=True))


def _llama(layers: int, hidden: int, heads: int, kv_heads: int) -> ModelConfig:
    return ModelConfig(
        family="llama", layers=layers, hidden=hidden, heads=heads, kv_heads=kv_heads, vocab=32000
    )


CASES = (
    Case("llama-1b", _llama(16, 2048, 32, 8), 2048, 128, 16),
    Case("latent-1b", _llama(16, 2048, 16, 16), 2048, 128, 16, has_latents=True),
)
TINY = (
    Case("tiny", _llama(2, 64, 4, 2), 64, 8, 4),
    Case("tiny-latent", _llama(2, 64, 4, 4), 64, 8, 4, has_latents=True),
)


def measured(case: Case, *, device: torch.device, dtype: torch.dtype, bandwidth: float) -> list[str]:
    """One row of the table."""
    mesh = build_mesh(Layout(), 0, device=device)
    spec, scope = case.spec(), Scope(mesh, dtype, 0)
    blocks = make_blocks(scope, spec, stages={0: range(spec.num_blocks)})
    model = Model(spec, blocks, False, scope.queue)
    for parameter in model.parameters:
        fill(parameter, seed=0)
    prompt = torch.arange(case.prompt).remainder(spec.vocab).tolist()
    made: dict[bool, list[int]] = {}

    def seconds(num_tokens: int, *, has_cache: bool) -> float:
        generator = Generator(model, mesh, has_cache=has_cache)

        def run() -> None:
            made[has_cache] = generator.extend(prompt, num_tokens=num_tokens, sampling=Sampling(0.0))

        run()  # once to warm up
        return min(seconds_of(run, device, repeats=2))

    first = seconds(1, has_cache=True)
    cached = (seconds(case.with_cache, has_cache=True) - first) / (case.with_cache - 1)
    plain = seconds(case.without, has_cache=False) / case.without
    same = sum(a == b for a, b in zip(made[True], made[False], strict=False))
    size = sum(p.numel() * p.element_size() for p in model.parameters)
    floor = size / bandwidth
    return [
        case.name,
        f"{case.prompt}+{case.with_cache}",
        f"{1e3 * first:.1f}",
        f"{1 / cached:.1f}",
        f"{1 / plain:.1f}",
        f"{plain / cached:.1f}x",
        f"{100 * floor / cached:.0f}%",
        f"{same}/{case.without}",
    ]


def main() -> None:
    """Measure all cases and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="two small models, few tokens")
    options = parser.parse_args()
    device = torch.device(options.device)
    dtype = torch.float32 if options.tiny else torch.bfloat16
    gbps = copy_gbps(device, num_bytes=1 << 22 if options.tiny else 2 << 30)
    rows = [
        measured(case, device=device, dtype=dtype, bandwidth=1e9 * gbps)
        for case in (TINY if options.tiny else CASES)
    ]
    header = ("model", "tokens", "first ms", "tok/s cache", "tok/s without", "speed-up", "of floor", "same")
    print_table(header, rows, device=device, notes=[f"{dtype}; one text; copy {gbps:.0f} GB/s in this run"])


if __name__ == "__main__":
    main()
