"""When the gradient buckets of a stage are reduced, and in which order.

Buckets lie in the order in which the backward finishes them. Inside a backward that is to be followed by a reduction
each is reduced as soon as its parameters are complete, while the backward goes on:

    ZeRO 0, 1    in the last backward of a step, once                 F B F B F B+reduce
    ZeRO 2       in every one, or every n-th, and in the last          F B+reduce F B+reduce F B+reduce

Buckets start in their fixed order, whichever is complete first, so that all ranks of a group issue the same collectives
in the same order; each pass over them takes all of them. What was not complete until the backward ended (a parameter
without gradient) starts in `flush`, and what another stage adds to (a tied parameter) in `finish`.

Of brief gradients at most two buckets are on their way at a time, so that a rank holds its slices, these two and what
the backward is writing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from weakref import WeakMethod, ref

from torch import Tensor

from megads.parallel.collectives import Pending
from megads.parallel.gradient import Bucket

MAX_BRIEF = 2


class Reducer:
    """Reduces the buckets of one stage, each as soon as its gradients are complete.

    `arm` is called before what completes the stage's gradients (a B, or a W), `flush` after it, `finish` when every
    stage of the rank is complete.

    Args:
        buckets: all with the same `Reduction`.
    """

    def __init__(self, buckets: Sequence[Bucket]) -> None:
        self._buckets = tuple(buckets)
        self._is_brief = any(bucket.reduction.is_brief for bucket in buckets)
        self._passing = [b for b in buckets if b.traits.tie is None or self._is_brief]
        self._tied = [b for b in buckets if b.traits.tie is not None]
        self._left: dict[int, int] = {}
        self._pending: list[tuple[Bucket, Pending]] = []
        self._next = 0
        self.num_early = 0  # buckets that started before the backward was over, in the last pass
        self._number_of: dict[int, int] = {}
        for number, bucket in enumerate(self._passing):
            for place in bucket.places:
                self._number_of[id(place.parameter)] = number
                # hooks are kept where the garbage collector does not look: a strong reference would keep all for ever
                place.parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                    partial(_call, WeakMethod(self._complete), number)
                )
        for bucket in self._buckets if self._is_brief else ():
            for place in bucket.places:
                place.parameter.open_gradient = bucket.open
                place.parameter.register_hook(partial(_open, ref(bucket)))  # type: ignore[no-untyped-call]

    def zero(self) -> None:
        """Begin a step."""
        for bucket in self._buckets:
            bucket.zero()

    def arm(self, *, waiting: Sequence[Tensor] | None = None) -> None:
        """What comes next completes gradients of the stage that are to be reduced.

        Args:
            waiting: parameters that are told to `complete`, all others being complete: a W, in which no hook is called
                (autograd called them all in I, whether or not there was a gradient). None: a whole backward, which
                calls the hook of each parameter after its gradient is there.
        """
        wanted = None if waiting is None else {id(parameter) for parameter in waiting}
        self._left = {
            number: sum(wanted is None or id(place.parameter) in wanted for place in bucket.places)
            for number, bucket in enumerate(self._passing)
        }
        self._next = 0
        self._advance()

    def complete(self, parameter: Tensor) -> None:
        """One of the parameters that were waiting has its gradient; any other is none of this stage's early ones."""
        number = self._number_of.get(id(parameter))
        if number is not None:
            self._complete(number, parameter)

    def _complete(self, number: int, _: Tensor) -> None:
        """One parameter of a bucket has its gradient."""
        if not self._left:
            return
        self._left[number] -= 1
        self._advance()

    def _advance(self) -> None:
        """Start the buckets that are complete and whose turn it is."""
        while self._next < len(self._passing) and self._left[self._next] == 0:
            self._start(self._passing[self._next])
            self._next += 1

    def _start(self, bucket: Bucket) -> None:
        bucket.open()
        self._pending.append((bucket, bucket.start_reduce()))
        while self._is_brief and len(self._pending) > MAX_BRIEF:
            self._add_first()

    def _add_first(self) -> None:
        bucket, pending = self._pending.pop(0)
        bucket.add(pending)

    def flush(self) -> None:
        """The gradients are complete: start what has not started."""
        self.num_early = self._next
        for bucket in self._passing[self._next :]:
            self._start(bucket)
        self._left, self._next = {}, 0

    def finish(self) -> None:
        """Every stage of this rank is complete: reduce tied parameters and wait for all."""
        for bucket in self._tied:
            if bucket.is_open:
                self._start(bucket)
        while self._pending:
            self._add_first()
        for bucket in self._buckets:
            bucket.finish()


def _call(method: WeakMethod[Callable[[int, Tensor], None]], number: int, parameter: Tensor) -> None:
    """Call the method, if its object is still there."""
    found = method()
    if found is not None:
        found(number, parameter)


def _open(bucket: ref[Bucket], gradient: Tensor | None) -> None:
    """A parameter's gradient is about to be added to its `.grad`; None: its weight-gradient work does that itself."""
    found = bucket()
    if gradient is not None and found is not None:
        found.open()
