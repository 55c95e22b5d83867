"""Anything as a checkpoint of Megatron-LM for a layout; read back and compared before it exists.

    DST/latest_checkpointed_iteration.txt
        iter_0000500/mp_rank_01_002/model_optim_rng.pt     tensor rank 1 of pipeline rank 2: args and weights
        conversion.json

Weights alone: Megatron's optimizer would want its own order of parameters. Load it with --finetune, or with
--no-load-optim --no-load-rng. Files and cuts: checkpoint/megatron.py; names and args: model/megatron.py.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megads.assemble.compare import declared
from megads.assemble.conversion import Renaming, Report
from megads.assemble.import_megatron import cutting_of, open_megatron_lm
from megads.assemble.origin import Hints, Origin
from megads.checkpoint.directory import built
from megads.checkpoint.foreign import Values
from megads.checkpoint.megatron import STATE_FILE
from megads.checkpoint.proof import pairs_of, prove
from megads.checkpoint.store import Store, write_file
from megads.checkpoint.torch_file import write_torch_file
from megads.errors import CheckpointError, LayoutError
from megads.model.megatron import TransformerImpl, args_of, written_names
from megads.parallel.shard import ShardSpec

DIVISIBLE_BY = 128
"""Megatron's default of --make-vocab-size-divisible-by; times the tensor ranks, its vocabulary is a multiple of it."""
WEIGHTS_ONLY = "weights alone: load it with --finetune, or with --no-load-optim --no-load-rng"


@dataclass(frozen=True, slots=True)
class MegatronLayout:
    """How the result is spread over ranks."""

    tensor: int = 1
    pipeline: int = 1
    virtual_stages: int = 1

    def stages(self, layers: int) -> list[list[range]]:
        """Layers by pipeline rank, then virtual stage.

        Raises:
            LayoutError: they cannot be dealt evenly.
        """
        count = self.pipeline * self.virtual_stages
        if layers % count or (self.virtual_stages > 1 and self.pipeline == 1):
            raise LayoutError(
                "layers cannot be dealt to Megatron's stages",
                found=f"{layers} layers over {self.pipeline} pipeline ranks x {self.virtual_stages} virtual stages",
                allowed="a divisor of the layers, and virtual stages only with several pipeline ranks",
            )
        share = layers // count
        starts = [
            [(v * self.pipeline + p) * share for v in range(self.virtual_stages)]
            for p in range(self.pipeline)
        ]
        return [[range(start, start + share) for start in row] for row in starts]


def export_megatron(
    origin: Origin,
    target: Path,
    *,
    layout: MegatronLayout,
    weights: str = "model",
    dtype: torch.dtype | None = None,
    impl: TransformerImpl = "transformer_engine",
    store: Store | None = None,
) -> Report:
    """Write the weights of `origin` for Megatron-LM.

    Memory: at most four times the largest tensor.

    Args:
        weights: their kind: `model`, or an average such as `ema_0.999`.
        dtype: of the written weights; None: as they were saved.
        impl: as Megatron's --transformer-impl, which decides how norms are called.

    Raises:
        CheckpointError: a model that Megatron's table has no names for, or one that came out different.
        LayoutError: a layout that does not divide the model.
        OSError: with the path.
    """
    store = store or Store()
    parameters = declared(origin.spec)
    names = written_names(list(parameters), impl=impl)
    values = {n: v.to(dtype) if dtype else v for n, v in origin.weights(weights).items()}
    ranks = _Ranks(origin, layout, parameters, names, values)
    step = int(origin.objects.get("step", 0))
    stages = layout.stages(origin.spec.layers)
    with built(target, store=store) as directory:
        iteration = directory / f"iter_{step:07d}"
        store.make_directory(iteration)
        for pipeline, chunks in enumerate(stages):
            for tensor in range(layout.tensor):
                place = iteration / (
                    f"mp_rank_{tensor:02d}" + (f"_{pipeline:03d}" if layout.pipeline > 1 else "")
                )
                store.make_directory(place)
                write_torch_file(
                    store, place / STATE_FILE, tree=ranks.tree(chunks, tensor, step=step, impl=impl)
                )
                store.sync_directory(place)
        store.sync_directory(iteration)
        write_file(store, directory / "latest_checkpointed_iteration.txt", blocks=[str(step).encode()])
        again = open_megatron_lm(iteration, Hints(vocab=origin.spec.vocab), store=store)
        if again.spec != origin.spec:
            raise CheckpointError(
                f"{iteration}: its args are read back as another model", found=again.spec, allowed=origin.spec
            )
        proofs = prove(pairs_of(values, again.weights("model")))
        report = Report(origin, "megatron", proofs, None, (*origin.notes, WEIGHTS_ONLY))
        report.write(directory, store=store)
    return report


