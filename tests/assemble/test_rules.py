"""`assemble/rules.py`: every rule of the table says no to its example, names the key, and offers what then passes."""

# ruff: noqa: E501  (a table of one line a rule)

from __future__ import annotations

from dataclasses import replace
from math import prod
from pathlib import Path

import pytest

from megads.assemble.deepspeed_keys import OWNED
from megads.assemble.finding import Finding
from megads.assemble.rules import RULES, check, findings
from megads.assemble.rules_layout import tensor_stays_on_host
from megads.config.load import load
from megads.config.root import Config
from megads.errors import ConfigError
from megads.model.catalog import FAMILIES, complete

CONFIGS = Path(__file__).parents[2] / "configs"

SCHEDULE_FILES = Path(__file__).parent / "schedules"

RANKS = {
    "quickstart": 4,
    "sft-gsm8k": 1,
    "quickstart-moe": 4,
    "gpt2-124m": 8,
    "llama-1b": 8,
    "llama-8b": 64,
    "llama-3.1-8b": 64,
    "quickstart-deepseek": 8,
    "llama-3.1-70b": 512,
    "llama-3.1-405b": 16384,
    "qwen3-8b": 64,
    "qwen3-30b-a3b": 64,
    "mixtral-8x7b": 64,
    "deepseek-v2-lite": 64,
    "deepseek-v3": 2048,
    "gpt2-1.3b-24gb": 1,
}

BASE = """\
run: {steps: 10}
model: {family: llama, layers: 2, hidden: 48, heads: 6}
batch: {global: 12}
data: {train: corpus, tokenizer: t.model, sequence_length: 8}
optim: {lr: 1e-3}
"""

