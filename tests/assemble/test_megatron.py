"""Megatron-LM's checkpoints come in and go out: what the ranks' files compute is what megads computes.

The other side is tests/assemble/megatron_run.py, which knows Megatron's layout and nothing of the converter.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megads.assemble.compare import reference_outputs
from megads.assemble.convert import main, open_origin
from megads.assemble.export_megatron import MegatronLayout, export_megatron
from megads.assemble.origin import Hints, Origin
from megads.errors import CheckpointError, LayoutError, MegadsError
from megads.model import megatron as table
from tests.assemble.megatron_run import VOCAB, Run
from tests.assemble.models import Sample, save_step, to_hf, to_megads

HINTS = Hints(vocab=VOCAB)
TOKENS = torch.tensor([[0, 1, 410, 7, 99, 250, 3, 3], [5, 4, 3, 2, 1, 0, 400, 17]])

RUNS = [
    Run(),
    Run(tensor=2, style="local"),
    Run(tensor=2, pipeline=2, style="older"),
    Run(pipeline=2, virtual=2, is_tied=False),
    Run(is_llama=True, groups=2, tensor=2, pipeline=2, virtual=2, is_tied=False),
    Run(is_llama=True, groups=2, tensor=2, pipeline=4, style="older", is_tied=False),
    Run(is_llama=True, groups=1, style="local"),
    Run(is_llama=True, tensor=4, padded=512),
]


def logits_of(origin: Origin) -> torch.Tensor:
    weights = origin.weights("model")
    read = {name: values.whole().double() for name, values in weights.items()}
    return reference_outputs(origin.spec, TOKENS, read=read.__getitem__, dtype=torch.float64).logits


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_what_the_ranks_compute_is_what_megads_computes(run: Run, tmp_path: Path) -> None:
    run.make().save(tmp_path / "source")
    to_megads(tmp_path / "source", tmp_path / "back", hints=HINTS)
    found = logits_of(open_origin(tmp_path / "back", Hints()))
    expected = run.logits(TOKENS)
    assert expected.abs().max() > 1
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_there_and_back_every_rank_has_the_same_bits(run: Run, tmp_path: Path) -> None:
    if run.style == "older":
        pytest.skip("written are the names of core")
    run.make().save(tmp_path / "source")
    origin = open_origin(tmp_path / "source", HINTS)
    layout = MegatronLayout(run.tensor, run.pipeline, run.virtual)
    impl: table.TransformerImpl = "local" if run.style == "local" else "transformer_engine"
    export_megatron(origin, tmp_path / "out", layout=layout, impl=impl)
    files = sorted(path.relative_to(tmp_path / "source") for path in (tmp_path / "source").rglob("*.pt"))
    assert len(files) == run.tensor * run.pipeline
    for file in files:
        mine = torch.load(tmp_path / "out" / str(file).replace("0000500", "0000000"), weights_only=False)
        theirs = torch.load(tmp_path / "source" / file, weights_only=False)
        for key in (key for key in theirs if key.startswith("model")):
            wanted = {n: t for n, t in theirs[key].items() if t is not None}
            assert mine[key].keys() == wanted.keys()
            for name, tensor in wanted.items():
                found = mine[key][name]
                assert found.shape == tensor.shape, name
                real = (tensor != 7.0).all(dim=-1) if "word" in name or "output" in name else slice(None)
                assert torch.equal(found[real], tensor[real]), name
        ours, args = vars(mine["args"]), vars(theirs["args"])
        wrong = {k: (ours.get(k), v) for k, v in args.items() if ours.get(k) != v and k != "rotary_base"}
        assert wrong.keys() <= {"padded_vocab_size"}
    assert (tmp_path / "out" / "latest_checkpointed_iteration.txt").read_text() == "0"


def test_masters_and_moments_come_along(tmp_path: Path) -> None:
    run = Run(is_llama=True, groups=2, tensor=2, pipeline=2, virtual=2, is_tied=False, dtype=torch.bfloat16)
    run.make().save(tmp_path / "source", optimizer=True)
    origin = open_origin(tmp_path / "source", HINTS)
    assert origin.objects["optim"] == {"name": "adamw", "step": 500}
    weights = origin.weights("model")
    for moment, expected in (("exp_avg", lambda t: t * 2), ("exp_avg_sq", torch.abs)):
        for name, values in weights.items():
            found = origin.tensors[f"optim/{moment}/{name}"].whole()
            assert found.dtype == torch.float32
            assert torch.equal(found, expected(values.whole())), name
    step = tmp_path / "back"
    to_megads(tmp_path / "source", step, hints=HINTS)
    assert open_origin(step, Hints()).objects["optim"]["step"] == 500


def test_an_optimizer_of_another_order_is_refused(tmp_path: Path) -> None:
    run = Run(dtype=torch.bfloat16).make()
    run.save(tmp_path / "source", optimizer=True)
    file = next((tmp_path / "source").rglob("*.pt"))
    state = torch.load(file, weights_only=False)
    masters = state["optimizer"]["fp32_from_fp16_params"][1]
    masters[1], masters[2] = masters[2], masters[1]  # two norms of one layer: the same shapes
    torch.save(state, file)
    with pytest.raises(CheckpointError, match="does not round to it"):
        to_megads(tmp_path / "source", tmp_path / "back", hints=HINTS)
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("layout", [(1, 1, 1), (2, 1, 1), (1, 2, 2), (2, 4, 1)], ids=str)
@pytest.mark.parametrize("family", ["gpt", "llama"])
def test_every_layout_holds_the_same_model(
    family: str, layout: tuple[int, int, int], tmp_path: Path, hf_tokenizer: Path
) -> None:
    sample = Sample(family, layers=4, kv_heads=2 if family == "llama" else None)
    weights = save_step(tmp_path / "run", sample, hf_tokenizer)
    export_megatron(open_origin(tmp_path / "run", Hints()), tmp_path / "out", layout=MegatronLayout(*layout))
    again = open_origin(tmp_path / "out", HINTS)
    assert again.path.name == "iter_0000007"
    assert all(torch.equal(again.weights("model")[n].whole(), t) for n, t in weights.items())
    report = to_hf(tmp_path / "out", tmp_path / "hf") if layout == (1, 1, 1) else None
    assert report is None or report.num_tensors > len(weights) * (family == "llama")


def test_what_does_not_fit_is_told(tmp_path: Path, hf_tokenizer: Path) -> None:
    save_step(tmp_path / "run", Sample("llama", layers=3, kv_heads=2), hf_tokenizer)
    origin = open_origin(tmp_path / "run", Hints())
    with pytest.raises(LayoutError, match="dealt"):
        export_megatron(origin, tmp_path / "out", layout=MegatronLayout(pipeline=2))
    with pytest.raises(MegadsError, match=r"cut evenly|groups of queries"):
        export_megatron(origin, tmp_path / "out", layout=MegatronLayout(tensor=4))
    assert main([str(tmp_path / "run"), str(tmp_path / "out"), "--to", "megatron", "--expert", "2"]) == 2
    assert main([str(tmp_path / "run"), str(tmp_path / "out"), "--to", "hf", "--tensor", "2"]) == 2
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"args": {"num_experts": 8}}, "num_experts"),
        ({"args": {"swiglu": True}}, "swiglu"),
        ({"args": {"qk_layernorm": True}}, "qk_layernorm"),
        ({"args": {"num_layers": 5}}, r"missing: layers"),
        ({"args": {"num_layers": 3}}, r"unexpected: decoder"),
        ({"args": {"ffn_hidden_size": 80}}, "another shape"),
        ({"args": {"num_attention_heads": 0}}, r"model\.heads"),
        ({"checkpoint_version": 1.0}, "checkpoint_version"),
        ({"args": None}, r"model\."),
    ],
    ids=lambda value: str(value)[:40],
)
def test_another_model_is_refused(change: dict[str, object], told: str, tmp_path: Path) -> None:
    Run().make().save(tmp_path / "source")
    file = next((tmp_path / "source").rglob("*.pt"))
    state = torch.load(file, weights_only=False)
    args = change.pop("args", {})
    if isinstance(args, dict):
        vars(state["args"]).update(args)
    else:
        state["args"] = args
    torch.save(state | change, file)
    with pytest.raises(MegadsError, match=told):
        to_megads(tmp_path / "source", tmp_path / "back", hints=HINTS)
    assert not (tmp_path / "back").exists()


def test_ranks_that_disagree_or_lack_files_are_named(tmp_path: Path) -> None:
    Run(tensor=2, pipeline=2).make().save(tmp_path / "source")
    iteration = tmp_path / "source" / "iter_0000500"
    file = iteration / "mp_rank_01_001" / "model_optim_rng.pt"
    state = torch.load(file, weights_only=False)
    state["model"]["decoder.final_layernorm.bias"] += 1
    torch.save(state, file)
    with pytest.raises(
        CheckpointError, match=r"final_layernorm\.bias: tensor-parallel ranks have different copies"
    ):
        to_megads(tmp_path / "source", tmp_path / "back", hints=HINTS)
    file.unlink()
    with pytest.raises(CheckpointError, match="mp_rank_01_001"):
        open_origin(tmp_path / "source", HINTS)
    file.parent.rmdir()
    with pytest.raises(CheckpointError, match="3 of 2 pipeline x 2"):
        open_origin(tmp_path / "source", HINTS)
    (tmp_path / "source" / "latest_checkpointed_iteration.txt").write_text("../../etc")
    with pytest.raises(CheckpointError, match="names no directory beside it"):
        open_origin(tmp_path / "source", HINTS)


def test_a_wrong_table_is_refused(
    tmp_path: Path, hf_tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_step(tmp_path / "run", Sample("gpt"), hf_tokenizer)
    rows = {name: row for name, row in table._BY_NAME.items() if name != "layers.*.mlp.down.bias"}
    monkeypatch.setattr(table, "_BY_NAME", rows)
    origin = open_origin(tmp_path / "run", Hints())
    with pytest.raises(CheckpointError, match="leaves out"):
        export_megatron(origin, tmp_path / "out", layout=MegatronLayout())
    up = table.ROWS[-1]
    monkeypatch.setattr(table, "_BY_NAME", rows | {"layers.*.mlp.down.bias": replace(up, engine="elsewhere")})
    with pytest.raises(CheckpointError):
        export_megatron(origin, tmp_path / "out", layout=MegatronLayout())
    assert not (tmp_path / "out").exists()


def test_the_report_holds_every_hash(tmp_path: Path) -> None:
    from blake3 import blake3

    Run().make().save(tmp_path / "source")
    to_megads(tmp_path / "source", tmp_path / "back", hints=HINTS)
    report = json.loads((tmp_path / "back" / "conversion.json").read_text())
    assert (report["format"], report["from"]["format"], report["to"]) == (
        "megads-conversion",
        "megatron",
        "megads",
    )
    weights = open_origin(tmp_path / "back", Hints()).tensors
    assert report["tensors"].keys() == weights.keys()
    for name, values in weights.items():
        data = values.whole().contiguous().view(torch.uint8).numpy().tobytes()
        assert report["tensors"][name]["blake3"] == blake3(data).hexdigest()
