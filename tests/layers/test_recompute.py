"""What each kind of recompute keeps of a forward: counted, in the order that the docstring promises."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

from megads.assemble.wiring import build_model
from megads.layers.recompute import Memory
from megads.ops.activation import swiglu
from megads.parallel.layout import Layout
from megads.parallel.mesh import build_mesh
from tests.parity.harness import VOCAB, Case, Model, make_batch, make_config

LAYERS = 4
HIDDEN, FFN = 64, 48
TOKENS = 40


def kept_bytes(family: str, **keys: Any) -> int:
    """Bytes that autograd keeps of one forward of the layers, weights and embedding aside."""
    config = make_config(Model(family, layers=LAYERS), Case(micro=4, **keys), precision="fp64")
    model = build_model(config, build_mesh(Layout(), 0), vocab=VOCAB)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights and x.is_floating_point():
            kept[storage.data_ptr()] = storage  # held, so that its address is nobody else's
        return x

    batch = make_batch(1).rows(0, 4)
    payload = model.stages[0][0]((), batch).payload
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        for block in model.stages[0][1:-1]:
            payload = block(payload, batch).payload
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("family", ["gpt", "llama"])
def test_cheap_parts_save_what_they_say(family: str) -> None:
    unit = 8 * TOKENS * LAYERS
    nothing, norm = kept_bytes(family), kept_bytes(family, recompute=("norm",))
    assert nothing - norm == 2 * HIDDEN * unit  # the outputs of both norms
    assert norm - kept_bytes(family, recompute=("norm", "activation")) == FFN * unit


@pytest.mark.parametrize("family", ["gpt", "llama"])
def test_more_recompute_keeps_less(family: str) -> None:
    branches = [kept_bytes(family, recompute=r) for r in ("none", ("mlp",), ("attention", "mlp"), "full")]
    assert branches == sorted(branches, reverse=True)
    assert len(set(branches)) == 4
    assert branches[-1] == 8 * TOKENS * HIDDEN * LAYERS  # each layer's input alone


def test_layers_are_counted_from_the_first() -> None:
    found = [kept_bytes("llama", recompute="full", recompute_layers=n) for n in range(1, LAYERS + 1)]
    steps = {a - b for a, b in pairwise(found)}
    assert len(steps) == 1  # every further layer saves the same
    assert found[-1] == kept_bytes("llama", recompute="full")
    assert kept_bytes("llama") - found[0] == steps.pop()


def test_memory_of_layers() -> None:
    memory = Memory("full", num_layers=2)
    assert [memory.of_layer(n).recomputes_all for n in range(4)] == [True, True, False, False]
    assert Memory(("norm",)).of_layer(9).recomputes("norm")
    assert not Memory("full").recomputes("norm")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_swiglu_has_the_bits_of_autograd(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    x = torch.randn(7, 5, 24, dtype=torch.float64).to(dtype).requires_grad_()
    dy = torch.randn(7, 5, 12, dtype=torch.float64).to(dtype)
    gate, up = x.chunk(2, dim=-1)
    expected = torch.nn.functional.silu(gate) * up
    (wanted,) = torch.autograd.grad(expected, x, dy)
    found = swiglu(x)
    (gradient,) = torch.autograd.grad(found, x, dy)
    assert torch.equal(found, expected)
    assert torch.equal(gradient, wanted)
