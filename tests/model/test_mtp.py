"""Multi-token prediction against transformers' `MtpLayer`: loss, and the gradient of every weight, its own and shared.

A tiny Llama with two depths in float64, and a DeepSeek-V3 that is imported as its checkpoints are published: layers of
prediction numbered after the others, with copies of embedding and head.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megads.assemble.compare import declared
from megads.assemble.import_hf import open_hf
from megads.assemble.origin import Hints
from megads.checkpoint.hf_names import match
from megads.config.model import ModelConfig, WeightConfig
from megads.data.sequence import Batch
from megads.errors import CheckpointError
from megads.model.catalog import HUGGING_FACE, describe
from megads.model.decoder import make_blocks
from megads.model.mtp import MTPBlock
from megads.model.spec import DecoderSpec
from megads.parallel.layout import Layout
from megads.parallel.mesh import build_mesh
from megads.parallel.parameter import Scope, parameter_table, stored_name
from megads.parallel.tally import tallied_in
from tests.model.families import VOCAB, FamilyCase

pytest.importorskip("transformers")
SEQ, ROWS, WEIGHT = 11, 3, 0.7
PARTS = {
    "post_norm": "shared_head.norm"
}  # transformers -> published names; what is in `mtp_block` stands beside them
DENSE = FamilyCase("llama", "LlamaConfig", {"num_mtp_layers": 2, "num_hidden_layers": 2})
DEEPSEEK = FamilyCase(
    "deepseek",
    "DeepseekV3Config",
    {
        "num_mtp_layers": 1,
        "num_hidden_layers": 2,
        "num_key_value_heads": 4,
        "first_k_dense_replace": 1,
        "q_lora_rank": 12,
        "kv_lora_rank": 10,
        "qk_nope_head_dim": 6,
        "qk_rope_head_dim": 4,
        "v_head_dim": 6,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "n_group": 2,
        "topk_group": 1,
        "moe_intermediate_size": 24,
    },
)


@dataclass(frozen=True)
class Judged:
    """A model in transformers: weights and gradients by published names, and its loss."""

    weights: dict[str, Tensor]
    gradients: dict[str, Tensor]
    loss: float


def make(case: FamilyCase) -> tuple[Any, Any]:
    """The model and its layers of prediction, in transformers."""
    from transformers.modeling_layers import MtpModel

    model = case.make().double()
    model.config.dtype = torch.float64
    layers = MtpModel(model, case.changes["num_mtp_layers"]).double()
    layers.config._attn_implementation = layers.config._experts_implementation = "eager"
    with torch.no_grad():
        for name, parameter in layers.layers.named_parameters():
            is_norm = parameter.dim() == 1
            parameter.copy_(0.2 * torch.randn_like(parameter) + (1.0 if is_norm and "norm" in name else 0.0))
    return model, layers


def batch() -> Batch:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(VOCAB, (ROWS, SEQ + 1), generator=generator)
    mask = torch.rand(ROWS, SEQ, generator=generator) < torch.tensor([[0.3], [0.6], [1.0]])
    made = Batch(
        ids[:, :-1], ids[:, 1:], mask, torch.arange(SEQ).expand(ROWS, SEQ), None, torch.arange(ROWS), 1
    )
    return made.look_ahead(torch.zeros_like(ids[:, 1:]), depth=2)


def published(name: str, *, num_layers: int) -> str:
    """layers.0.mtp_block.mlp.gate.weight -> model.layers.N.mlp.gate.weight"""
    _, number, part, *rest = name.split(".")
    inside = rest if part == "mtp_block" else [PARTS.get(part, part), *rest]
    return ".".join(["model.layers", str(num_layers + int(number)), *inside])


def judge(case: FamilyCase) -> tuple[Any, Judged]:
    """transformers' loss: the main one, and the weighted mean of the depths', each divided by the main one's count."""
    model, ahead = make(case)
    data, depth = batch(), case.changes["num_mtp_layers"]
    count = data.mask.sum()

    def ce(logits: Tensor, places: int) -> Tensor:
        labels, mask = data.labels[:, places:], data.mask[:, places:]
        return F.cross_entropy(logits[mask], labels[mask], reduction="sum") / count

    hidden = model.model(input_ids=data.tokens, use_cache=False).last_hidden_state
    loss = ce(model.lm_head(hidden), 0)
    for places in range(1, depth + 1):
        positions = torch.arange(SEQ - places)[None]
        hidden = ahead.forward_layer(
            places - 1, hidden[:, : SEQ - places], positions, None, input_ids=data.tokens[:, places:]
        )
        loss = loss + WEIGHT / depth * ce(model.lm_head(hidden), places)
    loss.backward()
    weights = dict(model.named_parameters()) | dict(model.named_buffers())
    num_layers = case.changes["num_hidden_layers"]
    for name, tensor in (
        *ahead.layers.named_parameters(prefix="layers"),
        *ahead.layers.named_buffers("layers"),
    ):
        weights[published(name, num_layers=num_layers)] = tensor
    gradients = {n: w.grad for n, w in weights.items() if w.grad is not None}
    return model, Judged({n: w.detach() for n, w in weights.items()}, gradients, loss.item())


