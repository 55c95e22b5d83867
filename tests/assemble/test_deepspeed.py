"""What DeepSpeed's own engine wrote comes in with its moments; DeepSpeed reads the universal ones that go out."""

from __future__ import annotations

import importlib.util
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megads.assemble.convert import main, open_origin
from megads.assemble.export_deepspeed import export_deepspeed
from megads.assemble.import_hf import joined, named_entries
from megads.assemble.origin import Hints, Origin
from megads.checkpoint.foreign import Values
from megads.errors import CheckpointError
from megads.model.catalog import HUGGING_FACE
from tests.assemble import deepspeed_run
from tests.assemble.models import Sample, save_step, to_hf, to_megads

pytestmark = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("deepspeed", "transformers", "safetensors")),
    reason="deepspeed or transformers is not installed",
)


def free_port() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


def trained(directory: Path, kind: str, stage: int, world: int) -> Path:
    port = free_port()
    arguments = [str(directory), kind, str(stage)]
    deepspeed_run.run(*(["train", *arguments, str(rank), str(world), port] for rank in range(world)))
    return directory


def logical(origin: Origin, truth: dict[str, dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """DeepSpeed's own values under logical names."""
    from megads.assemble.compare import declared

    family = HUGGING_FACE[origin.config.model.family]
    found = {}
    for kind, named in truth.items():
        entries = named_entries(
            family, declared(origin.spec), present=named, is_tied=origin.spec.tied
        ).entries
        parts = {n: Values(tuple(t.shape), t.dtype, lambda box, t=t: t[box.slices]) for n, t in named.items()}
        for name, values in joined(entries, parts, dtype=torch.float32).items():
            found[f"{kind}/{name}"] = values.whole()
    return found


CASES = [
    pytest.param(("gpt", 1, 2), marks=pytest.mark.slow),
    ("llama", 2, 2),
    pytest.param(("llama", 3, 2), marks=pytest.mark.slow),
    pytest.param(("gpt-bf16", 1, 1), marks=pytest.mark.slow),
]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}-zero{case[1]}-x{case[2]}")
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, int]:
    kind, stage, world = request.param
    return trained(tmp_path_factory.mktemp("ds"), kind, stage, world), kind, stage


def test_weights_and_moments_are_those_of_the_engine(source: tuple[Path, str, int], tmp_path: Path) -> None:
    directory, _, stage = source
    hints = Hints(config=directory / "config.json")
    report = to_megads(directory / "ds", tmp_path / "back", hints=hints)
    origin = open_origin(tmp_path / "back", Hints())
    expected = logical(origin, torch.load(directory / "truth.pt", weights_only=True))
    assert origin.tensors.keys() == expected.keys()
    assert all(torch.equal(origin.tensors[name].whole(), t) for name, t in expected.items())
    assert all(values.dtype == torch.float32 for values in origin.tensors.values())
    assert origin.objects["optim"] == {"name": "adamw", "step": deepspeed_run.STEPS}
    assert report.num_tensors == len(expected)
    if stage == 3:
        assert to_hf(tmp_path / "back", tmp_path / "hf").comparison is not None  # and so transformers agrees


def test_deepspeed_reads_what_is_written(source: tuple[Path, str, int], tmp_path: Path) -> None:
    directory, kind, stage = source
    if stage == 1:
        pytest.skip("DeepSpeed's getters see no moments of bf16 before a step; fp32 is as stage 2")
    origin = open_origin(directory / "ds", Hints(config=directory / "config.json"))
    export_deepspeed(origin, tmp_path / "out")
    deepspeed_run.run(
        ["load", str(tmp_path / "out"), kind, str(stage), str(tmp_path / "found.pt"), free_port()]
    )
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    truth = torch.load(directory / "truth.pt", weights_only=True)
    assert found["steps"] == {deepspeed_run.STEPS}
    for name in truth:
        for parameter, values in truth[name].items():
            assert torch.equal(found["truth"][name][parameter], values), (name, parameter)


def test_its_own_universal_checkpoint_comes_in(source: tuple[Path, str, int], tmp_path: Path) -> None:
    directory, _, _ = source
    tool = (
        "import sys; from deepspeed.checkpoint.ds_to_universal import main; import argparse;"
        "main(argparse.Namespace(input_folder=sys.argv[1], output_folder=sys.argv[2], num_extract_workers=1,"
        "num_merge_workers=1, keep_temp_folder=False, strict=True, inject_missing_state=True))"
    )
    tag = (directory / "ds" / "latest").read_text()
    command = [sys.executable, "-c", tool, str(directory / "ds" / tag), str(tmp_path / "uni" / "step")]
    done = subprocess.run(command, capture_output=True, timeout=240)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    origin = open_origin(tmp_path / "uni", Hints(config=directory / "config.json"))
    assert origin.format == "universal"
    expected = logical(origin, torch.load(directory / "truth.pt", weights_only=True))
    assert origin.tensors.keys() == expected.keys()
    assert all(torch.equal(origin.tensors[name].whole(), t) for name, t in expected.items())
    assert origin.objects["optim"]["step"] == deepspeed_run.STEPS