# rule -> (overrides that break it, ranks, key, words of the finding, overrides that heal it)
EXAMPLES: dict[str, tuple[list[str], int, str, list[str], list[str]]] = {
    "ranks_fill_layout": (["parallel.tensor=2", "parallel.pipeline=2"], 6, "parallel.tensor x parallel.pipeline", ["2 x 2 = 4", "6 / 4 = 1.5", "4 or 8 ranks", "tensor 2 x pipeline 1", "tensor 1 x pipeline 2"], ["parallel.pipeline=1"]),
    "heads_fill_tensor": (["parallel.tensor=4"], 4, "parallel.tensor", ["6 / 4 = 1.5", "1, 2, 3, 6", "4 or 8 heads"], ["parallel.tensor=2"]),
    "kv_heads_fill_tensor": (["parallel.tensor=2", "model.kv_heads=3"], 2, "parallel.tensor", ["3 / 2 = 1.5", "1, 3"], ["model.kv_heads=2"]),
    "ffn_fills_tensor": (["parallel.tensor=3", "model.ffn=100"], 3, "model.ffn", ["100 / parallel.tensor 3 = 33.3333", "99 or 102"], ["model.ffn=102"]),
    "heads_share_kv_heads": (["model.kv_heads=4"], 1, "model.kv_heads", ["6 / 4 = 1.5", "1, 2, 3, 6"], ["model.kv_heads=3"]),
    "hidden_fills_heads": (["model.hidden=50"], 1, "model.hidden", ["50 / model.heads 6 = 8.33333", "48 or 54"], ["model.hidden=48"]),
    "rotary_head_is_even": (["model.hidden=42"], 1, "model.hidden", ["42 / model.heads 6 = 7", "36 or 48"], ["model.hidden=36"]),
    "schedule_is_known": (["parallel.schedule=zbz"], 1, "parallel.schedule", ["zbz, which is no schedule and no file", "zero_bubble_h1", "did you mean zbv"], ["parallel.schedule=gpipe"]),
    "schedule_file_is_right": ([f"parallel.schedule={SCHEDULE_FILES}/wrong.txt", "parallel.pipeline=2", "batch.global=2"], 2, "parallel.schedule", ["1B1 is missing", "draws it"], [f"parallel.schedule={SCHEDULE_FILES}/right.txt"]),
    "schedule_has_one_direction": (["parallel.schedule=dualpipe", "parallel.pipeline=2"], 2, "parallel.schedule", ["dualpipe holds every parameter twice", "dualpipe_v"], ["parallel.schedule=dualpipe_v", "parallel.virtual_stages=2"]),
    "virtual_stages_fit_schedule": (["parallel.virtual_stages=2"], 1, "parallel.virtual_stages", ["2 with parallel.schedule one_f_one_b, which has 1", "interleaved"], ["parallel.schedule=interleaved"]),
    "schedule_file_fits_ranks": ([f"parallel.schedule={SCHEDULE_FILES}/right.txt", "batch.global=2"], 1, "parallel.schedule", ["2 stages on 2 ranks; parallel.pipeline is 1", "parallel.pipeline=2"], ["parallel.schedule=gpipe"]),
    "schedule_file_fits_batch": ([f"parallel.schedule={SCHEDULE_FILES}/right.txt", "parallel.pipeline=2"], 2, "batch.global", ["12 is 12 micro-batches a replica", "schedule of 2"], ["batch.global=2"]),
    "recompute_layers_are_recomputed": (["parallel.recompute_layers=2"], 1, "parallel.recompute_layers", ["2 with parallel.recompute none"], ["parallel.recompute=[norm]"]),
    "recompute_layers_are_there": (["parallel.recompute_layers=3", "parallel.recompute=full"], 1, "parallel.recompute_layers", ["3 of each stage; model.layers 2", "at most 2"], ["parallel.recompute_layers=2"]),
    "sequence_fills_tensor": (["parallel.sequence=true", "parallel.tensor=3"], 3, "data.sequence_length", ["8 / parallel.tensor 3 = 2.66667", "6 or 9"], ["data.sequence_length=9"]),
    "sequence_fills_context": (["parallel.context=3", "parallel.sequence=true", "parallel.tensor=2"], 6, "data.sequence_length", ["8; 8 / (2 x parallel.context 3) = 1.33333", "6 or 12"], ["data.sequence_length=12"]),
    "heads_fill_context": (["parallel.context=4", "parallel.context_kind=ulysses"], 4, "parallel.context", ["6 / parallel.tensor 1 / 4 = 1.5 heads", "1, 2, 3, 6"], ["parallel.context_kind=ring"]),
    "pieces_need_sequence": (["parallel.sequence_pieces=2", "parallel.tensor=2"], 2, "parallel.sequence_pieces", ["2 with parallel.sequence false", "nothing travels"], ["parallel.sequence=true"]),
    "stages_have_blocks": (["parallel.pipeline=5"], 5, "parallel.pipeline x parallel.virtual_stages", ["5 stages", "2 layers + embedding + head = 4 blocks", "at most 4"], ["model.layers=3"]),
    "stage_layers_are_the_layers": (["parallel.pipeline=2", "parallel.stage_layers=[2, 1]"], 2, "parallel.stage_layers", ["[2, 1]: 2 stages, 3 layers", "2 numbers", "model.layers 2", "such as [1, 1]"], ["parallel.stage_layers=[2, 0]"]),
    "batch_fills_ranks": (["batch.global=10", "batch.micro=2"], 4, "batch.global", ["10 / (batch.micro 2 x 4 data-parallel ranks) = 1.25", "8 or 16"], ["batch.global=16"]),
    "family_has_experts": (["model.family=mixtral"], 1, "model.experts", ["null with model.family mixtral"], ["model.family=llama"]),
    "rope_keys_have_scaling": (["model.rope_factor=8", "model.rope_original_positions=64"], 1, "model.rope_factor", ["model.rope_original_positions, model.rope_factor with model.rope_scaling none"], ["model.rope_scaling=yarn"]),
    "rope_scaling_has_sizes": (["model.rope_scaling=llama3", "model.rope_factor=8"], 1, "model.rope_original_positions", ["null with model.rope_scaling llama3"], ["model.rope_original_positions=64"]),
    "rope_turns_are_in_order": (["model.rope_scaling=llama3", "model.rope_original_positions=64", "model.rope_few_turns=4"], 1, "model.rope_few_turns", ["4 with model.rope_many_turns 4"], ["model.rope_few_turns=1"]),
    "latent_keys_have_family": (["model.kv_lora=8", "model.rope_mscale=1"], 1, "model.kv_lora", ["model.kv_lora, model.rope_mscale with model.family llama", "deepseek_v2 or deepseek_v3"], ["model.family=deepseek_v3", "model.rope_scaling=yarn", "model.rope_original_positions=64"]),
    "latent_head_is_even": (["model.family=deepseek_v2", "model.rope_dim=5"], 1, "model.rope_dim", ["5, odd"], ["model.rope_dim=4"]),
    "latent_heads_have_their_dims": (["model.family=deepseek_v3", "model.head_dim=12"], 1, "model.head_dim", ["12 with model.family deepseek_v3", "model.nope_dim"], ["model.head_dim=null"]),
    "latent_heads_have_keys": (["model.family=deepseek_v2", "model.kv_heads=3"], 1, "model.kv_heads", ["3 with model.family deepseek_v2: each of model.heads 6"], ["model.kv_heads=6"]),
    "mscales_have_yarn": (["model.family=deepseek_v2", "model.rope_mscale_all_dim=1"], 1, "model.rope_mscale_all_dim", ["model.rope_mscale_all_dim with model.rope_scaling none"], ["model.rope_scaling=yarn", "model.rope_original_positions=64"]),
    "expert_keys_have_experts": (["model.shared_experts=1", "parallel.expert=2"], 2, "model.shared_experts", ["model.shared_experts, parallel.expert with model.experts null"], ["model.experts=4"]),
    "experts_are_swiglu": (["model.experts=4", "model.family=gpt"], 1, "model.experts", ["4 with model.family gpt"], ["model.family=llama"]),
    "experts_fill_groups": (["model.experts=6", "model.expert_groups=4"], 1, "model.expert_groups", ["6 / 4 = 1.5", "1, 2, 3, 6"], ["model.expert_groups=3"]),
    "experts_suffice_for_token": (["model.experts=6", "model.expert_groups=3", "model.experts_per_token=3"], 1, "model.experts_per_token", ["3 of 2 experts in 1 of 3 groups", "at most 2"], ["model.groups_per_token=2"]),
    "groups_have_two_experts": (["model.experts=6", "model.expert_groups=6", "model.groups_per_token=2", "model.router=sigmoid"], 1, "model.group_score", ["top2 with 6 experts in 6 groups", "3 groups or fewer"], ["model.group_score=max"]),
    "some_layers_have_experts": (["model.experts=4", "model.dense_layers=2"], 1, "model.dense_layers", ["2 of model.layers 2", "at most 1"], ["model.dense_layers=1"]),
    "mtp_weight_has_layers": (["model.mtp_weight=0.1"], 1, "model.mtp_weight", ["model.mtp_layers 0", "0.3, the default"], ["model.mtp_layers=1"]),
    "mtp_weight_starts_at_nothing": (["model.mtp_layers=1", "model.mtp_weight=[{tokens: 5, weight: 0.3}, {tokens: 9, weight: 0.1}]"], 1, "model.mtp_weight", ["points at 5, 9 tokens", "the first at 0"], ["model.mtp_weight=[{tokens: 0, weight: 0.3}, {tokens: 9, weight: 0.1}]"]),
    "mtp_layers_see_labels": (["model.mtp_layers=8"], 1, "model.mtp_layers", ["8 with data.sequence_length 8", "at most 7"], ["model.mtp_layers=7"]),
    "mtp_layers_find_the_head": (["model.mtp_layers=1", "optim.engine=deepspeed", "optim.zero_stage=3"], 1, "optim.zero_stage", ["3 with model.mtp_layers 1", "at most 2"], ["optim.zero_stage=2"]),
    "dense_layers_exist": (["model.experts=4", "model.dense_layers=[0,2]"], 1, "model.dense_layers", ["[0, 2]: there is no layer 2 among 2", "0 to 1"], ["model.dense_layers=[0]"]),
    "balance_has_weight": (["model.experts=4", "model.balance_weight=0.5"], 1, "model.balance_weight", ["0.5 with model.balance none"], ["model.balance=sequence"]),
    "experts_fill_expert_ranks": (["model.experts=6", "parallel.expert=4"], 4, "parallel.expert", ["6 / 4 = 1.5", "1, 2, 3, 6"], ["parallel.expert=2"]),
    "expert_grid_fills_stage": (["model.experts=6", "parallel.expert=3"], 4, "parallel.expert", ["3 x expert_tensor 1 = 3 ranks in a stage of 4", "1, 2, 4 with"], ["parallel.expert=2"]),
    "expert_ffn_fills_tensor": (["model.experts=4", "model.expert_ffn=25", "parallel.tensor=2"], 2, "model.expert_ffn", ["25 / parallel.expert_tensor 2 = 12.5", "24 or 26"], ["parallel.expert_tensor=1"]),
    "shared_experts_fill_tensor": (["model.experts=4", "model.expert_ffn=25", "model.shared_experts=1", "parallel.tensor=2", "parallel.expert_tensor=1"], 2, "model.shared_experts", ["1 x 25 = 25 wide; 25 / parallel.tensor 2 = 12.5"], ["model.shared_experts=2"]),
    "start_keys_have_start": (["checkpoint.start_other_vocab=true"], 1, "checkpoint.start_other_vocab", ["start_other_vocab with checkpoint.start null"], ["checkpoint.start=run"]),
    "start_is_for_fresh_runs": (["checkpoint.start=run", "checkpoint.load=must"], 1, "checkpoint.start", ["run with checkpoint.load must", "auto or never"], ["checkpoint.load=auto"]),
    "experts_have_engine": (["model.experts=4", "parallel.expert=2", "optim.engine=deepspeed", "optim.zero_stage=1"], 2, "optim.engine", ["deepspeed with parallel.expert 2", "native, or experts"], ["parallel.expert=1"]),
    "page_fits_sequence": (["data.page=12"], 1, "data.page", ["12 tokens", "8 or 16", "1, 2, 4, 8"], ["data.page=16"]),
    "positions_hold_sequence": (["model.family=gpt", "model.max_positions=7"], 1, "data.sequence_length", ["8 tokens", "7 learned"], ["model.max_positions=8"]),
    "decay_goes_down": (["optim.min_lr=0.1"], 1, "optim.min_lr", ["0.1 above optim.lr 0.001"], ["optim.min_lr=0.001"]),
    "decay_reads_its_end": (["optim.decay=constant", "optim.min_lr=0.0001"], 1, "optim.decay", ["constant with optim.min_lr 0.0001, which it ignores", "wsd"], ["optim.min_lr=0.0"]),
    "decay_reads_its_keys": (["optim.tail={steps: 2}"], 1, "optim.tail", ["given with optim.decay cosine", "optim.decay=wsd"], ["optim.decay=wsd"]),
    "decay_has_its_keys": (["optim.decay=wsd"], 1, "optim.tail", ["null with optim.decay wsd", "{steps: N} or {tokens: N}"], ["optim.tail={tokens: 96}"]),
    "lengths_have_one_unit": (["optim.decay=wsd", "optim.tail={steps: 2, tokens: 96}"], 1, "optim.tail", ["steps and tokens"], ["optim.tail={tokens: 96}"]),
    "schedule_has_one_unit": (["optim.decay=wsd", "optim.tail={steps: 2}", "optim.warmup_tokens=96"], 1, "optim.tail", ["2 steps in a schedule with a key in tokens"], ["optim.tail={tokens: 192}"]),
    "tail_fits_decay": (["optim.decay=wsd", "optim.tail={steps: 9}", "optim.warmup_steps=2"], 1, "optim.tail", ["9 long", "it is 8"], ["optim.tail={steps: 8}"]),
    "pieces_follow_one_another": (["optim.decay=pieces", "optim.pieces=[{tokens: 9}, {tokens: 8}]"], 1, "optim.pieces", ["constant to 9, constant to 8", "ascending tokens"], ["optim.pieces=[{tokens: 8}, {tokens: 9, shape: cosine, lr: 0.0}, {}]"]),
    "plateau_has_validation": (["optim.decay=plateau"], 1, "log.validate_every", ["null with optim.decay plateau"], ["log.validate_every=5", "data.valid=held_out"]),
    "rollback_has_checkpoints": (["optim.guard={policy: rollback}"], 1, "checkpoint.every", ["null with optim.guard.policy rollback"], ["checkpoint.every=5"]),
    "muon_keys_have_muon": (["optim.muon={momentum: 0.9}"], 1, "optim.muon", ["momentum=0.9", "with optim.name adamw"], ["optim.name=muon"]),
    "groups_have_their_optimizer": (['optim.groups=[{match: "*.down.weight", optimizer: adamw}]'], 1, "optim.groups", ["optimizer for *.down.weight with optim.name adamw"], ["optim.name=muon"]),
    "groups_have_eps": (['optim.groups=[{match: "*.bias", eps: 1e-6}]', "optim.name=sgd"], 1, "optim.groups", ["eps for *.bias with optim.name sgd"], ["optim.name=adamw"]),
    "groups_say_something": (['optim.groups=[{match: "*.bias"}]'], 1, "optim.groups", ["*.bias with nothing"], ['optim.groups=[{match: "*.bias", lr_scale: 2.0}]']),
    "head_base_has_mup": (["model.mup_base_head_dim=4"], 1, "model.mup_base_head_dim", ["4 with model.mup_base_hidden null"], ["model.mup_base_hidden=24"]),
    "head_base_has_heads": (["model.family=deepseek_v2", "model.mup_base_hidden=24", "model.mup_base_head_dim=4"], 1, "model.mup_base_head_dim", ["4 with model.family deepseek_v2"], ["model.mup_base_head_dim=null"]),
    "mup_has_adam": (["model.mup_base_hidden=24", "optim.name=sgd"], 1, "optim.name", ["sgd with model.mup_base_hidden 24"], ["optim.name=muon"]),
    "averages_differ": (["optim.ema=[0.99, 0.9, 0.99]"], 1, "optim.ema", ["[0.99, 0.9, 0.99], one more than once", "[0.9, 0.99]"], ["optim.ema=[0.9, 0.99]"]),
    "smoothing_kind_has_smoothing": (["optim.label_smoothing_kind=nemo"], 1, "optim.label_smoothing_kind", ["nemo with optim.label_smoothing 0.0"], ["optim.label_smoothing=0.1"]),
    "warmup_ends_before_decay": (["optim.warmup_steps=10"], 1, "optim.warmup_steps", ["10 of run.steps 10", "at most 9"], ["optim.decay_steps=11"]),
    "stop_is_in_run": (["run.stop_after=11"], 1, "run.stop_after", ["11 of run.steps 10"], ["run.stop_after=10"]),
    "validation_has_data": (["log.validate_every=5"], 1, "data.valid", ["null with log.validate_every 5"], ["data.valid=held_out"]),
    "corpora_differ": (["data.train=[a, b, a]"], 1, "data.train", ["a more than once"], ["data.train=[a, b]"]),
    "ramp_climbs": (["batch.ramp=[{tokens: 0, global: 4}, {tokens: 100, global: 8}]"], 1, "batch.ramp", ["4 from 0 tokens, 8 from 100 tokens; batch.global 12", "the last of 12 samples"], ["batch.global=8"]),
    "ramp_fills_ranks": (["batch.ramp=[{tokens: 0, global: 5}, {tokens: 100, global: 12}]"], 4, "batch.ramp", ["5 / (batch.micro 1 x 4 data-parallel ranks) = 1.25", "4 or 8"], ["batch.ramp=[{tokens: 0, global: 4}, {tokens: 100, global: 12}]"]),
    "ramp_unit_has_ramp": (["batch.ramp_unit=4"], 1, "batch.ramp_unit", ["4 with batch.ramp null"], ["batch.ramp_unit=null"]),
    "ramp_has_schedule": ([f"parallel.schedule={SCHEDULE_FILES}/right.txt", "parallel.pipeline=2", "batch.global=2", "batch.ramp=[{tokens: 0, global: 1}, {tokens: 100, global: 2}]"], 2, "batch.ramp", ["right.txt, a file for one number"], ["parallel.schedule=gpipe"]),
    "curriculum_is_whole": (["data.curriculum={kind: fixed_linear, start: 4, lengths: [4]}"], 1, "data.curriculum", ["fixed_linear with start, unit, root, lengths", "start and steps, neither"], ["data.curriculum={kind: fixed_linear, start: 4, steps: 4}"]),
    "curriculum_grows": (["data.curriculum={kind: fixed_discrete, lengths: [6, 4], until: [3, 5]}"], 1, "data.curriculum", ["lengths [6, 4], until [3, 5], data.sequence_length 8", "ascending to at most 8"], ["data.curriculum={kind: fixed_discrete, lengths: [4, 6], until: [3, 5]}"]),
    "curriculum_fills_ranks": (["data.curriculum={kind: fixed_linear, start: 3, steps: 4, unit: 1}", "parallel.tensor=2", "parallel.sequence=true"], 2, "data.curriculum", ["a length of 5 tokens", "multiples of 2", "unit=2"], ["data.curriculum={kind: fixed_linear, start: 3, steps: 4, unit: 2}"]),
    "rows_hold_documents": (["data.packing=best_fit"], 1, "data.packing", ["best_fit with document_mask false"], ["data.document_mask=true"]),
    "rows_are_pages": (["data.packing=best_fit", "data.document_mask=true", "data.page=4"], 1, "data.page", ["4 with data.packing best_fit", "8, or null"], ["data.page=8"]),
    "engine_has_stage": (["optim.zero_stage=3"], 2, "optim.zero_stage", ["3 with optim.engine native", "with native", "optim.engine=deepspeed has it"], ["optim.engine=deepspeed"]),
    "reduction_is_in_step": (["optim.reduce_every=4", "optim.zero_stage=1"], 1, "optim.reduce_every", ["4 with optim.zero_stage 1, which reduces once a step"], ["optim.zero_stage=2"]),
    "reduction_is_rounded_once": (["optim.reduce_dtype=bf16"], 1, "optim.reduce_dtype", ["bf16 with optim.zero_stage 0, where sums", "optim.zero_stage=1"], ["optim.zero_stage=1"]),
    "shards_fit_ranks": (["optim.shard_size=4", "optim.zero_stage=1", "batch.global=24", "parallel.tensor=2"], 12, "optim.shard_size", ["4 of 12 / (tensor 2 x pipeline 1) = 6 data-parallel ranks", "1, 2, 3, 6"], ["optim.shard_size=3"]),
    "state_is_adams": (["optim.offload=true", "optim.name=sgd"], 1, "optim.offload", ["True with optim.name sgd"], ["optim.name=adamw"]),
    "moments_have_precision": (["optim.moment_dtype=bf16", "optim.precision=fp64"], 1, "optim.moment_dtype", ["bf16 with optim.precision fp64"], ["optim.precision=bf16"]),
    "averages_are_on_device": (["optim.offload=true", "optim.ema=[0.9]"], 1, "optim.ema", ["[0.9] with optim.offload true"], ["optim.offload=false"]),
    "loss_scale_has_reader": (["optim.loss_scale={interval: 100}"], 1, "optim.loss_scale", ["given with optim.precision fp32"], ["optim.precision=fp16"]),
    "engine_has_precision": (["optim.engine=deepspeed", "optim.zero_stage=1", "optim.precision=fp64"], 2, "optim.precision", ["fp64 with optim.engine deepspeed", "fp32, bf16, or fp16"], ["optim.precision=bf16"]),
    "deepspeed_keys_have_reader": (["optim.deepspeed={comms_logger: {enabled: true}}"], 1, "optim.deepspeed", ["comms_logger with optim.engine native"], ["optim.deepspeed={}"]),
    "deepspeed_keys_are_free": (["optim.engine=deepspeed", "optim.zero_stage=1", "optim.deepspeed={gradient_clipping: 1.0, zero_optimization: {stage: 1}}"], 1, "optim.deepspeed", ["gradient_clipping, zero_optimization.stage, which megads sets", "instead of gradient_clipping: optim.clip"], ["optim.deepspeed={zero_optimization: {overlap_comm: true}}"]),
    "gathered_weights_have_one_stage": (["optim.engine=deepspeed", "optim.zero_stage=3", "parallel.pipeline=2"], 2, "optim.zero_stage", ["3 with parallel.pipeline 2", "optim.zero_stage=2 keeps weights whole"], ["optim.zero_stage=2"]),
    "gathered_weights_have_whole_backwards": (["optim.engine=deepspeed", "optim.zero_stage=3", "parallel.schedule=zero_bubble_h1"], 1, "parallel.schedule", ["zero_bubble_h1 with optim.zero_stage 3", "gpipe or one_f_one_b"], ["parallel.schedule=gpipe"]),
    "offload_is_to_host": (["optim.engine=deepspeed", "optim.zero_stage=3", "optim.deepspeed={zero_optimization: {offload_optimizer: {device: nvme}}}"], 1, "optim.deepspeed", ["zero_optimization.offload_optimizer: {'device': 'nvme'}", "state in memory", "device: cpu"], ["optim.deepspeed={zero_optimization: {offload_optimizer: {device: cpu}}}"]),
    "offload_has_stage": (["optim.engine=deepspeed", "optim.zero_stage=2", "optim.deepspeed={zero_optimization: {offload_param: {device: cpu}}}"], 1, "optim.deepspeed", ["offload_param with optim.zero_stage 2", "weights are whole", "optim.zero_stage 3"], ["optim.zero_stage=3"]),
    "engine_has_optimizer": (["optim.name=muon", "optim.engine=deepspeed"], 1, "optim.name", ["muon with optim.engine deepspeed", "no matrix is whole"], ["optim.engine=native"]),
    "native_keys_have_native_engine": (["optim.engine=deepspeed", "optim.zero_stage=1", "optim.reduce_dtype=bf16"], 1, "optim.reduce_dtype", ["optim.reduce_dtype with optim.engine deepspeed", "communication_data_type"], ["optim.engine=native"]),
}  # fmt: skip


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base.yaml"
    path.write_text(BASE)
    return path


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_every_rule_has_an_example_that_fails_and_one_that_passes(rule: object, base: Path) -> None:
    name = rule.__name__  # type: ignore[attr-defined]
    assert name in EXAMPLES, f"{name} has no example: a rule that never said no is not known to work"
    broken, ranks, key, words, healed = EXAMPLES[name]
    config = load(base, broken)
    (finding,) = findings(config, ranks)
    assert finding == rule(config, ranks)  # type: ignore[operator]
    assert finding.key == key
    for word in words:
        assert word in str(finding), str(finding)
    assert findings(load(base, [*broken, *healed]), ranks) == ()


