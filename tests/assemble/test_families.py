"""Every family comes in and goes out again bit for bit, in either dialect of config.json and of the files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import megads.checkpoint
from megads.assemble.export_hf import export_hf
from megads.assemble.import_checkpoint import import_checkpoint
from megads.assemble.import_hf import open_hf
from megads.assemble.origin import Hints, Origin
from megads.checkpoint import hf
from megads.checkpoint.fp8_blocks import Quantised, dequantise, quantise
from megads.checkpoint.hf_names import pattern
from megads.checkpoint.proof import bits
from megads.errors import CheckpointError, MegadsError
from megads.model.catalog import HUGGING_FACE
from tests.assemble.models import Sample, make_sentencepiece, save_step, to_hf, to_megads
from tests.model.families import CASES, FamilyCase

pytest.importorskip("transformers")
torch.set_num_threads(1)
MOE = tuple(case for case in CASES if case.name in ("qwen3_moe", "mixtral"))


def saved(case: FamilyCase, directory: Path, **how: Any) -> Path:
    case.make().save_pretrained(directory, **how)
    return directory


def edit(directory: Path, **values: object) -> Path:
    """Change config.json; None takes a key out."""
    file = directory / "config.json"
    tree = json.loads(file.read_text()) | values
    file.write_text(json.dumps({key: value for key, value in tree.items() if value is not None}))
    return directory


def weights(origin: Origin) -> dict[str, torch.Tensor]:
    return {name: values.whole() for name, values in origin.weights("model").items()}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_out_again_is_the_same_model(case: FamilyCase, tmp_path: Path) -> None:
    source = saved(case, tmp_path / "source")
    report = export_hf(open_hf(source, Hints()), tmp_path / "out")
    assert report.comparison is not None and report.comparison.is_equal
    assert report.comparison.largest > 0.5
    before, after = hf.Weights(source), hf.Weights(tmp_path / "out")
    assert before.shapes == after.shapes
    assert all(torch.equal(before.tensor(name), after.tensor(name)) for name in before.shapes)
    assert open_hf(tmp_path / "out", Hints()).spec == open_hf(source, Hints()).spec


@pytest.mark.parametrize("case", MOE, ids=str)
def test_experts_one_by_one_or_stacked(case: FamilyCase, tmp_path: Path) -> None:
    alone = open_hf(saved(case, tmp_path / "alone"), Hints())
    stacked = open_hf(saved(case, tmp_path / "stacked", save_original_format=False), Hints())
    names = [foreign for parts in alone.names.values() for foreign in parts]
    fewer = [foreign for parts in stacked.names.values() for foreign in parts]
    assert any(".experts.1." in name for name in names) and not any(".experts.1." in name for name in fewer)
    theirs = weights(stacked)
    assert all(torch.equal(values, theirs[name]) for name, values in weights(alone).items())


def test_both_dialects_of_rotary_positions(tmp_path: Path) -> None:
    llama3 = saved(CASES[0], tmp_path / "llama3")
    new = open_hf(llama3, Hints()).spec
    scaling = json.loads((llama3 / "config.json").read_text())["rope_parameters"]
    theta = scaling.pop("rope_theta")
    edit(llama3, rope_parameters=None, rope_theta=theta, rope_scaling=scaling)
    old = open_hf(llama3, Hints()).spec
    assert old == new and old.rope is not None and old.rope.scaling is not None


def test_both_dialects_of_layers_with_experts(tmp_path: Path) -> None:
    case = MOE[0]
    source = saved(case, tmp_path / "source")
    by_step = open_hf(source, Hints()).spec
    assert by_step.expert_layers == (1, 3)
    edit(source, decoder_sparse_step=1, mlp_only_layers=[0, 2], num_experts=8, num_local_experts=None)
    assert open_hf(source, Hints()).spec == by_step


@pytest.mark.parametrize(
    ("name", "values", "told"),
    [
        ("llama3", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type"),
        (
            "llama3",
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "partial_rotary",
        ),
        ("qwen2-tied", {"use_sliding_window": True}, "use_sliding_window"),
        ("qwen2-tied", {"layer_types": ["sliding_attention"] * 3}, "layer_types"),
        ("qwen3", {"attention_bias": True}, "attention_bias"),
        ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step"),
        ("qwen3_moe", {"mlp_only_layers": [1, 3]}, r"model\.dense_layers"),
        ("qwen3_moe", {"num_local_experts": 10**9}, r"model\.experts"),
        ("qwen3_moe", {"num_local_experts": 4}, "unexpected"),
        ("mixtral", {"sliding_window": 4096}, "sliding_window"),
        ("mixtral", {"num_experts_per_tok": 9}, r"model\.experts_per_token"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_what_a_family_does_not_compute_is_refused(
    name: str, values: dict[str, object], told: str, tmp_path: Path
) -> None:
    source = saved(next(case for case in CASES if case.name == name), tmp_path / "source")
    with pytest.raises(MegadsError, match=told):
        open_hf(edit(source, **values), Hints())


@pytest.mark.parametrize(
    ("name", "change", "told"),
    [
        ("qwen3_moe", {"router": "sigmoid"}, "model.router sigmoid"),
        ("qwen3_moe", {"shared_experts": 1}, "model.shared_experts 1"),
        ("qwen3_moe", {"capacity": 1.5}, "model.capacity 1.5"),
        ("mixtral", {"renormalise": False}, "model.renormalise False"),
        ("mixtral", {"dense_layers": (0,)}, r"experts in layers \[1, 2\]"),
        ("qwen2-tied", {"head_dim": 10}, "model.head_dim 10"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_hugging_face_has_no_name_for_is_refused(
    name: str, change: dict[str, Any], told: str, tmp_path: Path
) -> None:

    source = saved(next(case for case in CASES if case.name == name), tmp_path / "source")
    model = replace(open_hf(source, Hints()).model, **change)
    with pytest.raises(CheckpointError, match=told):
        HUGGING_FACE[model.family].to_config(model)


def in_fp8(directory: Path, *, cut_scales: bool = False) -> dict[str, torch.Tensor]:
    """Store the projections of a model as DeepSeek publishes them; returns what all its tensors are then worth."""
    import safetensors.torch

    file = directory / hf.SINGLE_NAME
    stored, worth = {}, {}
    for name, values in safetensors.torch.load_file(file).items():
        stored[name] = worth[name] = values
        if "_proj" in name and name.endswith(".weight"):
            made = quantise(values, kind="float")
            scales = made.scales[:, :1] if cut_scales else made.scales
            stored |= {name: made.values, f"{name}_scale_inv": scales.contiguous()}
            worth[name] = dequantise(Quantised(made.values, made.scales))
    safetensors.torch.save_file(stored, file, metadata={"format": "pt"})
    edit(directory, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    return worth


def test_fp8_weights_come_in_times_their_scales(tmp_path: Path) -> None:
    v3 = next(case for case in CASES if case.name == "deepseek_v3")
    wide = replace(v3, changes={**v3.changes, "hidden_size": 136, "num_hidden_layers": 2})
    worth = in_fp8(saved(wide, tmp_path / "source"))
    origin = open_hf(tmp_path / "source", Hints())
    report = import_checkpoint(origin, tmp_path / "run")
    assert report.comparison is None and any("FP8" in note for note in report.notes)
    assert export_hf(origin, tmp_path / "out").comparison is not None
    after = hf.Weights(tmp_path / "out")
    assert after.shapes.keys() == worth.keys()
    assert all(torch.equal(after.tensor(name), values.float()) for name, values in worth.items())


@pytest.mark.parametrize("kind", ["float", "ue8m0"])
def test_fp8_weights_go_out_as_they_came(kind: Any, tmp_path: Path) -> None:
    """Projections alone, and what was read and not changed since has the numbers that were read, scales too."""
    v3 = next(case for case in CASES if case.name == "deepseek_v3")
    wide = replace(v3, changes={**v3.changes, "hidden_size": 136, "num_hidden_layers": 2})
    export_hf(open_hf(saved(wide, tmp_path / "source"), Hints()), tmp_path / "first", fp8=kind)
    report = export_hf(open_hf(tmp_path / "first", Hints()), tmp_path / "second", fp8=kind)
    assert report.comparison is None and any("FP8" in note for note in report.notes)
    first, second = (load_all(tmp_path / name) for name in ("first", "second"))
    assert first.keys() == second.keys()
    small = {name for name, values in first.items() if values.dtype == torch.float8_e4m3fn}
    kinds = {pattern(name).split(".")[-2] for name in small}
    attention = {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"}
    assert kinds == attention | {"gate_proj", "up_proj", "down_proj"}
    assert {f"{name}_scale_inv" for name in small} == {name for name in first if "_scale_inv" in name}
    if kind == "float":
        assert all(torch.equal(bits(first[name]), bits(second[name])) for name in first)
    settings = json.loads((tmp_path / "second" / "config.json").read_text())["quantization_config"]
    assert settings["weight_block_size"] == [128, 128]
    assert settings.get("scale_fmt", "float") == kind
    with pytest.raises(CheckpointError, match="mixtral is not published in FP8"):
        mixtral = next(case for case in CASES if case.name == "mixtral")
        export_hf(open_hf(saved(mixtral, tmp_path / "other"), Hints()), tmp_path / "no", fp8=kind)


def test_a_routers_bias_keeps_float32_in_bf16(tmp_path: Path) -> None:
    v3 = next(case for case in CASES if case.name == "deepseek_v3")
    source = saved(v3, tmp_path / "source")
    report = export_hf(open_hf(source, Hints()), tmp_path / "out", dtype=torch.bfloat16)
    assert report.comparison is not None
    before, after = load_all(source), load_all(tmp_path / "out")
    biases = [name for name in after if name.endswith("e_score_correction_bias")]
    assert biases and all(torch.equal(after[name], before[name]) for name in biases)
    assert {values.dtype for name, values in after.items() if name not in biases} == {torch.bfloat16}


def load_all(directory: Path) -> dict[str, torch.Tensor]:
    import safetensors.torch

    return safetensors.torch.load_file(directory / hf.SINGLE_NAME)


def test_fp8_weights_without_their_scales_are_refused(tmp_path: Path) -> None:
    v3 = next(case for case in CASES if case.name == "deepseek_v3")
    wide = replace(v3, changes={**v3.changes, "hidden_size": 136, "num_hidden_layers": 2})
    in_fp8(saved(wide, tmp_path / "source"), cut_scales=True)
    with pytest.raises(CheckpointError, match=r"_scale_inv: not the scales of FP8 weights"):
        open_hf(tmp_path / "source", Hints())


def test_layers_ahead_go_out_and_come_back(tmp_path: Path) -> None:
    """transformers has no place for multi-token prediction; the file keeps it, bit for bit."""
    latent = {"q_lora": 24, "kv_lora": 16, "nope_dim": 8, "rope_dim": 8, "v_dim": 8}
    experts = {"experts": 4, "expert_ffn": 16, "shared_experts": 1, "dense_layers": 1, "balance": "bias"}
    more = {**latent, **experts, "mtp_layers": 1}
    weights = save_step(tmp_path / "run", Sample("deepseek_v3", more=more), make_sentencepiece(tmp_path))
    to_hf(tmp_path / "run", tmp_path / "hf")
    to_megads(tmp_path / "hf", tmp_path / "back")
    back = megads.checkpoint.open(tmp_path / "back")
    assert any(name.startswith("layers.3.eh_proj") for name in weights)
    for name, values in weights.items():
        assert torch.equal(back[f"model/{name}"], values), name