def gradients_of(spec: DecoderSpec, weights: dict[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
    """megads' loss and gradients, by logical name."""
    scope = Scope(build_mesh(Layout(), 0), torch.float64, 0)
    blocks = make_blocks(scope, spec, stages={0: range(spec.num_blocks)})[0]
    parameters = parameter_table([blocks])
    for parameter in parameters:
        parameter.data.copy_(weights[stored_name(parameter)])
    for piece in (piece for module in tallied_in([blocks]) for piece in module.kept()):
        piece.tensor.copy_(weights[piece.name.removeprefix("model/")])  # biases of routers
    data, payload = batch(), ()
    loss = torch.zeros((), dtype=torch.float64)
    terms = {term.name: term.weight for term in spec.terms}
    for block in blocks:
        output = block(payload, data)
        payload = output.payload
        for extra in output.extras:
            loss = loss + terms[extra.name] * extra.sum / data.mask.sum()
    assert payload == ()
    loss.backward()
    return loss.item(), {stored_name(p): p.grad for p in parameters}


def assert_equal(spec: DecoderSpec, weights: dict[str, Tensor], judged: Judged, *, bound: float) -> None:
    loss, gradients = gradients_of(spec, weights)
    assert loss == pytest.approx(judged.loss, rel=bound)
    seen = set()
    total = float(torch.stack([g.square().sum() for g in judged.gradients.values()]).sum().sqrt())
    for entry in match(
        HUGGING_FACE["deepseek_v3" if spec.moe else "llama"].rows + ROWS_AHEAD,
        declared(spec),
        present=judged.weights,
    ):
        if entry.name.endswith("router.bias"):
            continue
        expected = entry.from_foreign(judged.gradients[entry.foreign])
        found = gradients[entry.name][entry.box.slices]
        error = float((found - expected).norm()) / max(float(expected.norm()), 1e-4 * total)
        assert error < bound, f"{entry.foreign}: {error:.1e}"
        seen.add(entry.foreign)
    assert seen == judged.gradients.keys()


ROWS_AHEAD = tuple(
    row
    for row in HUGGING_FACE["deepseek_v3"].rows
    if row.name in {f"layers.*.{part}.weight" for part in ("enorm", "hnorm", "eh_proj", "norm")}
)


def test_two_depths_are_transformers_layers() -> None:
    _, judged = judge(DENSE)
    config = ModelConfig(
        family="llama", layers=2, hidden=32, heads=4, kv_heads=2, ffn=40, vocab=VOCAB, norm_eps=1e-6,
        mtp_layers=2, mtp_weight=WEIGHT,
    )  # fmt: skip
    spec = describe(config, vocab=VOCAB, sequence_length=SEQ)
    names = match(HUGGING_FACE["llama"].rows + ROWS_AHEAD, declared(spec), present=judged.weights)
    weights = {name: torch.zeros(entry.shape, dtype=torch.float64) for name, entry in declared(spec).items()}
    for entry in names:
        weights[entry.name][entry.box.slices] = entry.from_foreign(judged.weights[entry.foreign])
    assert_equal(spec, weights, judged, bound=1e-6)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Judged]:
    """A published DeepSeek-V3: what transformers saves, and the layer of prediction with its copies."""
    import safetensors.torch

    folder = tmp_path_factory.mktemp("deepseek")
    model, judged = judge(DEEPSEEK)
    model.save_pretrained(folder)
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    tensors |= {n: w.contiguous() for n, w in judged.weights.items() if n.startswith("model.layers.2.")}
    tensors["model.layers.2.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.2.shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["num_nextn_predict_layers"] = 1
    (folder / "config.json").write_text(json.dumps(config))
    return folder, judged


def test_an_imported_deepseek_predicts_as_transformers_does(checkpoint: tuple[Path, Judged]) -> None:
    folder, judged = checkpoint
    origin = open_hf(folder, Hints())
    assert origin.config.model.mtp_layers == 1
    assert origin.config.model.expert_layers == (1, 2)
    spec = describe(replace(origin.config.model, mtp_weight=WEIGHT), vocab=VOCAB, sequence_length=SEQ)
    weights = {name: values.whole() for name, values in origin.weights("model").items()}
    assert_equal(spec, weights, judged, bound=1e-5)


def test_a_copy_that_is_none_is_refused(checkpoint: tuple[Path, Judged], tmp_path: Path) -> None:
    import safetensors.torch

    folder, _ = checkpoint
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    tensors["model.layers.2.embed_tokens.weight"][5, 3] += 1e-3
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(
        CheckpointError, match=r"layers\.2\.embed_tokens\.weight: not what model\.embed_tokens"
    ):
        open_hf(tmp_path, Hints())


def test_embedding_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Silent bug T4: the paper's order of the two halves trains as well, and cannot read the published weights."""

    def hidden_first(block: MTPBlock, hidden: Tensor, later: Batch) -> Tensor:
        halves = (block.hnorm(hidden), block.enorm(block.word(later.tokens)))
        return block.eh_proj(torch.cat(halves, dim=-1))

    monkeypatch.setattr(MTPBlock, "_enter", hidden_first)
    with pytest.raises(AssertionError):
        test_two_depths_are_transformers_layers()


def test_weight_follows_the_tokens() -> None:
    points = (WeightConfig(tokens=0, weight=0.3), WeightConfig(tokens=100, weight=0.1))
    config = ModelConfig(family="llama", layers=2, hidden=32, heads=4, mtp_layers=2, mtp_weight=points)
    spec = describe(config, vocab=VOCAB, sequence_length=SEQ)
    assert [spec.weights_at(tokens)["mtp_loss"] for tokens in (0, 99, 100, 10**13)] == [
        0.15,
        0.15,
        0.05,
        0.05,
    ]
    assert {term.name: term.weight for term in spec.terms} == {"loss": 1.0, "mtp_loss": 0.15}
    assert (
        describe(replace(config, mtp_layers=0, mtp_weight=0.3), vocab=VOCAB, sequence_length=SEQ).weights_at(
            5
        )
        == {}
    )


def test_what_it_costs_is_counted() -> None:
    """Each depth: a projection of two hidden states, a layer, and the output head once more."""
    config = ModelConfig(family="llama", layers=2, hidden=32, heads=4, ffn=40)
    without, with_two = (
        describe(replace(config, mtp_layers=depth), vocab=VOCAB, sequence_length=SEQ) for depth in (0, 2)
    )
    assert with_two.block_costs[:-1] == without.block_costs[:-1]
    more = with_two.block_costs[-1] - without.block_costs[-1]
    assert more == 2 * (2 * 32 * 32 + without.block_costs[1] + VOCAB * 32)
    assert with_two.num_blocks == without.num_blocks
