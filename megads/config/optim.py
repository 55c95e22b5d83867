"""Config section `optim`: optimizer, learning rate, precision and the engine that shards it."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Literal

from annotated_types import MinLen
from pydantic import Field, JsonValue, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from megads.config.guard import GuardConfig
from megads.config.loss_scale import LossScaleConfig
from megads.config.schedule import LengthConfig, PieceConfig, PlateauConfig, RestartsConfig, TailConfig
from megads.config.section import section
from megads.config.update import GroupConfig, MuonConfig

Beta = Annotated[float, Field(ge=0.0, lt=1.0)]


@section
class OptimConfig:
    """Optimizer, learning-rate schedule, clipping, precision and ZeRO stage."""

    name: Literal["adamw", "sgd", "muon"] = "adamw"
    """adamw: decoupled weight decay (Loshchilov and Hutter 2019). sgd: plain, for comparisons. muon: for the weights of
    attention and feed-forward layers, adamw for the rest (`optim.muon`)."""
    lr: PositiveFloat
    """Peak learning rate."""
    min_lr: NonNegativeFloat = 0.0
    """Learning rate at the end of the decay."""
    warmup_steps: NonNegativeInt = 0
    """Steps of linear warm-up from 0 to `optim.lr`."""
    warmup_tokens: PositiveInt | None = None
    """The warm-up in tokens, instead of steps."""
    decay: Literal[
        "cosine", "linear", "constant", "cosine_restarts", "inverse_sqrt", "wsd", "pieces", "plateau"
    ] = "cosine"
    """What follows the warm-up. cosine, linear: down to `optim.min_lr`. cosine_restarts: one cosine after another
    (`optim.restarts`). inverse_sqrt: lr x sqrt(t / (t + x)), x after the warm-up. wsd: `optim.lr`, and at the end a
    tail (`optim.tail`). pieces: a list in tokens. plateau: lower when validation no longer improves."""
    decay_steps: PositiveInt | None = None
    """Step at which `optim.min_lr` is reached; null: `run.steps`."""
    decay_tokens: PositiveInt | None = None
    """Tokens read when `optim.min_lr` is reached, instead of a step."""
    tail: TailConfig | None = None
    """The decay of wsd, which ends where `decay_steps` or `decay_tokens` say: {shape, steps | tokens}."""
    restarts: RestartsConfig | None = None
    """The cycles of cosine_restarts: {steps | tokens, growth}."""
    timescale: LengthConfig | None = None
    """t of inverse_sqrt: {steps | tokens}; null: as long as the warm-up."""
    pieces: Annotated[tuple[PieceConfig, ...], MinLen(1)] | None = None
    """The pieces of the schedule, one after another: [{tokens, shape, lr}, ...]."""
    plateau: PlateauConfig | None = None
    """When plateau lowers the rate: {factor, patience, threshold, cooldown}; null: torch's defaults."""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """Adam's decay rates of the first and second moment."""
    eps: PositiveFloat = 1e-8
    """Adam's constant beside the square root."""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled weight decay of matrices; biases, norms and other vectors have none."""
    groups: tuple[GroupConfig, ...] = ()
    """Parameters by pattern and what holds for them: [{match, optimizer, lr_scale, weight_decay, eps}, ...]. One group
    sets a key of a parameter; `*.bias` matches every bias."""
    muon: MuonConfig = field(default_factory=MuonConfig)
    """Muon's own keys: {momentum, nesterov, coefficients, steps, scale, dtype, adamw_lr}."""
    clip: PositiveFloat | None = 1.0
    """Global gradient norm above which all gradients are scaled down; null: no clipping."""
    label_smoothing: Beta = 0.0
    """Share of the target distribution that is spread over the vocabulary (Szegedy et al. 2016); 0: none. The reported
    `loss` stays the plain one, `trained_loss` is what is trained on."""
    label_smoothing_kind: Literal["torch", "nemo"] = "torch"
    """Over which ids it is spread. torch: all of them, the label's own too. nemo: all but the label's, as NeMo and
    Megatron do."""
    z_loss: NonNegativeFloat = 0.0
    """Weight of the squared log-sum-exp of the logits in the loss, which keeps it near 0 (PaLM, section 5: 1e-4); 0:
    none."""
    guard: GuardConfig | None = None
    """What becomes of a step whose loss or gradient norm is not finite or out of line: {policy, sigma, window, limit};
    null: the run ends where they are not finite."""
    ema: tuple[Beta, ...] = ()
    """Running averages of the float32 weights, by decay: [0.999, 0.9999]; each costs a copy of them. `evaluate`,
    `generate` and the converter take one by `--weights ema_0.999`."""
    precision: Literal["fp64", "fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic of weights and activations. bf16 and fp16 keep float32 masters, moments and gradients; fp16 scales the
    loss."""
    engine: Literal["native", "deepspeed"] = "native"
    """Optimizer engine. native: megads' own ZeRO, which needs torch alone. deepspeed: DeepSpeed's ZeRO."""
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 0
    """ZeRO stage: 0 keeps all on each data-parallel rank, 1 shards optimizer state over them, 2 also the gradients
    once they are reduced, 3 (deepspeed) also the weights, which are gathered block by block."""
    deepspeed: dict[str, JsonValue] = field(default_factory=dict)
    """Keys of DeepSpeed's own configuration, given to it as they are; those that megads sets itself are refused. State
    in host memory: {zero_optimization: {offload_optimizer: {device: cpu}}}, with stage 3 also offload_param."""
    bucket_elements: PositiveInt = 25_000_000
    """Gradient elements reduced by one collective."""
    reduce_every: PositiveInt = 1
    """ZeRO 2 of the native engine: micro-batches of a stage after whose backward its gradients are reduced. 1 keeps no
    whole gradients between micro-batches, and sends as many bytes in each as ZeRO 1 in a step; n sends 1/n of that and
    keeps whole gradients from the first of n micro-batches to the last."""
    reduce_dtype: Literal["fp32", "bf16"] = "fp32"
    """In which gradients travel between data-parallel ranks under ZeRO; they are always added in float32. bf16: half
    the bytes, and each rank's gradients are rounded once."""
    shard_size: PositiveInt | None = None
    """Data-parallel (x context-parallel) ranks over which ZeRO cuts, neighbours, such as those of one host; the others
    hold copies. null: all."""
    moment_dtype: Literal["fp32", "bf16"] = "fp32"
    """In which Adam's moments are kept; the update is computed in float32. bf16: 4 bytes a parameter less; rounded at
    random, so that small changes are kept on average (a second moment rounded to nearest would never shrink)."""
    offload: bool = False
    """Keep masters and moments in the host's memory (pinned on a GPU), and bring them to the device in pieces for the
    update: 2 bytes of weights and 4 of gradients a parameter stay on it under bf16."""
    loss_scale: LossScaleConfig = field(default_factory=LossScaleConfig)
    """fp16's dynamic loss scale: {initial, growth, backoff, interval}."""
