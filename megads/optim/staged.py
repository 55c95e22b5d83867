"""AdamW whose state is not kept as the kernel reads it: moments in bfloat16, or everything in the host's memory.

The update goes over the shares in chunks; what a chunk needs is brought into float32 buffers on the device (a *lane*),
updated by torch's fused kernel, and brought back:

    host      master, moments of chunk 1         2         3              pinned memory
    lane 0    up 1  update 1  down 1   |   up 3  update 3  down 3         up, update and down of neighbours overlap, so
    lane 1          up 2      update 2  down 2   |   ...                  both directions of the bus are busy

Weights are made of a chunk while its master is on the device. With 12 bytes of state an element (8 with bfloat16
moments) each way, a step's update takes no less than that over the bus: for 1.3e9 parameters at 25 GB/s (PCIe 4 x16)
0.6 s. Updating on the host instead would send 4 bytes down and 2 up, but passes over 30 bytes an element of the host's
memory (at the 40 GB/s of a desktop 1 s), takes the data loader's processor, and gives other bits than the device.
What is skipped, and by which factor gradients are scaled, is read on the device, so the host waits for nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from megads.config.optim import OptimConfig
from megads.optim.group import ParameterGroup
from megads.optim.rounding import round_at_random_
from megads.optim.share import Share
from megads.optim.update import MOMENTS

CHUNK = 2**22
"""Elements of a chunk: 16 MiB of float32, large enough for the bus and small enough for a cache."""


class _Lane:
    """Buffers on the device for the state of one chunk, and when they are free.

    Args:
        size: elements.
        narrow: dtype in which moments are kept.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, *, narrow: torch.dtype, size: int) -> None:
        self.wide = [torch.empty(size, dtype=dtype, device=device) for _ in range(3)]
        num_narrow = 0 if narrow == dtype else 2
        self.narrow = [torch.empty(size, dtype=narrow, device=device) for _ in range(num_narrow)]
        self.is_free: torch.cuda.Event | None = None


