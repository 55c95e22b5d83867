"""What is exported computes in transformers what it computes in megads; whatever would not, is refused and not there.

Without transformers the tests that need it are skipped; every written bit is still compared.
"""

from __future__ import annotations

import importlib.util
import json
import runpy
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megads.assemble import export_hf as module
from megads.assemble.compare import compare, sample_tokens
from megads.assemble.convert import open_origin
from megads.assemble.origin import Hints
from megads.checkpoint import hf
from megads.checkpoint.hf_names import Family
from megads.checkpoint.store import Store
from megads.data.tokenizer import open_tokenizer
from megads.errors import CheckpointError, DataError
from megads.evaluate.generate import Generator, Sampling
from megads.evaluate.restore import restore
from megads.model.catalog import HUGGING_FACE, describe
from tests.assemble.models import Sample, config_of, save_step, to_hf

pytest.importorskip("safetensors")
ROOT = Path(__file__).parents[2]
needs_transformers = pytest.mark.skipif(not hf.has_transformers(), reason="transformers is not installed")

SAMPLES = [
    Sample("gpt"),
    Sample("gpt", tied=False, more={"norm_eps": 1e-3}),
    Sample("gpt", precision="fp64"),
    Sample("llama"),
    Sample("llama", tied=True, kv_heads=2, more={"rope_theta": 500.0}),
    Sample("llama", kv_heads=1, more={"norm_eps": 1e-3}),
    Sample("llama", precision="fp64"),
]


def exported(tmp_path: Path, sample: Sample, tokenizer: Path, **options: Any) -> Path:
    save_step(tmp_path / "run", sample, tokenizer)
    to_hf(tmp_path / "run", tmp_path / "out", **options)
    return tmp_path / "out"


