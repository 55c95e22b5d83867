"""The DeepSpeed engine: DeepSpeed's ZeRO stages 0 to 3 under megads' own executor.

The executor may run any schedule because DeepSpeed sees nothing of it. A *twin* is one flat parameter a bucket, the
only kind that DeepSpeed knows; the model's parameters are views of a bucket's memory. What DeepSpeed gets, and when:

    stage   weights                  gradients                                          file
    0       whole                    whole, summed once a step                          deepspeed_whole.py
    1, 2    whole                    whole in float32, handed over once a step,         deepspeed_sliced.py
                                     rounded once to the compute dtype
    3       gathered block by block  of one block at a time, handed over in float32     deepspeed_gathered.py
                                     once a micro-batch

DeepSpeed sums, updates, cuts and offloads. Norm, clip factor, gate and loss scale are the native engine's, and reach
the update through torch's fused optimizer (`grad_scale`, `found_inf`). State is seen as views of DeepSpeed's flat
float32 partitions, so a checkpoint does not tell which engine wrote it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from megads.config.optim import OptimConfig
from megads.optim.clip import clip_factor, global_norm
from megads.optim.deepspeed_gathered import GatheredTwins
from megads.optim.deepspeed_sliced import SlicedTwins
from megads.optim.deepspeed_twin import Held, Twins
from megads.optim.deepspeed_whole import WholeTwins
from megads.optim.engine import Guard, StepReport
from megads.optim.precision import LossScale
from megads.optim.share import Share
from megads.optim.update import MOMENTS
from megads.parallel.mesh import Mesh
from megads.parallel.parameter import Piece
from megads.parallel.tally import TallyTable

_log = logging.getLogger("megads.optim")


class DeepSpeedEngine:
    """Gradients and optimizer state of the parameters of this rank's stages, updated by DeepSpeed.

    All ranks make it together.

    Args:
        stages: stage number -> its blocks, with initial weights in float32.
        config: `optim` section; its `deepspeed` keys go to DeepSpeed as they are.
        tallies: the modules whose state moves by what they count; None: there are none.

    Raises:
        ConfigError: deepspeed is not installed, or refuses a key.
    """

    def __init__(
        self,
        stages: Mapping[int, torch.nn.ModuleList],
        mesh: Mesh,
        *,
        config: OptimConfig,
        tallies: TallyTable | None = None,
    ) -> None:
        self._mesh = mesh
        self._tallies = tallies or TallyTable((), mesh, rows=0, columns=0)
        self._config = config
        self._scale = LossScale(mesh.device, config)
        self._twins: Twins = _twins_of(config.zero_stage)(stages, mesh, config=config)
        self._held = self._twins.held()
        self._start_moments()
        _log.info(
            "DeepSpeed ZeRO-%d: optimizer state is cut into %d; %s",
            config.zero_stage,
            mesh.group("dp_cp").size if config.zero_stage else 1,
            self._twins.cost,
        )

    def _start_moments(self) -> None:
        """Make the optimizer's state, so that loading can fill it before the first step."""
        names = MOMENTS[self._config.name]
        for held in self._held if names else ():
            if held.partition not in self._twins.optimizer.state:
                self._twins.optimizer.state[held.partition] = {
                    "step": torch.zeros((), device=held.partition.device),
                    **{name: torch.zeros_like(held.partition.detach()) for name in names},
                }

    @property
    def loss_scale(self) -> Tensor:
        """What the loss is multiplied by before the backward."""
        return self._scale.value

    def zero_gradients(self) -> None:
        """Start a step."""
        self._twins.start()
        self._tallies.start()

    @property
    def reduce_every(self) -> None:
        """None: DeepSpeed is told in `step`, or as blocks finish."""

    def arm(self, stage: int, *, waiting: Sequence[Tensor] | None = None) -> None:
        """Nothing: DeepSpeed is told in `step`, or as blocks finish."""

    def complete(self, stage: int, parameter: Tensor) -> None:
        """Nothing: DeepSpeed is told in `step`, or as blocks finish."""

    def reduce(self, stage: int) -> None:
        """Nothing: DeepSpeed is told in `step`, or as blocks finish."""

    def step(self, *, lr: float, guard: Guard | None = None) -> StepReport:
        """Reduce, clip by the global norm and update; a step with a gradient that is not finite changes nothing."""
        gradients = self._twins.reduce()
        count = self._twins.num_summands  # DeepSpeed's mean, where it takes one, is undone here alone
        norm = self._norm(gradients) * count / self._scale.value
        finite = norm.isfinite()
        taken = finite if guard is None else finite & guard.admits(norm)
        factor = clip_factor(norm, self._config.clip) * count / self._scale.value
        optimizer = self._twins.optimizer
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        device = self._held[0].partition.device if self._held else self._mesh.device
        optimizer.grad_scale = (1.0 / factor).float().to(device)  # type: ignore[attr-defined]
        optimizer.found_inf = (~taken).float().to(device)  # type: ignore[attr-defined]
        self._twins.update()
        self._scale.update(finite)
        return StepReport(norm, finite, taken, self._scale.value, self._tallies.finish(is_valid=taken))

    def _norm(self, gradients: Sequence[Tensor]) -> Tensor:
        """Global norm of the loss-scaled gradients, as DeepSpeed reduced them."""
        reduced = list(zip(self._held, gradients, strict=True))
        return global_norm(
            [gradient[held.share.owned] for held, gradient in reduced if held.share.bucket.traits.is_primary],
            [gradient for held, gradient in reduced if not held.share.bucket.traits.is_primary],
            group=self._mesh.group("world"),
            device=self._mesh.device,
        )

    def shares(self) -> tuple[Share, ...]:
        """What this rank updates."""
        return tuple(held.share for held in self._held)

    def _states(self) -> Iterator[tuple[Share, str, Tensor]]:
        """Everything flat that belongs to a share, by kind, as views."""
        for held in self._held:
            yield held.share, "model", held.share.master
            for name in MOMENTS[self._config.name]:
                yield held.share, f"optim/{name}", self._moment(held, name)

    def _moment(self, held: Held, name: str) -> Tensor:
        flat: Tensor = self._twins.optimizer.state[held.partition][name]
        return flat[held.span]

    def state(self) -> tuple[Piece, ...]:
        """This rank's share of masters, moments, and what layers keep."""
        owned = (p for share, kind, flat in self._states() for p in share.owned_pieces(flat, kind=kind))
        return (*owned, *self._tallies.primary_pieces())

    def targets(self) -> tuple[Piece, ...]:
        """Everything this rank updates; `load_scalars` makes weights of it."""
        held = (p for share, kind, flat in self._states() for p in share.pieces(flat, kind=kind))
        return (*held, *self._tallies.pieces())

    def scalars(self) -> Mapping[str, Any]:
        """Adam's step count (steps that were skipped do not count) and the loss scale."""
        steps = {int(state["step"]) for state in self._twins.optimizer.state.values() if "step" in state}
        return {"name": self._config.name, "step": max(steps, default=0), **self._scale.state()}

    def load_scalars(self, scalars: Mapping[str, Any]) -> None:
        """Take back what `scalars` gave, after `targets` were filled: weights are current from here on."""
        for state in self._twins.optimizer.state.values():
            if "step" in state:
                state["step"].fill_(float(scalars["step"]))
        self._scale.load(scalars)
        self._twins.publish()


def _twins_of(zero_stage: int) -> type[WholeTwins] | type[SlicedTwins] | type[GatheredTwins]:
    if zero_stage == 0:
        return WholeTwins
    return GatheredTwins if zero_stage == 3 else SlicedTwins
