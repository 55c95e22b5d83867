"""What layers keep for their backward, in the host's memory.

    forward    device  | layer 0 | layer 1 | layer 2 | ...          backward   device  | layer 2 | layer 1 | layer 0 |
               copies            | out 0   | out 1   | out 2                   copies  | in 1    | in 0    |

Two buffers: the device waits for the copies of a layer before it goes beyond the next one, and frees what was copied
then; on the way back a layer is fetched while the one behind it computes. Numbers do not change: bits are copied. On a
CPU the same happens in one memory, for tests.

The hooks stand outside a layer's recompute, which then keeps (and moves) the layer's input alone. Parameters stay where
they are. What is made of kept tensors for a W is back on the device until then.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

MIN_BYTES = 1 << 20  # smaller tensors stay: a copy costs the host more than they cost the device


class _Slot:
    """A kept tensor: on the device, on the host, or on both."""

    def __init__(self, tensor: Tensor, host: Tensor, group: _Group) -> None:
        self.device: Tensor | None = tensor
        self.host: Tensor | None = host
        self.group = group
        self.num_uses = 0

    def take(self) -> Tensor:
        """The tensor for one of its uses; after the last one nothing is kept."""
        self.group.fetch()
        self.group.wait()
        if self.group.previous is not None:
            self.group.previous.fetch()
        tensor = self.device
        assert tensor is not None  # fetched above
        self.num_uses -= 1
        if self.num_uses == 0:
            self.device = self.host = None
        return tensor


class _Group:
    """What one layer keeps in one forward, moved together."""

    def __init__(self, previous: _Group | None, stream: torch.cuda.Stream | None) -> None:
        self.previous = previous
        self._stream = stream
        self._slots: dict[tuple[object, ...], _Slot] = {}
        self._copied: torch.cuda.Event | None = None
        self._fetched: torch.cuda.Event | None = None

    def keep(self, tensor: Tensor) -> _Slot:
        """Begin to copy a tensor to the host, once however often it is kept."""
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if (
            key not in self._slots
        ):  # its slot holds the memory while the layer runs, so no other tensor gets the key
            host = torch.empty_like(tensor, device="cpu", pin_memory=self._stream is not None)
            self._copy([(host, tensor)])
            self._slots[key] = _Slot(tensor, host, self)
        slot = self._slots[key]
        slot.num_uses += 1
        return slot

    def close(self) -> None:
        """The layer is over."""
        if self._stream is not None:
            self._copied = self._stream.record_event()

    def release(self) -> None:
        """Free the device's memory of what was copied, on the device not before the copies are done."""
        if self._copied is not None:
            torch.cuda.current_stream().wait_event(self._copied)
        for slot in self._slots.values():
            slot.device = None
        self._slots = {key: slot for key, slot in self._slots.items() if slot.host is not None}

    def fetch(self) -> None:
        """Begin to bring back what is not on the device."""
        pairs = []
        for slot in self._slots.values():
            if slot.device is None and slot.host is not None:
                device = slot.host.device if self._stream is None else self._stream.device
                slot.device = torch.empty_like(slot.host, device=device)
                pairs.append((slot.device, slot.host))
        if pairs:
            self._copy(pairs)
            self._fetched = None if self._stream is None else self._stream.record_event()

    def wait(self) -> None:
        """Let the device wait until what was fetched is there."""
        if self._fetched is not None:
            torch.cuda.current_stream().wait_event(self._fetched)
            self._fetched = None

    def _copy(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        """Copy beside the device's other work, after what it was given until now."""
        if self._stream is None:
            for target, source in pairs:
                target.copy_(source)
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for target, source in pairs:
                target.copy_(source, non_blocking=True)


class Offload:
    """Moves what the layers of one stage keep for their backward to the host and back."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._last: _Group | None = None

    @contextmanager
    def layer(self, module: torch.nn.Module, *, is_first: bool) -> Iterator[None]:
        """Inside runs the forward of one layer.

        Args:
            is_first: whether it is the first layer that a micro-batch meets here, so that none is fetched after it.
        """
        if not torch.is_grad_enabled():
            yield
            return
        weights = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
        group = _Group(None if is_first else self._last, self._stream)

        def pack(tensor: Tensor) -> Tensor | _Slot:
            size = tensor.numel() * tensor.element_size()
            if size < MIN_BYTES or tensor.untyped_storage().data_ptr() in weights:
                return tensor
            return group.keep(tensor)

        def unpack(kept: Tensor | _Slot) -> Tensor:
            return kept.take() if isinstance(kept, _Slot) else kept

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield
        if self._last is not None:
            self._last.release()
        group.close()
        self._last = group
