"""docs/add_a_family.md: the family on that page, taken from it and added, computes what transformers computes."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch

from megads.assemble.compare import declared, reference_outputs
from megads.checkpoint import hf
from megads.checkpoint.hf_names import match
from megads.config.model import ModelConfig
from megads.model.catalog import FAMILIES, complete, describe
from megads.model.family import ModelFamily

pytest.importorskip("transformers")
PAGE = Path(__file__).parents[2] / "docs" / "add_a_family.md"
MOST_LINES = 130


@pytest.fixture
def family(tmp_path: Path) -> ModelFamily:
    (source,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert source.count("\n") <= MOST_LINES
    file = tmp_path / "starcoder2.py"
    file.write_text(source)
    spec = importlib.util.spec_from_file_location("starcoder2", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = module.STARCODER2
    assert isinstance(found, ModelFamily)
    return found


def test_the_family_on_the_page_is_that_of_transformers(family: ModelFamily, tmp_path: Path) -> None:
    import transformers

    torch.manual_seed(0)
    config = transformers.Starcoder2Config(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    model = transformers.Starcoder2ForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "source")
    tree = json.loads((tmp_path / "source" / "config.json").read_text())

    families = {**FAMILIES, "starcoder2": family}
    section = ModelConfig(family="starcoder2", **family.hugging_face.from_config(tree))  # type: ignore[arg-type]
    spec = describe(section, vocab=1, sequence_length=1, families=families)
    weights = hf.Weights(tmp_path / "source")
    parameters = declared(spec)
    entries = match(family.hugging_face.rows, parameters)
    hf.check_names(entries, weights)
    values = {name: torch.zeros(declaration.shape) for name, declaration in parameters.items()}
    for entry in entries:
        values[entry.name][entry.box.slices] = entry.from_foreign(weights.tensor(entry.foreign))
    tokens = torch.randint(61, (2, 20))
    ours = reference_outputs(spec, tokens, read=values.__getitem__, dtype=torch.float32).logits
    theirs = hf.transformers_outputs(tmp_path / "source", tokens, dtype=torch.float32).logits
    assert float(theirs.abs().max()) > 0.5
    assert float((ours - theirs).abs().max()) < 1e-5 * max(1.0, float(theirs.abs().max()))

    whole = complete(section, vocab=1, sequence_length=1, families=families)
    again = ModelConfig(
        family="starcoder2",  # type: ignore[arg-type]
        **family.hugging_face.from_config(family.hugging_face.to_config(whole)),
    )
    assert complete(again, vocab=1, sequence_length=1, families=families) == whole
