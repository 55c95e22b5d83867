"""Config section `parallel`: the layout. Its arithmetic lives in `megads/parallel/layout.py`."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import MinLen
from pydantic import NonNegativeInt, PositiveInt

from megads.config.section import Text, section

ScheduleName = Literal[
    "gpipe", "one_f_one_b", "interleaved", "zero_bubble_h1", "zero_bubble_h2", "zbv", "dualpipe_v"
]

LayerPart = Literal["attention", "mlp", "norm", "activation"]


@section
class ParallelConfig:
    """How the model and the batch are cut over ranks. What is left of the world is data parallel."""

    tensor: PositiveInt = 1
    """Tensor-parallel degree: ranks that share every layer's heads, ffn and vocabulary."""
    allow_cross_node: bool = False
    """Let a tensor-parallel group span hosts, for hosts whose network is as fast as their inner links."""
    sequence: bool = False
    """Sequence parallelism: cut activations between tensor-parallel regions along the sequence (less memory)."""
    sequence_pieces: PositiveInt = 1
    """Pieces in which activations travel under sequence parallelism, one while another is multiplied: more hide more of
    the communication, in smaller products."""
    context: PositiveInt = 1
    """Context-parallel degree: ranks that share every sequence, in zig-zag chunks of equal causal work."""
    context_kind: Literal["ring", "ulysses", "all_gather"] = "ring"
    """How attention meets the other ranks' tokens: keys travel round a ring, heads are exchanged (all-to-all), or all
    keys are gathered."""
    expert: PositiveInt = 1
    """Expert-parallel degree, over tensor x context x data ranks: how many ways the experts of a layer are dealt."""
    expert_tensor: PositiveInt | None = None
    """Tensor-parallel degree of one expert; null: `parallel.tensor`."""
    pipeline: PositiveInt = 1
    """Pipeline-parallel degree: stages that the layers are dealt to."""
    virtual_stages: PositiveInt = 1
    """Stages that each pipeline rank holds: any number for `interleaved`, 2 for `zbv` and `dualpipe_v`."""
    schedule: ScheduleName | Text = "one_f_one_b"
    """Pipeline schedule, or the path of a file with one of your own (its form: `megads/pipeline/text.py`);
    `python -m megads schedule NAME` draws it."""
    stage_layers: Annotated[tuple[NonNegativeInt, ...], MinLen(1)] | None = None
    """Transformer layers of each stage, first to last (the embedding goes with the first, the head with the last), such
    as [7, 9, 9, 7]; null: dealt so that the most expensive stage is as cheap as possible, or the most expensive rank
    where stages are placed as a V."""
    recompute: Literal["none", "full"] | Annotated[tuple[LayerPart, ...], MinLen(1)] = "none"
    """What is computed again in the backward instead of kept: nothing, whole layers, or the named parts of each:
    attention or mlp (the branch with its norm and its products), norm or activation (cheap: no product runs twice;
    the norm before experts is kept)."""
    recompute_layers: PositiveInt | None = None
    """In how many layers of each stage, its first ones; null: in all of them."""
    offload: bool = False
    """Keep what layers need for their backward in the host's memory; copies run beside the compute."""
    loss_chunk: PositiveInt | None = None
    """Tokens whose logits exist at a time: output head and loss run chunk by chunk, forward and gradient, and no logits
    are kept, but for each micro-batch alive on the last stage one gradient of the head's weight; null: all tokens of a
    micro-batch at once."""