@pytest.mark.parametrize("name", OWNED)
def test_deepspeed_keys_of_megads_are_refused_by_name(name: str, base: Path) -> None:
    section, _, key = name.rpartition(".")
    written = f"{{{section}: {{{key}: 1}}}}" if section else f"{{{key}: 1}}"
    config = load(base, ["optim.engine=deepspeed", "optim.zero_stage=2", f"optim.deepspeed={written}"])
    (finding,) = findings(config, 1)
    assert finding.found.startswith(f"{name},")
    assert finding.do == f"instead of {name}: {OWNED[name]}"


def test_zero_optimization_is_a_mapping(base: Path) -> None:
    wrong = ["optim.engine=deepspeed", "optim.zero_stage=2", "optim.deepspeed={zero_optimization: 2}"]
    (finding,) = findings(load(base, wrong), 1)
    assert "zero_optimization: 2" in finding.found


def test_every_example_belongs_to_a_rule() -> None:
    assert {rule.__name__ for rule in RULES} == EXAMPLES.keys()


def test_all_findings_are_told_in_one_error(base: Path) -> None:
    config = load(base, ["model.kv_heads=4", "model.hidden=50", "run.stop_after=11", "batch.global=13"])
    with pytest.raises(ConfigError) as caught:
        check(config, 2)
    said = str(caught.value)
    assert said.startswith("the config does not fit 2 ranks:")
    keys = [line for line in said.splitlines()[1:] if not line.startswith(" ")]
    assert keys == ["model.kv_heads", "model.hidden", "batch.global", "run.stop_after"]
    assert said.count("found:") == said.count("allowed:") == 4


