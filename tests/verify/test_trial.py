"""`verify/trial.py` and `verify/shrink.py`: what a layout's text means, and what of a config stays when it is small."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megads.assemble import rules
from megads.errors import ConfigError
from megads.verify.shrink import shrink
from megads.verify.trial import Trial, one_process, own_trial, read_trial

CONFIGS = Path(__file__).parents[2] / "configs"
BIG = """\
run: {steps: 10}
model: {family: llama, layers: 60, hidden: 7168, heads: 128, kv_heads: 8, ffn: 18432, vocab: 129280, tied: false,
  experts: 256, experts_per_token: 8, expert_ffn: 2048, shared_experts: 1, dense_layers: 3, router: sigmoid,
  expert_groups: 8, groups_per_token: 4, balance: bias, capacity: 2.0, dropout: 0.1, z_loss: 0.01}
batch: {global: 4096, micro: 4}
data: {train: none, tokenizer: none, sequence_length: 4096, document_mask: true}
optim: {lr: 1e-3, precision: bf16, zero_stage: 1, eps: 1e-15}
parallel: {tensor: 8, sequence: true, pipeline: 16, virtual_stages: 2, schedule: interleaved, expert: 64,
  expert_tensor: 1, recompute: [norm, activation], recompute_layers: 2, loss_chunk: 1024}
"""


@pytest.fixture
def big(tmp_path: Path) -> str:
    path = tmp_path / "big.yaml"
    path.write_text(BIG)
    return str(path)


def test_a_layout_sets_degrees_and_leaves_features(big: str) -> None:
    trial = read_trial(big, "tensor=2,recompute=[attention,mlp],data=3,micro=5,zero_stage=0")
    parallel = trial.config.parallel
    assert (parallel.tensor, parallel.pipeline, parallel.expert, parallel.expert_tensor) == (2, 1, 1, None)
    assert (parallel.virtual_stages, parallel.schedule) == (1, "one_f_one_b")
    assert parallel.sequence and parallel.recompute == ("attention", "mlp")
    assert (trial.config.batch.micro, trial.config.optim.zero_stage, trial.world_size) == (5, 0, 6)
    assert trial.config.optim.precision == "fp64"
    assert read_trial(big, "pipeline=4").config.parallel.schedule == "interleaved"


def test_without_a_layout_it_is_the_configs_own(big: str) -> None:
    trial = own_trial(big)
    parallel = trial.config.parallel
    assert (parallel.tensor, parallel.pipeline, parallel.virtual_stages, parallel.expert) == (8, 16, 2, 64)
    assert trial.data == 8  # 64 expert ranks in tensor x data


@pytest.mark.parametrize(
    ("layout", "told"),
    [
        ("tensr=2", "tensr"),
        ("tensor", "no value"),
        ("tensor=0", "parallel.tensor"),
        ("data=x", "data"),
        ("schedule=7", "parallel.schedule"),
        ("precision=fp8x", "optim.precision"),
    ],
)
def test_a_wrong_layout_names_the_key(big: str, layout: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        read_trial(big, layout)


def test_small_and_with_everything_on(big: str) -> None:
    layouts = (
        "tensor=2,pipeline=2",
        "tensor=2,context=2,expert=4,expert_tensor=1",
        "data=2,expert=2,micro=3",
    )
    trials = shrink([read_trial(big, layout) for layout in layouts])
    models = {trial.config.model for trial in trials}
    assert len(models) == 1
    (model,) = models
    assert model.layers <= 4 and model.hidden <= 256 and model.vocab == 53
    assert model.heads // (model.kv_heads or 0) == 4
    assert model.experts is not None and model.experts <= 16 and model.experts % 4 == 0
    assert 1 < model.experts_per_token < model.experts
    assert 1 <= model.groups_per_token < model.expert_groups
    kept = ("tied", "shared_experts", "router", "balance", "capacity", "dropout", "z_loss", "family")
    original = own_trial(big).config.model
    assert all(getattr(model, key) == getattr(original, key) for key in kept)
    assert model.dense_layers == 1
    sizes = {(t.config.batch.global_size, t.config.data.sequence_length) for t in trials}
    assert len(sizes) == 1
    for trial in trials:
        assert trial.config.data.document_mask
        assert trial.config.parallel.recompute == ("norm", "activation")
        assert trial.config.optim.eps >= 1e-5
        rules.check(trial.config, trial.world_size)
    assert trials[2].config.batch.micro == 3


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_config_of_the_house_shrinks(path: Path) -> None:
    layouts = ("tensor=2,data=2", "pipeline=3", "context=2,tensor=2,context_kind=ulysses", "micro=4")
    for trial in shrink([read_trial(str(path), layout) for layout in layouts]):
        rules.check(trial.config, trial.world_size)
        assert trial.config.model.hidden <= 256


def test_a_users_deal_of_layers_stays_one(big: str) -> None:
    overrides = ("model.experts=null", "model.dense_layers=0", "model.shared_experts=0", "model.z_loss=0.0")
    plain = (
        "model.router=softmax",
        "model.expert_groups=1",
        "model.groups_per_token=1",
        "model.balance=none",
    )
    others = ("model.capacity=null", "model.experts_per_token=2", "model.expert_ffn=null")
    words = (*overrides, *plain, *others)
    first, second = shrink(
        [
            read_trial(
                big, "pipeline=4,schedule=gpipe,virtual_stages=1,stage_layers=[7,9,30,14]", overrides=words
            ),
            read_trial(big, "tensor=2", overrides=words),
        ]
    )
    assert first.config.parallel.stage_layers == (0, 1, 2, 0)
    assert second.config.parallel.stage_layers is None
    rules.check(first.config, first.world_size)


def test_the_reference_is_the_same_whatever_the_layout(big: str) -> None:
    trials = shrink([read_trial(big, "tensor=2"), read_trial(big, "data=2,micro=4")])
    alone = [one_process(trial, precision="fp64").config for trial in trials]
    assert alone[0] == alone[1]
    assert alone[0].batch.micro == alone[0].batch.global_size
    assert Trial("x", replace(alone[0])).world_size == 1
