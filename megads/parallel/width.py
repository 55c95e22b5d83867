"""Maximal update parametrisation (muP): how a model that is m times as wide as its base model is scaled.

With these scales activations and their changes in a step keep their size at every width, so that the best learning rate
of a narrow model is that of a wide one. m is `model.hidden` / `model.mup_base_hidden`; ffn and the width of all heads
together are to grow alike.

    role        initial deviation   learning rate   weight decay   eps     gradient
    hidden      m^-1/2              m^-1            m              m^-1    m^-1
    embedding   1                   1               1              m^-1    m^-1      tokens, positions, output head
    vector      1                   1               1              m^-1    m^-1      biases, norms
    router      m^-1                m^-1            m              1       1         hidden -> a fixed number of scores
    logits      are multiplied by m^-1;  scores of attention by sqrt(base head width) / (head width)

Yang et al. 2022 (Tensor Programs V), table 8, for Adam; a router is an output without a multiplier (table 3). eps
stands beside gradients and shrinks as they do. Decay is the product of learning rate and `weight_decay`, which stays,
as in the authors' MuAdamW. Matrices that Muon updates keep learning rate and decay: the size of its step does not come
from the gradient. No torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from megads.parallel.shard import ShardSpec


@dataclass(frozen=True, slots=True)
class WidthRule:
    """Powers of m by which a role's deviation, learning rate, weight decay and eps are multiplied."""

    init: float
    lr: float
    weight_decay: float
    eps: float


RULES: Mapping[str, WidthRule] = MappingProxyType(
    {
        "hidden": WidthRule(-0.5, -1.0, 1.0, -1.0),
        "embedding": WidthRule(0.0, 0.0, 0.0, -1.0),
        "vector": WidthRule(0.0, 0.0, 0.0, -1.0),
        "router": WidthRule(-1.0, -1.0, 1.0, 0.0),
    }
)


def width_rule(spec: ShardSpec) -> WidthRule:
    """The rule of a parameter."""
    return RULES[spec.role if spec.decay else "vector"]