@pytest.mark.parametrize(
    "legal",
    [
        ["optim.zero_stage=1"],
        ["optim.decay_steps=20"],
        ["optim.decay_steps=5"],
        ["data.page=4"],
        ["data.page=16"],
        ["model.family=gpt", "model.hidden=42"],
        ["model.kv_heads=6"],
        ["model.vocab=50257"],
        ["batch.global=7"],
    ],
    ids=" ".join,
)
def test_what_is_legal_passes(legal: list[str], base: Path) -> None:
    check(load(base, legal), 1)


@pytest.mark.parametrize("world_size", range(1, 13))
def test_offered_layouts_are_legal(world_size: int, base: Path) -> None:
    config = load(base, ["parallel.tensor=3", "parallel.pipeline=2", "batch.global=5040"])
    told = [finding for finding in findings(config, world_size) if " x " in finding.key]
    assert bool(told) == bool(world_size % 6)
    for finding in told:
        assert _offered(finding)
        for tensor, pipeline in _offered(finding):
            assert world_size % (tensor * pipeline) == 0


def _offered(finding: Finding) -> list[tuple[int, int]]:
    layouts = finding.allowed.partition(": ")[2].split(", ")
    return [(int(words[1]), int(words[4])) for words in (layout.split() for layout in layouts)]


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_fits_its_ranks(path: Path) -> None:
    config: Config = load(path)
    check(config, RANKS[path.stem])
    with pytest.raises(ConfigError, match=r"batch\.global|parallel\.tensor"):
        check(config, 11 * RANKS[path.stem])