def renamings(origin: Origin, *, impl: TransformerImpl) -> list[Renaming]:
    """The rows of a dry run."""
    parameters = declared(origin.spec)
    names = written_names(list(parameters), impl=impl)
    return [Renaming(origin.names.get(n, ()), n, (names[n],), spec.shape) for n, spec in parameters.items()]


@dataclass(frozen=True, slots=True)
class _Ranks:
    """What each rank's file holds."""

    origin: Origin
    layout: MegatronLayout
    parameters: Mapping[str, ShardSpec]
    names: Mapping[str, str]
    values: Mapping[str, Values]

    @property
    def padded(self) -> int:
        """Rows of the padded vocabulary."""
        multiple = DIVISIBLE_BY * self.layout.tensor
        return -(-self.origin.spec.vocab // multiple) * multiple

    def tree(self, chunks: list[range], tensor: int, *, step: int, impl: TransformerImpl) -> dict[str, Any]:
        """Of one rank."""
        models = [self._model(layers, tensor) for layers in chunks]
        keys = ["model"] if len(models) == 1 else [f"model{number}" for number in range(len(models))]
        args = Namespace(**self._args(step, impl))
        return {
            "args": args,
            "checkpoint_version": 3.0,
            "iteration": step,
            **dict(zip(keys, models, strict=True)),
        }

    def _args(self, step: int, impl: TransformerImpl) -> dict[str, Any]:
        dtype = next(iter(self.values.values())).dtype
        virtual = self.layout.virtual_stages
        per_stage = self.origin.spec.layers // (self.layout.pipeline * virtual)
        return {
            **args_of(self.origin.model, sequence_length=self.origin.config.data.sequence_length),
            "tensor_model_parallel_size": self.layout.tensor,
            "pipeline_model_parallel_size": self.layout.pipeline,
            "virtual_pipeline_model_parallel_size": virtual if virtual > 1 else None,
            "num_layers_per_virtual_pipeline_stage": per_stage if virtual > 1 else None,
            "expert_model_parallel_size": 1,
            "world_size": self.layout.tensor * self.layout.pipeline,
            "make_vocab_size_divisible_by": DIVISIBLE_BY,
            "padded_vocab_size": self.padded,
            "params_dtype": dtype,
            "bf16": dtype == torch.bfloat16,
            "fp16": dtype == torch.float16,
            "transformer_impl": impl,
            "ckpt_format": "torch",
            "iteration": step,
            "consumed_train_samples": 0,
            "consumed_valid_samples": 0,
        }

    def _model(self, layers: range, tensor: int) -> dict[str, Values]:
        """A chunk of one rank: its layers, counted from 0, and what stands before and behind all layers."""
        is_first, is_last = layers.start == 0, layers.stop == self.origin.spec.layers
        found: dict[str, Values] = {}
        for name, foreign in self.names.items():
            words = name.split(".")
            if words[0] == "layers":
                if int(words[1]) in layers:
                    local = foreign.replace(
                        f".layers.{words[1]}.", f".layers.{int(words[1]) - layers.start}."
                    )
                    found[local] = self._share(name, tensor)
            elif is_first if words[0] == "embedding" else is_last:
                found[foreign] = self._share(name, tensor)
        if self.origin.spec.tied and is_last and not is_first:
            found["output_layer.weight"] = self._share("embedding.word.weight", tensor)
        return found

    def _share(self, name: str, tensor: int) -> Values:
        cutting = cutting_of(name, self.parameters[name], model=self.origin.model, padded=self.padded)
        return cutting.share(self.values[name], rank=tensor, size=self.layout.tensor)
