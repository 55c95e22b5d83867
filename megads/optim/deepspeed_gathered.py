"""DeepSpeed's stage 3: weights are cut as well, and whole only while their block runs.

    forward    gather 0 | block 0 | free      gather 1 | block 1 | free      ...       each gather begins a block early
    backward   ... | gather 1 | block 1 | gradients of 1 -> DeepSpeed | free | gather 0 | block 0 | ...

    ds_tensor of each rank --all-gather--> bucket.values     bucket.gradients --DeepSpeed's reduce-scatter--> partitions
    compute dtype                          one block's       float32, one block's      float32, of all micro-batches

DeepSpeed cuts the twins, keeps and offloads the parts, reduces, accumulates and updates. Gathering is done here and not
by DeepSpeed's module hooks: the executor starts the backward of a block (`Stage` cuts the graph between blocks), layers
add weight gradients to `.grad` themselves, and blocks read weights outside of the modules that own them. A parameter
stays a view of its bucket's memory, which is freed and made again under it.

Whatever runs a block, or a module of one, finds its weights there: evaluation and generation need nothing more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from megads.config.optim import OptimConfig
from megads.optim.deepspeed_twin import Held, sum_outside
from megads.optim.deepspeed_zero import initialize, offloads_optimizer
from megads.optim.group import check_groups, group_of
from megads.optim.precision import COMPUTE_DTYPES
from megads.optim.share import Share
from megads.optim.update import make_optimizer
from megads.parallel.collectives import Pending, start_all_gather
from megads.parallel.gradient import Bucket, make_buckets
from megads.parallel.mesh import Mesh
from megads.parallel.parameter import parameter_table


class GatheredTwins:
    """`Twins` whose weights are cut over the data-parallel ranks.

    Blocks must run their backward one after the other, last block first (one stage, no split backward).
    """

    def __init__(self, stages: Mapping[int, torch.nn.ModuleList], mesh: Mesh, *, config: OptimConfig) -> None:
        self._mesh = mesh
        self._offloads = offloads_optimizer(config)
        blocks = [block for stage in sorted(stages) for block in stages[stage]]
        owned, initial = _buckets_of(blocks, mesh, config=config)
        self._buckets = tuple(chain.from_iterable(owned))
        numbers = iter(range(len(self._buckets)))
        self._owned = tuple(tuple(next(numbers) for _ in found) for found in owned)
        self._twins = torch.nn.ParameterList(torch.nn.Parameter(bucket.values) for bucket in self._buckets)
        for twin in self._twins:
            twin.grad_dtype = torch.float32
        self.optimizer = make_optimizer(
            list(self._twins),
            [bucket.traits.group for bucket in self._buckets],
            name=config.name,
            config=config,
        )
        self._engine = initialize(self._twins, self.optimizer, mesh=mesh, config=config)
        for held, values in zip(self.held(), initial, strict=True):
            held.share.master.copy_(values)  # DeepSpeed took the masters from the rounded weights
        for bucket in self._buckets:
            _free(bucket.values)
        self._uses = tuple(self._numbers_in(block, recurse=True) for block in blocks)
        self._num_holders = [0] * len(self._buckets)
        self._gathering: dict[int, Pending] = {}
        self._in_backward: int | None = None
        self._watch(blocks)

    @property
    def num_summands(self) -> int:
        """See `Twins`: DeepSpeed divides before it sums, at this stage whatever it is told."""
        return self._mesh.group("dp_cp").size

    @property
    def cost(self) -> str:
        """See `Twins`."""
        sizes = [sum(self._buckets[number].values.numel() for number in uses) for uses in self._uses]
        return (
            f"weights too; a block is whole while it runs, the next one on its way (the largest has {max(sizes)} "
            "parameters on this rank), and its gradients reach DeepSpeed in float32 once a micro-batch"
        )

    def held(self) -> tuple[Held, ...]:
        """See `Twins`."""
        inner, found = self._engine.optimizer, []
        for bucket, twin in zip(self._buckets, self._twins, strict=True):
            group, here, size = inner.grad_position[inner.get_param_id(twin)]
            partition, span = inner.fp32_partitioned_groups_flat[group], slice(here, here + size)
            start = bucket.group.rank * size
            share = Share(bucket, partition.detach()[span], start, slice(0, size))
            found.append(Held(share, partition, span))
        return tuple(found)

    def start(self) -> None:
        """See `Twins`."""
        self._engine.optimizer.set_gradient_accumulation_boundary(False)

    def reduce(self) -> Sequence[Tensor]:
        """See `Twins`."""
        self._finish_backward()
        self._engine.optimizer.finalize_gradient_accumulation_boundary()
        if self._offloads:
            if self._mesh.device.type == "cuda":
                torch.cuda.synchronize(self._mesh.device)  # copies to the host are under way
            return [held.partition.grad[held.span] for held in self.held() if held.partition.grad is not None]
        return [self._engine.optimizer.get_local_fp32_grad_for_param(twin) for twin in self._twins]

    def update(self) -> None:
        """See `Twins`."""
        assert not any(self._num_holders)  # what is held now would be old in the next step
        unused = tuple(self._gathering)
        self._hold(unused)
        self._release(unused)
        self._engine.set_gradient_accumulation_boundary(True)
        self._engine.step()

    def publish(self) -> None:
        """See `Twins`."""
        for held, twin in zip(self.held(), self._twins, strict=True):
            twin.ds_tensor.copy_(held.share.master)

    def _numbers_in(self, module: torch.nn.Module, *, recurse: bool) -> tuple[int, ...]:
        """The buckets that hold parameters of a module."""
        mine = {id(parameter) for parameter in module.parameters(recurse=recurse)}
        return tuple(
            number
            for number, bucket in enumerate(self._buckets)
            if any(id(place.parameter) in mine for place in bucket.places)
        )

    def _watch(self, blocks: Sequence[torch.nn.Module]) -> None:
        """Let blocks, and modules that are called on their own, have their weights while they run."""
        for block_number, block in enumerate(blocks):
            block.register_forward_pre_hook(partial(self._before_block, block_number))
            block.register_forward_hook(partial(self._after_block, block_number))
            for module in block.modules():
                numbers = self._numbers_in(module, recurse=False)
                if numbers and module is not block:
                    module.register_forward_pre_hook(lambda *_, numbers=numbers: self._hold(numbers))
                    module.register_forward_hook(  # also where a recompute ends, inside of a module, by an exception
                        lambda *_, numbers=numbers: self._release(numbers), always_call=True
                    )

    def _before_block(self, number: int, *_: Any) -> None:
        self._finish_backward()
        self._hold(self._uses[number])
        if number + 1 < len(self._uses):
            self._fetch(self._uses[number + 1])

    def _after_block(self, number: int, block: torch.nn.Module, _: Any, output: Any) -> None:
        if torch.is_grad_enabled():
            for tensor in (*output.payload, *(extra.sum for extra in output.extras)):
                if tensor.grad_fn is not None:
                    tensor.grad_fn.register_prehook(partial(self._begin_backward, number))
        self._release(self._uses[number])

    def _begin_backward(self, number: int, *_: Any) -> None:
        """The backward comes to a block, through one of its outputs."""
        if self._in_backward == number:
            return
        with torch.no_grad():
            self._finish_backward()
            self._in_backward = number
            for used in self._uses[number]:
                gradients = self._buckets[used].gradients
                if gradients.untyped_storage().nbytes():
                    continue  # a tied weight's, which the head has added to
                _allocate(gradients)
                gradients.zero_()
            self._hold(self._uses[number])
            if number > 0:
                self._fetch(self._uses[number - 1])

    def _finish_backward(self) -> None:
        """The backward has left the block that it came to: its gradients are complete, but for ties to blocks below."""
        if self._in_backward is None:
            return
        number, self._in_backward = self._in_backward, None
        for owned in self._owned[number]:
            self._deliver(self._buckets[owned], self._twins[owned])
        self._release(self._uses[number])
        if number == 0:
            inner = self._engine.optimizer
            inner.overlapping_partition_gradients_reduce_epilogue()
            inner.clear_backward_seen_flag()  # the next micro-batch adds

    def _deliver(self, bucket: Bucket, twin: Tensor) -> None:
        """Give DeepSpeed the gradients of a micro-batch, and free them."""
        inner = self._engine.optimizer
        sum_outside(bucket, self._mesh)
        empty, twin.data = twin.data, bucket.values
        twin.grad = bucket.gradients.view(-1)
        inner.reduce_ready_partitions_and_remove_grads(twin)
        twin.data = empty
        if twin.grad is not None and twin.grad.data_ptr() == bucket.gradients.data_ptr():
            inner.overlapping_partition_gradients_reduce_epilogue()  # larger than DeepSpeed's buffer: it kept ours
        _free(bucket.gradients)

    def _fetch(self, numbers: Sequence[int]) -> None:
        """Begin to gather what is not there."""
        for number in numbers:
            if not self._num_holders[number] and number not in self._gathering:
                bucket, twin = self._buckets[number], self._twins[number]
                _allocate(bucket.values)
                bucket.shard(bucket.values).copy_(twin.ds_tensor, non_blocking=True)
                self._gathering[number] = start_all_gather(bucket.values, bucket.group)

    def _hold(self, numbers: Sequence[int]) -> None:
        """Have the weights of some buckets until `_release`."""
        with torch.no_grad():
            self._fetch(numbers)
        for number in numbers:
            if number in self._gathering:
                self._gathering.pop(number).wait()
            self._num_holders[number] += 1

    def _release(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            self._num_holders[number] -= 1
            if not self._num_holders[number]:
                _free(self._buckets[number].values)


def _buckets_of(
    blocks: Sequence[torch.nn.Module], mesh: Mesh, *, config: OptimConfig
) -> tuple[list[tuple[Bucket, ...]], list[Tensor]]:
    """The buckets of each block, a tied parameter in its first one, and this rank's float32 values of each bucket."""
    dtype = COMPUTE_DTYPES[config.precision]
    check_groups(parameter_table(blocks), mesh, config=config)
    seen: set[int] = set()
    owned, initial = [], []
    for block in blocks:
        parameters = [p for p in parameter_table([block]) if id(p) not in seen]
        seen.update(map(id, parameters))
        made = make_buckets(
            parameters,
            mesh,
            max_elements=config.bucket_elements,
            dtype=dtype,
            group_of=partial(group_of, config=config),
        )
        for bucket in made:
            assert bucket.initial is not None
            initial.append(bucket.shard(bucket.initial).clone())
            bucket.initial = None
            _free(bucket.gradients)
        owned.append(made)
    return owned, initial


def _free(flat: Tensor) -> None:
    """Give back a bucket's memory; its views stay what they are."""
    flat.untyped_storage().resize_(0)


def _allocate(flat: Tensor) -> None:
    flat.untyped_storage().resize_(flat.numel() * flat.element_size())