# ranks of this host, of how many -> tensor degree -> the group that crosses, None: none does
HOSTS = [
    (range(8), 16, {1: None, 2: None, 4: None, 8: None, 3: "6 to 8", 16: "0 to 15"}),
    (range(8, 16), 16, {8: None, 3: "6 to 8", 16: "0 to 15"}),
    (range(4, 12), 16, {4: None, 8: "0 to 7"}),  # after a host of four
    (range(12, 14), 14, {2: None, 4: "12 to 15"}),
    (range(1, 9), 16, {1: None, 2: "0 to 1"}),  # numbered round the hosts: rank 1 is the first of its host
    (range(8), 8, {8: None}),
]


@pytest.mark.parametrize(("host_ranks", "world_size", "degrees"), HOSTS)
def test_tensor_groups_stay_on_a_host(
    host_ranks: range, world_size: int, degrees: dict[int, str | None], base: Path
) -> None:
    for tensor, crossing in degrees.items():
        heads = f"model.heads={tensor}", f"model.hidden={8 * tensor}"
        config = load(base, [f"parallel.tensor={tensor}", *heads, "parallel.allow_cross_node=true"])
        assert tensor_stays_on_host(config, host_ranks) is None
        config = load(base, [f"parallel.tensor={tensor}", *heads])
        finding = tensor_stays_on_host(config, host_ranks)
        assert (finding is None) == (crossing is None)
        if finding is not None:
            assert f"the group of ranks {crossing} crosses" in finding.found
            assert "allow_cross_node=true" in str(finding)


