"""Parts of the section `optim` that say how parameters are updated: groups of them, and Muon."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from megads.config.section import Text, section


@section
class GroupConfig:
    """Parameters whose logical names a pattern matches, and what holds for them in place of the rest of `optim`."""

    match: Text
    """Pattern of logical names; * stands for any text, dots too: "*.bias", "embedding.*", "layers.[01].mlp.*"."""
    optimizer: Literal["adamw", "muon"] | None = None
    """With `optim.name=muon`: who updates them; null: muon the weights of attention and feed-forward layers, adamw the
    rest."""
    lr_scale: PositiveFloat | None = None
    """What the learning rate is multiplied by; null: 1."""
    weight_decay: NonNegativeFloat | None = None
    """Decoupled weight decay; null: `optim.weight_decay` for matrices, 0 for vectors."""
    eps: PositiveFloat | None = None
    """Adam's constant beside the square root; null: `optim.eps`."""


@section
class MuonConfig:
    """Muon (Jordan et al. 2024): momentum, orthogonalised matrix by matrix."""

    momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.95
    """Decay rate of the running average of gradients."""
    nesterov: bool = True
    """Whether the gradient is added to its average once more."""
    coefficients: Literal["quintic", "deepseek_v4"] = "quintic"
    """Of the Newton-Schulz iteration. quintic: 3.4445, -4.775, 2.0315; singular values become 0.7 to 1.1. deepseek_v4:
    two steps of 2, -1.5, 0.5 follow, which with `steps` 8 bring them to 1."""
    steps: PositiveInt = 5
    """Quintic Newton-Schulz steps."""
    scale: Literal["match_rms_adamw", "original"] = "match_rms_adamw"
    """Size of the step of a matrix [a, b]. match_rms_adamw: 0.2 sqrt(max(a, b)), as large as AdamW's, whose learning
    rate and decay then serve (Moonlight). original: sqrt(max(1, a / b))."""
    dtype: Literal["bf16", "master"] | None = None
    """Arithmetic of the iteration. bf16, or that of the masters; null: bf16 where `optim.precision` is bf16 or fp16."""
    adamw_lr: PositiveFloat | None = None
    """Peak learning rate of what AdamW updates; null: `optim.lr`."""