def expected_tensors(sample: Sample, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The Hugging Face tensors, written down a second time and without the tables."""
    found = {}
    for name, t in weights.items():
        part = name.split(".")
        if name == "embedding.word.weight":
            found["transformer.wte.weight" if sample.family == "gpt" else "model.embed_tokens.weight"] = t
        elif name == "embedding.position.weight":
            found["transformer.wpe.weight"] = t
        elif name == "head.output.weight":
            found["lm_head.weight"] = t
        elif part[0] == "head":
            found["transformer.ln_f." + part[2] if sample.family == "gpt" else "model.norm.weight"] = t
        elif sample.family == "gpt":
            new = {
                "attention_norm": "ln_1",
                "mlp_norm": "ln_2",
                "attention.qkv": "attn.c_attn",
                "attention.out": "attn.c_proj",
                "mlp.up": "mlp.c_fc",
                "mlp.down": "mlp.c_proj",
            }[".".join(part[2:-1])]
            found[f"transformer.h.{part[1]}.{new}.{part[-1]}"] = t.t() if t.dim() == 2 else t
        else:
            kv = 12 * (sample.kv_heads or 4)
            news: dict[str, dict[str, torch.Tensor]] = {
                "attention_norm": {"input_layernorm": t},
                "mlp_norm": {"post_attention_layernorm": t},
                "attention.qkv": {
                    "self_attn.q_proj": t[:48],
                    "self_attn.k_proj": t[48 : 48 + kv],
                    "self_attn.v_proj": t[48 + kv :],
                },
                "attention.out": {"self_attn.o_proj": t},
                "mlp.gate_up": {"mlp.gate_proj": t[:72], "mlp.up_proj": t[72:]},
                "mlp.down": {"mlp.down_proj": t},
            }
            for new, values in news[".".join(part[2:-1])].items():
                found[f"model.layers.{part[1]}.{new}.weight"] = values
    return found


@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_every_tensor_is_there_bit_for_bit_and_logits_are_equal(
    sample: Sample, tmp_path: Path, hf_tokenizer: Path
) -> None:
    weights = save_step(tmp_path / "run", sample, hf_tokenizer)
    report = to_hf(tmp_path / "run", tmp_path / "out")
    written = hf.Weights(tmp_path / "out")
    expected = expected_tensors(sample, weights)
    assert written.shapes == {name: tuple(t.shape) for name, t in expected.items()}
    for name, t in expected.items():
        found = written.tensor(name)
        assert found.dtype == t.dtype
        assert torch.equal(found, t), name
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    if not hf.has_transformers():
        assert report.comparison is None
        assert any("no logits" in note for note in report.notes)
        return
    assert report.notes == ()
    assert report.comparison is not None
    assert report.comparison.largest > 1
    exact = sample.family == "gpt" and sample.precision == "fp64"  # transformers' RMSNorm is always float32
    assert report.comparison.difference < (1e-12 if exact else 1e-5 * report.comparison.largest)


@needs_transformers
@pytest.mark.parametrize("family", ["gpt", "llama"])
def test_transformers_writes_the_same_text(family: str, tmp_path: Path, hf_tokenizer: Path) -> None:
    import transformers

    out = exported(tmp_path, Sample(family), hf_tokenizer)
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert model.dtype == torch.float32
    words = transformers.AutoTokenizer.from_pretrained(out)
    prompt = "def area("
    ids = words(prompt, return_tensors="pt", return_token_type_ids=False)
    theirs = model.generate(**ids, max_new_tokens=16, do_sample=False)[0].tolist()
    restored = restore(str(tmp_path / "run"), [])
    start = open_tokenizer(hf_tokenizer).encode_batch([prompt])[0].tolist()
    assert start == ids["input_ids"][0].tolist()
    stop = open_tokenizer(hf_tokenizer).eod
    made = Generator(restored.model, restored.mesh).extend(
        start, num_tokens=16, sampling=Sampling(temperature=0), stop=stop
    )
    assert theirs[: len(start) + len(made)] == start + made


def test_many_files_hold_what_one_file_holds(tmp_path: Path, hf_tokenizer: Path) -> None:
    save_step(tmp_path / "run", Sample("llama", kv_heads=2), hf_tokenizer)
    to_hf(tmp_path / "run", tmp_path / "one")
    to_hf(tmp_path / "run", tmp_path / "many", max_shard_bytes=30_000)
    one, many = hf.Weights(tmp_path / "one"), hf.Weights(tmp_path / "many")
    files = sorted(file.name for file in (tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 5
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert one.shapes == many.shapes
    assert all(torch.equal(one.tensor(name), many.tensor(name)) for name in one.shapes)
    index = json.loads((tmp_path / "many" / hf.INDEX_NAME).read_text())
    assert index["metadata"]["total_size"] == sum(one.tensor(name).nbytes for name in one.shapes)
    for file in files:
        inside = [one.tensor(name).nbytes for name, where in index["weight_map"].items() if where == file]
        assert sum(inside) <= 30_000 or len(inside) == 1


@needs_transformers
def test_weights_can_be_rounded(tmp_path: Path, hf_tokenizer: Path) -> None:
    weights = save_step(tmp_path / "run", Sample("llama"), hf_tokenizer)
    report = to_hf(tmp_path / "run", tmp_path / "out", dtype=torch.bfloat16)
    written = hf.Weights(tmp_path / "out").tensor("model.norm.weight")
    assert torch.equal(written, weights["head.norm.weight"].bfloat16())
    assert json.loads((tmp_path / "out/config.json").read_text())["torch_dtype"] == "bfloat16"
    assert report.comparison is not None
    assert report.comparison.is_equal


def swap_q_and_k(family: Family) -> Family:
    """q and k exchanged in the table (the same shape, so that only the logits tell)."""
    qkv = next(row for row in family.rows if row.name == "layers.*.attention.qkv.weight")
    q, k, v = qkv.parts
    rows = tuple(replace(row, parts=(k, q, v)) if row is qkv else row for row in family.rows)
    return replace(family, rows=rows)


def swap_norms(family: Family) -> Family:
    names = {"layers.*.attention_norm.weight": "layers.*.mlp_norm.weight"}
    names |= {new: old for old, new in names.items()}
    return replace(family, rows=tuple(replace(r, name=names.get(r.name, r.name)) for r in family.rows))


def swap_gate_and_up(family: Family) -> Family:
    rows = tuple(replace(r, parts=r.parts[::-1]) if "gate_up" in r.name else r for r in family.rows)
    return replace(family, rows=rows)


def forget_transpose(name: str) -> Callable[[Family], Family]:
    def change(family: Family) -> Family:
        rows = tuple(replace(r, is_transposed=False) if r.name == name else r for r in family.rows)
        return replace(family, rows=rows)

    return change


def config_says(**values: object) -> Callable[[Family], Family]:
    def change(family: Family) -> Family:
        return replace(family, to_config=lambda model: {**family.to_config(model), **values})

    return change


def leave_out(name: str) -> Callable[[Family], Family]:
    return lambda family: replace(family, rows=tuple(row for row in family.rows if row.name != name))


MUTATIONS: list[tuple[str, str, Callable[[Family], Family]]] = [
    ("llama", "q and k", swap_q_and_k),
    ("llama", "gate and up", swap_gate_and_up),
    ("llama", "norms", swap_norms),
    ("gpt", "norms", swap_norms),
    ("gpt", "no transpose, square", forget_transpose("layers.*.attention.out.weight")),
    ("gpt", "no transpose", forget_transpose("layers.*.mlp.up.weight")),
    ("gpt", "gelu", config_says(activation_function="gelu")),
    ("gpt", "eps", config_says(layer_norm_epsilon=1e-4)),
    ("llama", "eps", config_says(rms_norm_eps=1e-5)),
    ("llama", "theta", config_says(rope_theta=9000.0)),
    ("llama", "heads", config_says(num_attention_heads=2, head_dim=24)),
    ("gpt", "heads", config_says(n_head=8)),
    ("gpt", "one layer less", config_says(n_layer=2)),
    ("gpt", "one layer more", config_says(n_layer=4)),
    ("llama", "tied", config_says(tie_word_embeddings=True)),
    ("gpt", "left out", leave_out("layers.*.mlp.down.bias")),
]


@needs_transformers
@pytest.mark.parametrize(("family", "what", "change"), MUTATIONS, ids=[f"{f}-{w}" for f, w, _ in MUTATIONS])
def test_a_wrong_table_or_config_is_refused(
    family: str,
    what: str,
    change: Callable[[Family], Family],
    tmp_path: Path,
    hf_tokenizer: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    save_step(tmp_path / "run", Sample(family), hf_tokenizer)
    monkeypatch.setattr(module, "HUGGING_FACE", {family: change(HUGGING_FACE[family])})
    with pytest.raises(CheckpointError):
        to_hf(tmp_path / "run", tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]


@needs_transformers
def test_an_export_that_was_edited_no_longer_compares(tmp_path: Path, hf_tokenizer: Path) -> None:
    sample = Sample("gpt")
    weights = save_step(tmp_path / "run", sample, hf_tokenizer)
    to_hf(tmp_path / "run", tmp_path / "out")
    spec = describe(config_of(sample, hf_tokenizer).model, vocab=1, sequence_length=32)
    tokens = sample_tokens([1, 2, 3], spec)

    def check() -> None:
        compare(tmp_path / "out", spec, tokens=tokens, read=weights.__getitem__, dtype=torch.float32)

    check()
    file = tmp_path / "out" / hf.SINGLE_NAME
    content = bytearray(file.read_bytes())
    content[-1] ^= 0x40  # the exponent of one value of the last bias
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="other logits"):
        check()


def test_a_bit_that_the_disk_turned_is_seen(
    tmp_path: Path, hf_tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Flips(Store):
        """Turns the last bit of the first large write."""

        def write(self, handle: int, data: Any) -> int:
            if len(data) == 48 * 411 * 4:
                data = bytearray(data)
                data[-4] ^= 1  # invisible in the logits
            return super().write(handle, data)

    save_step(tmp_path / "run", Sample("gpt"), hf_tokenizer)
    monkeypatch.setattr(hf, "has_transformers", lambda: False)
    with pytest.raises(CheckpointError, match=r"wte.weight: its bytes"):
        to_hf(tmp_path / "run", tmp_path / "out", store=Flips())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]


def test_without_safetensors_nothing_begins(
    tmp_path: Path, hf_tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_step(tmp_path / "run", Sample("gpt", layers=1), hf_tokenizer)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match=r"pip install safetensors"):
        to_hf(tmp_path / "run", tmp_path / "out")


def test_what_cannot_be_exported_is_told(tmp_path: Path, hf_tokenizer: Path, sp_model: Path) -> None:
    save_step(tmp_path / "grouped", Sample("gpt", kv_heads=2), hf_tokenizer)
    with pytest.raises(CheckpointError, match="grouped queries"):
        to_hf(tmp_path / "grouped", tmp_path / "out")
    save_step(tmp_path / "run", Sample("gpt"), hf_tokenizer)
    with pytest.raises(DataError, match="not the tokenizer"):
        to_hf(tmp_path / "run", tmp_path / "out", tokenizer=sp_model)
    with pytest.raises(CheckpointError, match="no checkpoint"):
        to_hf(tmp_path / "nothing", tmp_path / "out")
    with pytest.raises(CheckpointError, match="already"):
        to_hf(tmp_path / "run", tmp_path / "grouped")
    assert not (tmp_path / "out").exists()


def test_a_step_of_another_model_than_its_config_is_refused(tmp_path: Path, hf_tokenizer: Path) -> None:
    save_step(tmp_path / "run", Sample("gpt"), hf_tokenizer)
    other = config_of(Sample("gpt", layers=4), hf_tokenizer)
    origin = replace(open_origin(tmp_path / "run", Hints()), config=other)
    with pytest.raises(CheckpointError, match=r"layers\.\*\.attention"):
        module.export_hf(origin, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["sentencepiece", "huggingface"])
def test_tokenizer_files_are_verbatim_and_give_the_same_ids(
    kind: str, tmp_path: Path, hf_tokenizer: Path, sp_model: Path
) -> None:
    file = sp_model if kind == "sentencepiece" else hf_tokenizer
    out = exported(tmp_path, Sample("llama", layers=1), file)
    for original in file.parent.iterdir():
        assert (out / original.name).read_bytes() == original.read_bytes()
    config = json.loads((out / "config.json").read_text())
    generation = json.loads((out / "generation_config.json").read_text())
    eod = open_tokenizer(file).eod
    assert config["eos_token_id"] == generation["eos_token_id"] == generation["bos_token_id"] == eod
    if not hf.has_transformers():
        pytest.skip("transformers is not installed")
    import transformers

    words = transformers.AutoTokenizer.from_pretrained(out)
    assert words.eos_token_id == eod
    text = (ROOT / "README.md").read_text() + "  a \n\t b  \u4f60\u597d"
    ids = open_tokenizer(file).encode_batch([text])[0].tolist()
    assert words.encode(text, add_special_tokens=False) == ids
    assert words(text)["input_ids"] == ids  # nothing is put before or after
    assert words.decode(ids) == text


def test_the_card_says_what_it_is(tmp_path: Path, hf_tokenizer: Path) -> None:
    out = exported(tmp_path, Sample("gpt"), hf_tokenizer)
    card = (out / "README.md").read_text()
    for fact in ("steps: 7", f"tokens read: {7 * 4 * 32}", "family: gpt", "largest difference"):
        assert fact in card or (fact == "largest difference" and not hf.has_transformers()), card


def test_without_transformers_the_report_says_so(
    tmp_path: Path, hf_tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hf, "has_transformers", lambda: False)
    save_step(tmp_path / "run", Sample("gpt"), hf_tokenizer)
    report = to_hf(tmp_path / "run", tmp_path / "out")
    assert report.comparison is None
    assert "no logits were compared" in report.notes[0]
    assert "no logits were compared" in (tmp_path / "out" / "README.md").read_text()


def run_tool(monkeypatch: pytest.MonkeyPatch, *argv: str) -> int:
    """tools/convert_checkpoint.py in this process; returns its exit code."""
    monkeypatch.setattr(sys, "argv", ["convert_checkpoint.py", *argv])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "tools" / "convert_checkpoint.py"), run_name="__main__")
    return int(ended.value.code or 0)


def test_the_command(
    tmp_path: Path, hf_tokenizer: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_step(tmp_path / "run", Sample("gpt", layers=1), hf_tokenizer)
    arguments = (str(tmp_path / "run"), str(tmp_path / "out"), "--to", "hf", "--max-shard-size", "50KB")
    assert run_tool(monkeypatch, *arguments) == 0
    assert "every bit read back" in capsys.readouterr().out
    assert (tmp_path / "out" / hf.INDEX_NAME).is_file()
    assert run_tool(monkeypatch, *arguments) == 2
    assert "is there already" in capsys.readouterr().err
    assert run_tool(monkeypatch, *arguments[:-1], "5 boats") == 2
    assert "no size" in capsys.readouterr().err