def test_the_hosts_are_checked_before_anything_runs(base: Path) -> None:
    config = load(base, ["parallel.tensor=3", "batch.global=12"])
    check(config, 12)
    check(config, 12, host_ranks=range(12))
    with pytest.raises(ConfigError, match="ranks 3 to 5 crosses") as error:
        check(config, 12, host_ranks=range(4, 8))
    assert "divides the ranks of a host: 1, 2, 4" in str(error.value)


@pytest.mark.parametrize("world_size", [2, 5, 6, 8, 12])
def test_offered_layouts_keep_to_the_wanted_axes(world_size: int, base: Path) -> None:
    config = load(
        base, ["parallel.tensor=2", "parallel.context=2", "parallel.pipeline=1", "batch.global=5040"]
    )
    told = [finding for finding in findings(config, world_size) if " x " in finding.key]
    assert bool(told) == bool(world_size % 4)
    for finding in told:
        assert finding.key == "parallel.tensor x parallel.context x parallel.pipeline"
        for offer in finding.allowed.partition(": ")[2].split(", "):
            words = offer.split()
            assert words[::3] == ["tensor", "context", "pipeline"]
            assert world_size % prod(int(degree) for degree in words[1::3]) == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_the_config_of_a_dense_model_stays_legal_when_it_is_written_out(family: str, base: Path) -> None:
    """What a run's directory holds is what `evaluate` and a resumed run read."""
    config = load(base, [f"model.family={family}"])
    completed = complete(config.model, vocab=401, sequence_length=16)
    for model in (completed, replace(completed, router="softmax")):  # older runs wrote a router
        found = findings(replace(config, model=model), 1)
        assert not any(finding.key == "model.router" or "model.experts" in finding.found for finding in found)