@pytest.mark.parametrize("names", ["hf", "megads"])
def test_there_and_back_is_the_same_bits(names: Any, tmp_path: Path, hf_tokenizer: Path) -> None:
    sample = Sample("gpt")
    weights = save_step(tmp_path / "run", sample, hf_tokenizer, has_moments=True)
    origin = open_origin(tmp_path / "run", Hints())
    export_deepspeed(origin, tmp_path / "out", names=names)
    again = open_origin(tmp_path / "out", Hints())
    assert again.tensors.keys() == origin.tensors.keys()
    assert all(torch.equal(v.whole(), origin.tensors[n].whole()) for n, v in again.tensors.items())
    assert again.objects["optim"]["step"] == 7
    assert len(weights) * 3 == len(again.tensors)


def test_weights_alone_without_moments(tmp_path: Path, hf_tokenizer: Path) -> None:
    save_step(tmp_path / "run", Sample("gpt", layers=1), hf_tokenizer)
    report = export_deepspeed(open_origin(tmp_path / "run", Hints()), tmp_path / "out")
    assert any("load_optimizer_states=False" in note for note in report.notes)
    assert "optim" not in open_origin(tmp_path / "out", Hints()).objects


def pipeline_files(directory: Path, *, wrong: str = "") -> None:
    """Layer files of Megatron-DeepSpeed, two tensor-parallel ranks, from a run of Megatron before core."""
    import argparse

    from tests.assemble.megatron_run import Run

    run = Run(tensor=2, style="older").make()
    directory.mkdir()
    for rank in range(2):
        tree = run.chunk(rank, 0)["language_model"]
        word = tree["embedding"]["word_embeddings"]["weight"]
        layers: dict[int, dict[str, torch.Tensor]] = {
            1: {
                "word_embeddings.weight": word,
                "position_embeddings.weight": tree["embedding"]["position_embeddings"]["weight"],
            }
        }
        for name, tensor in tree["encoder"].items():
            words = name.split(".")
            if words[0] == "layers":
                layers.setdefault(3 + int(words[1]), {})[".".join(words[2:])] = tensor
            else:
                layers.setdefault(8, {})[words[-1]] = tensor
        layers[9] = {"word_embeddings.weight": word}
        for index, tensors in layers.items():
            torch.save(tensors, directory / f"layer_{index:02d}-model_{rank:02d}-model_states.pt")
        state = {"args": argparse.Namespace(**vars(run.args)), "global_steps": 9, "dp_world_size": 1}
        torch.save(state, directory / f"mp_rank_{rank:02d}_model_states.pt")
    if wrong:
        (directory / wrong).unlink()


def test_layer_files_are_the_model_they_are_of(tmp_path: Path) -> None:
    from megads.assemble.compare import reference_outputs
    from tests.assemble.megatron_run import VOCAB, Run

    pipeline_files(tmp_path / "global_step9")
    report = to_megads(tmp_path / "global_step9", tmp_path / "back", hints=Hints(vocab=VOCAB))
    assert report.origin.format == "layers"
    origin = open_origin(tmp_path / "back", Hints())
    weights = {n: v.whole().double() for n, v in origin.weights("model").items()}
    tokens = torch.tensor([[1, 2, 410, 7]])
    found = reference_outputs(origin.spec, tokens, read=weights.__getitem__, dtype=torch.float64).logits
    expected = Run(tensor=2, style="older").make().logits(tokens)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-5)


def test_missing_files_and_names_are_told(tmp_path: Path) -> None:
    pipeline_files(tmp_path / "a", wrong="layer_04-model_00-model_states.pt")
    with pytest.raises(CheckpointError, match="layer 4 are missing"):
        open_origin(tmp_path / "a", Hints(vocab=411))
    pipeline_files(tmp_path / "b")
    for file in (tmp_path / "b").glob("mp_rank_*"):
        file.unlink()
    with pytest.raises(CheckpointError, match=r"--config FILE"):
        open_origin(tmp_path / "b", Hints(vocab=411))
    assert main([str(tmp_path / "nothing"), str(tmp_path / "out"), "--to", "megads"]) == 2
    random = tmp_path / "random"
    random.mkdir()
    torch.save({"module": {"x.weight": torch.zeros(3)}}, random / "mp_rank_00_model_states.pt")
    config = tmp_path / "config.json"
    deepspeed_run.make_model("gpt").config.to_json_file(config)
    with pytest.raises(CheckpointError, match=r"unexpected: x\.weight"):
        open_origin(random, Hints(config=config))
