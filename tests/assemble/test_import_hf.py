"""A Hugging Face model comes in bit for bit and computes the same; hostile or foreign files are refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megads.checkpoint import hf
from megads.checkpoint.load import read_box
from megads.checkpoint.reader import open_step
from megads.config.load import load
from megads.data.tokenizer import open_tokenizer
from megads.errors import ConfigError, MegadsError
from megads.evaluate.restore import restore
from megads.parallel.shard import Box
from tests.assemble.models import Sample, save_step, to_hf, to_megads

pytest.importorskip("safetensors")
needs_transformers = pytest.mark.skipif(not hf.has_transformers(), reason="transformers is not installed")


def tensors_of(step: Path) -> dict[str, torch.Tensor]:
    reader = open_step(step)
    entries = reader.manifest.tensors.items()
    return {n.removeprefix("model/"): read_box(reader, n, box=Box.whole(e.shape)) for n, e in entries}


@pytest.mark.parametrize(
    "sample",
    [
        Sample("gpt"),
        Sample("gpt", tied=False, precision="fp64"),
        Sample("llama", kv_heads=2, more={"rope_theta": 500.0, "norm_eps": 1e-3}),
        Sample("llama", tied=True),
    ],
    ids=str,
)
def test_there_and_back_is_the_same_bits_and_the_same_model(
    sample: Sample, tmp_path: Path, sp_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hf, "has_transformers", lambda: False)  # the second comparison is enough
    weights = save_step(tmp_path / "run", sample, sp_model)
    to_hf(tmp_path / "run", tmp_path / "out", max_shard_bytes=40_000)
    monkeypatch.undo()
    report = to_megads(tmp_path / "out", tmp_path / "back")
    assert (report.comparison is not None) == hf.has_transformers()
    found = tensors_of(tmp_path / "back" / "checkpoints" / "step-00000000")
    assert found.keys() == weights.keys()
    assert all(found[n].dtype == t.dtype and torch.equal(found[n], t) for n, t in weights.items())
    mine, theirs = (restore(str(tmp_path / name), []).model.spec for name in ("run", "back"))
    assert mine == theirs
    config = load(tmp_path / "back" / "config.yaml")
    assert open_tokenizer(config.data.tokenizer).fingerprint == open_tokenizer(sp_model).fingerprint


@needs_transformers
@pytest.mark.parametrize("family", ["gpt", "llama"])
def test_a_model_that_transformers_made(family: str, tmp_path: Path) -> None:
    import transformers

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 97, "initializer_range": 0.3}
    if family == "gpt":
        config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=24, **sizes)
        model = transformers.GPT2LMHeadModel(config)
    else:
        config = transformers.LlamaConfig(
            hidden_size=32,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=24,
            rope_parameters={"rope_type": "default", "rope_theta": 700.0},
            **sizes,
        )
        model = transformers.LlamaForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "source")
    report = to_megads(tmp_path / "source", tmp_path / "back")
    assert report.comparison is not None
    assert report.comparison.largest > 0.5
    assert report.comparison.is_equal
    assert any("data.tokenizer" in note for note in report.notes)
    word = tensors_of(tmp_path / "back" / "checkpoints" / "step-00000000")["embedding.word.weight"]
    assert word.dtype == torch.float32
    assert torch.equal(word, model.get_input_embeddings().weight.float())


@needs_transformers
def test_old_names_masks_and_a_repeated_head(tmp_path: Path) -> None:
    """The files of 2019: no `transformer.`, causal masks among the weights."""
    import safetensors.torch
    import transformers

    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=24)
    )
    model.save_pretrained(tmp_path / "source")
    file = tmp_path / "source" / hf.SINGLE_NAME
    tensors = safetensors.torch.load_file(file)
    old = {name.removeprefix("transformer."): t for name, t in tensors.items()}
    old |= {f"h.{n}.attn.bias": torch.ones(1, 1, 24, 24, dtype=torch.uint8) for n in range(2)}
    old["lm_head.weight"] = old["wte.weight"].clone()
    safetensors.torch.save_file(old, file, metadata={"format": "pt"})
    weights = hf.Weights(tmp_path / "source")
    assert "h.0.attn.bias" in weights.shapes
    to_megads(tmp_path / "source", tmp_path / "back")
    found = tensors_of(tmp_path / "back" / "checkpoints" / "step-00000000")
    assert torch.equal(found["layers.1.mlp.up.weight"], tensors["transformer.h.1.mlp.c_fc.weight"].t())


def edit(source: Path, **values: object) -> None:
    file = source / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.fixture
def source(tmp_path: Path, hf_tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An exported Llama; transformers is left out, so that megads alone must say no."""
    monkeypatch.setattr(hf, "has_transformers", lambda: False)
    save_step(tmp_path / "run", Sample("llama", kv_heads=2), hf_tokenizer)
    to_hf(tmp_path / "run", tmp_path / "source")
    return tmp_path / "source"


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"model_type": "mamba"}, "mamba"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 8.0}}, "rope_type"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "rope_type"),
        ({"attention_bias": True}, "attention_bias"),
        ({"hidden_act": "relu"}, "hidden_act"),
        ({"head_dim": 16}, "misshapen"),
        ({"num_hidden_layers": 2}, r"unexpected: model\.layers\.\*"),
        ({"num_hidden_layers": 4}, r"missing: model\.layers\.\*"),
        ({"intermediate_size": 80}, "misshapen"),
        ({"vocab_size": 410}, "misshapen"),
        ({"vocab_size": None}, r"no model\.vocab"),
        ({"tie_word_embeddings": None, "num_key_value_heads": 4}, "misshapen"),
        ({"num_hidden_layers": -1}, r"model\.layers"),
        ({"hidden_size": "48"}, r"model\.hidden"),
        ({"num_attention_heads": 0}, r"model\.heads"),
        ({"num_attention_heads": 5}, r"model\.kv_heads"),
        ({"num_attention_heads": 5, "head_dim": None}, r"model\.hidden"),
        ({"rms_norm_eps": -1}, r"model\.norm_eps"),
        ({"num_hidden_layers": 10**9}, r"model\.layers"),
        ({"hidden_size": 4 * 10**15, "head_dim": None}, r"model\.hidden"),
        ({"vocab_size": 10**30}, r"model\.vocab"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_another_model_is_refused(source: Path, values: dict[str, object], told: str) -> None:
    edit(source, **values)
    with pytest.raises(MegadsError, match=told):
        to_megads(source, source.parent / "back")
    assert not (source.parent / "back").exists()


def test_missing_sizes_are_told_all_at_once(source: Path) -> None:
    sizes = {"vocab_size": 411, "max_position_embeddings": 40}
    (source / "config.json").write_text(json.dumps({"model_type": "llama", **sizes}))
    with pytest.raises(ConfigError) as told:
        to_megads(source, source.parent / "back")
    assert all(key in str(told.value) for key in ("model.layers", "model.hidden", "model.heads"))