class StagedAdamW:
    """`Update` by AdamW, of masters where they are, with moments beside them in the dtype that the config says.

    Args:
        gradients: of each share, flat, on the device.
    """

    moments = MOMENTS["adamw"]

    def __init__(self, shares: Sequence[Share], gradients: Sequence[Tensor], *, config: OptimConfig) -> None:
        self.shares: tuple[Share, ...] = tuple(shares)
        self._gradients = tuple(gradients)
        self._config = config
        self._device, self._dtype = gradients[0].device, gradients[0].dtype
        self._narrow = torch.bfloat16 if config.moment_dtype == "bf16" else self._dtype
        self._moments: dict[Tensor, tuple[Tensor, ...]] = {}
        self._steps = torch.zeros((), device=self._device)
        self._up: torch.cuda.Stream | None = None
        self._down: torch.cuda.Stream | None = None
        if config.offload and self._device.type == "cuda":
            self._up = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            self._down = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]

    @property
    def num_steps(self) -> int:
        """See `Update`."""
        return int(self._steps)

    def start(self) -> None:
        """See `Update`."""
        for share in self.shares:
            self._moments[share.master] = tuple(
                torch.zeros_like(share.master, dtype=self._narrow, pin_memory=self._up is not None)
                for _ in self.moments
            )

    def load_steps(self, num_steps: int) -> None:
        """See `Update`."""
        self._steps.fill_(float(num_steps))

    def states(self, master: Tensor) -> Iterator[tuple[str, Tensor]]:
        """See `Update`."""
        yield from zip(self.moments, self._moments[master], strict=True)

    def settle(self) -> None:
        """Wait until the state in the host's memory is that of the last step."""
        if self._down is not None:
            self._down.synchronize()

    @torch.no_grad()
    def step(self, *, lr: float, factor: Tensor, finite: Tensor) -> None:
        """See `Update`. Weights are written too where masters are in the host's memory."""
        scale: Tensor | None = (1.0 / factor).float()
        if self._dtype == torch.float64:
            scale = None
            for gradient in self._gradients:  # the kernel takes a factor in float32 alone
                gradient.mul_(factor)
        found_inf = (~finite).float()
        size = min(CHUNK, max(gradient.numel() for gradient in self._gradients))
        lanes = [
            _Lane(self._device, self._dtype, narrow=self._narrow, size=size)
            for _ in range(2 if self._config.offload else 1)
        ]
        if self._up is not None and self._down is not None:
            self._up.wait_stream(self._down)  # state of the step before is down
            self._up.wait_stream(torch.cuda.current_stream())  # the lanes' memory is free
        number = 0
        for share, gradient in zip(self.shares, self._gradients, strict=True):
            for start in range(0, gradient.numel(), CHUNK):
                part = slice(start, min(start + CHUNK, gradient.numel()))
                self._update(
                    share,
                    gradient,
                    part=part,
                    lane=lanes[number % len(lanes)],
                    lr=lr,
                    scale=scale,
                    found_inf=found_inf,
                )
                number += 1
        self._steps.add_(finite)
        if self._down is not None:
            torch.cuda.current_stream().wait_stream(self._down)  # before the lanes' memory is used again

    def _update(
        self,
        share: Share,
        gradient: Tensor,
        *,
        part: slice,
        lane: _Lane,
        lr: float,
        scale: Tensor | None,
        found_inf: Tensor,
    ) -> None:
        """Update one chunk."""
        group = share.bucket.traits.group
        assert isinstance(group, ParameterGroup)  # `stage_buckets` made it
        kept = [share.master[part], *(moment[part] for moment in self._moments[share.master])]
        state = self._bring(kept, lane)
        adamw(
            [state[0]],
            [gradient[part]],
            [state[1]],
            [state[2]],
            [],
            [self._steps.clone()],
            fused=True,
            grad_scale=scale,
            found_inf=found_inf,
            amsgrad=False,
            beta1=self._config.betas[0],
            beta2=self._config.betas[1],
            lr=lr * group.lr_scale,
            weight_decay=group.weight_decay,
            eps=group.eps,
            maximize=False,
        )
        if self._config.offload:
            bucket = share.bucket
            bucket.held(bucket.values)[part].copy_(state[0])
        self._take_back(kept, state, lane)

    def _bring(self, kept: Sequence[Tensor], lane: _Lane) -> list[Tensor]:
        """Master and moments of a chunk in the gradient's dtype on the device: themselves, where they are that."""
        size = kept[0].numel()
        arrived = list(kept)
        with self._on(self._up):
            if self._up is not None and lane.is_free is not None:
                self._up.wait_event(lane.is_free)
            if self._config.offload:
                buffers = [lane.wide[0], *(lane.narrow or lane.wide[1:])]
                arrived = [b[:size].copy_(k, non_blocking=True) for b, k in zip(buffers, kept, strict=True)]
        if self._up is not None:
            torch.cuda.current_stream().wait_stream(self._up)
        wide = (lane.wide[number][:size] for number in range(3))
        return [a if a.dtype == self._dtype else w.copy_(a) for a, w in zip(arrived, wide, strict=True)]

    def _take_back(self, kept: Sequence[Tensor], state: Sequence[Tensor], lane: _Lane) -> None:
        """Bring a chunk's state to where it is kept."""
        size = kept[0].numel()
        leaving = list(state)
        if self._narrow != self._dtype:
            salt = self._steps.to(torch.int32) * 2
            for number in (1, 2):
                out = lane.narrow[number - 1][:size] if self._config.offload else kept[number]
                round_at_random_(out, state[number], salt=salt + number)
                leaving[number] = out
        if not self._config.offload:
            return
        if self._down is not None:
            self._down.wait_stream(torch.cuda.current_stream())
        with self._on(self._down):
            for to, leaves in zip(kept, leaving, strict=True):
                to.copy_(leaves, non_blocking=True)
            if self._down is not None:
                lane.is_free = self._down.record_event()

    def _on(self, stream: torch.cuda.Stream | None) -> AbstractContextManager[object]:
        return nullcontext() if stream is None else torch.cuda.stream(stream)
