"""muP's coordinate check and the transfer of the learning rate, at widths that a CPU trains in a minute.

    python -m tools.bench.mup                  sizes of activations after a few steps, by width, without and with muP
    python -m tools.bench.mup --rates          losses by width and learning rate: does the best rate stay?
    python -m tools.bench.mup --widths 64 128 --steps 2

Printed is the root mean square of what a module's output changed by since step 0 on the same batch, and how it grows
with the width: 0 is flat, 0.5 the root. Under muP no module's grows; without it some do, so that a wider model wants a
lower rate (Yang et al. 2022, appendix D). Widths grow by more heads, or by wider heads with `--heads`.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from megads.assemble.step import train_step
from megads.config.batch import BatchConfig
from megads.config.data import DataConfig
from megads.config.model import ModelConfig
from megads.config.optim import OptimConfig
from megads.config.parallel import ParallelConfig
from megads.config.root import Config
from megads.config.run import RunConfig
from megads.parallel.control import Control
from megads.pipeline.stage import BlockOutput
from megads.verify.batch import synthetic_batch
from megads.verify.measure import Trainee
from tools.bench.measure import print_table

WIDTHS = (64, 128, 256, 512)
BASE, HEAD_DIM = 64, 16
CPU = torch.device("cpu")
WATCHED = ("attention", "mlp")
RATES = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)


def config_of(
    width: int, *, is_scaled: bool, has_wide_heads: bool = False, optimizer: str = "adamw"
) -> Config:
    """A tiny Llama of this width; with muP if it `is_scaled`."""
    head_dim = HEAD_DIM * width // BASE if has_wide_heads else HEAD_DIM
    model = ModelConfig(
        family="llama",
        layers=2,
        hidden=width,
        heads=width // head_dim,
        ffn=2 * width,
        vocab=97,
        init_std=0.05,
        mup_base_hidden=BASE if is_scaled else None,
        mup_base_head_dim=HEAD_DIM if is_scaled and has_wide_heads else None,
    )
    return Config(
        run=RunConfig(steps=100, seed=3),
        model=model,
        batch=BatchConfig(global_size=8, micro=8),
        data=DataConfig(train="unused", tokenizer="unused", sequence_length=16),
        optim=OptimConfig(name=optimizer, lr=1e-2, clip=None, weight_decay=0.0),
        parallel=ParallelConfig(),
    )


def train(config: Config, *, steps: int, lr: float) -> tuple[Trainee, float]:
    """A trained model and its last loss; all steps are on one batch."""
    trainee = Trainee.build(config, Control(0, 1, None), masks="whole")
    batch, loss = synthetic_batch(config, 1, masks="whole"), math.nan
    for _ in range(steps):
        result = train_step(batch, executor=trainee.executor, engine=trainee.engine, mesh=trainee.mesh, lr=lr)
        loss = float(result.loss)
    return trainee, loss


def outputs(trainee: Trainee) -> dict[str, Tensor]:
    """What modules make of the batch: branches and blocks of every layer, and the logits."""
    found: dict[str, Tensor] = {}
    batch = synthetic_batch(trainee.config, 1, masks="whole")
    (blocks,) = trainee.model.stages.values()
    handles = [
        module.register_forward_hook(lambda _, __, y, name=f"layers.{number}.{name}": found.update({name: y}))
        for number, block in enumerate(list(blocks)[1:-1])
        for name, module in block.named_children()
        if name in WATCHED
    ]
    with torch.no_grad():
        payload: tuple[Tensor, ...] = ()
        for number, block in enumerate(blocks):
            if number == len(blocks) - 1:
                found["logits"] = block.logits(payload)
                break
            output: BlockOutput = block(payload, batch)
            payload = output.payload
            found["embedding" if number == 0 else f"layers.{number - 1}"] = payload[0]
    for handle in handles:
        handle.remove()
    return found


def changes(config: Config, *, steps: int, lr: float) -> dict[str, float]:
    """Root mean square of the change of every output in the steps."""
    before = outputs(train(config, steps=0, lr=lr)[0])
    after = outputs(train(config, steps=steps, lr=lr)[0])
    return {name: float((after[name] - y).double().square().mean().sqrt()) for name, y in before.items()}


def growth(by_width: Mapping[int, float]) -> float:
    """Slope of log(value) over log(width), by least squares."""
    x = [math.log(width) for width in by_width]
    y = [math.log(value) for value in by_width.values()]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    covariance = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return covariance / sum((a - mean_x) ** 2 for a in x)


def coordinates(
    widths: Sequence[int], *, is_scaled: bool, steps: int, lr: float, has_wide_heads: bool = False
) -> dict[str, dict[int, float]]:
    """Output -> width -> change."""
    found: dict[str, dict[int, float]] = {}
    for width in widths:
        config = config_of(width, is_scaled=is_scaled, has_wide_heads=has_wide_heads)
        for name, value in changes(config, steps=steps, lr=lr).items():
            found.setdefault(name, {})[width] = value
    return found


def best_rate(width: int, *, is_scaled: bool, steps: int, rates: Sequence[float]) -> dict[float, float]:
    """Learning rate -> the last loss."""
    config = config_of(width, is_scaled=is_scaled)
    return {rate: train(config, steps=steps, lr=rate)[1] for rate in rates}


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--widths", type=int, nargs="+", default=list(WIDTHS))
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--heads", action="store_true", help="wider heads, not more of them")
    parser.add_argument("--rates", action="store_true", help="losses by learning rate")
    given = parser.parse_args(arguments)
    for is_scaled in (False, True):
        print(f"\n{'muP' if is_scaled else 'standard'}: base width {BASE}, {given.steps} steps")
        if given.rates:
            rows = []
            for width in given.widths:
                losses = best_rate(width, is_scaled=is_scaled, steps=given.steps, rates=RATES)
                best = min(losses, key=lambda rate: losses[rate])
                rows.append((str(width), *(f"{loss:.3f}" for loss in losses.values()), f"{best:g}"))
            print_table(("width", *(f"{rate:g}" for rate in RATES), "best"), rows, device=CPU)
            continue
        found = coordinates(
            given.widths, is_scaled=is_scaled, steps=given.steps, lr=given.lr, has_wide_heads=given.heads
        )
        rows = [
            (name, *(f"{value:.3g}" for value in values.values()), f"{growth(values):+.2f}")
            for name, values in found.items()
        ]
        print_table(("output", *map(str, given.widths), "growth"), rows, device=CPU)


if __name__ == "__main__":
    main()
