"""The parameter table of every config as a text that is reviewed: a new name, shape, cut or initialisation shows.

`UPDATE_GOLDEN=1` writes the files anew. They are made on torch's meta device, so no size is too large.
"""

from __future__ import annotations

import math
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megads.config.load import load
from megads.model.catalog import describe
from megads.model.decoder import make_blocks
from megads.parallel.layout import Layout
from megads.parallel.mesh import build_mesh
from megads.parallel.parameter import Scope, ShardedParameter, describe_table, parameter_table

ROOT = Path(__file__).parents[2]
TABLES = Path(__file__).parent / "params"
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
VOCAB = 4096  # ids of the quickstart's tokenizer, for configs that take the tokenizer's size

# What the makers of the models, or Hugging Face's weights, say.
KNOWN = {
    "gpt2-124m": 124_439_808,
    "llama-8b": 8_030_261_248,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "qwen3-8b": 8_190_735_360,
    "qwen3-30b-a3b": 30_532_122_624,
    "mixtral-8x7b": 46_702_792_704,
    "deepseek-v2-lite": 15_706_484_224,
}


def parameters_of(config: Path) -> tuple[ShardedParameter, ...]:
    loaded = load(config)
    spec = describe(loaded.model, vocab=VOCAB, sequence_length=loaded.data.sequence_length)
    mesh = replace(build_mesh(Layout(), 0), device=torch.device("meta"))
    blocks = make_blocks(Scope(mesh, torch.float32, 0), spec, stages={0: range(spec.num_blocks)})
    return parameter_table(blocks.values())


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_the_table_is_the_reviewed_one(config: Path) -> None:
    golden = TABLES / f"{config.stem}.txt"
    table = describe_table(parameters_of(config))
    if os.environ.get("UPDATE_GOLDEN") == "1":
        golden.write_text(table, encoding="utf-8")
    assert golden.exists(), f"UPDATE_GOLDEN=1 writes {golden.name}; review it"
    assert table == golden.read_text(encoding="utf-8")


def test_no_table_is_left_of_a_config_that_is_gone() -> None:
    assert {path.stem for path in TABLES.glob("*.txt")} == {path.stem for path in CONFIGS}


@pytest.mark.parametrize(("name", "expected"), KNOWN.items())
def test_models_have_the_size_that_is_known_of_them(name: str, expected: int) -> None:
    parameters = parameters_of(ROOT / "configs" / f"{name}.yaml")
    assert sum(math.prod(parameter.spec.shape) for parameter in parameters) == expected


def test_deepseek_v3_has_the_size_that_its_weights_have() -> None:
    """671.026 B, and 11.6 B more in the layer of multi-token prediction, whose embedding and head are the trunk's."""
    sizes = {
        p.logical_name: math.prod(p.spec.shape) for p in parameters_of(ROOT / "configs" / "deepseek-v3.yaml")
    }
    ahead = sum(size for name, size in sizes.items() if name.startswith("layers.61."))
    assert (sum(sizes.values()) - ahead) / 1e9 == pytest.approx(671.026, abs=5e-4)
    assert ahead / 1e9 == pytest.approx(11.61, abs=5e-3)
