"""A stage's backward, whole or split: the same bits, and no product of the forward runs twice."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megads.assemble.wiring import Model as Built
from megads.assemble.wiring import build_model
from megads.parallel.layout import Layout
from megads.parallel.mesh import build_mesh
from megads.pipeline.stage import Stage
from megads.verify.batch import synthetic_batch
from tests.parity.harness import VOCAB, Case, Model, make_batch, make_config

LAYERS = 3
LINEARS = 4 * LAYERS + 1  # qkv, out, up, down; and the head


class Products(TorchDispatchMode):
    """Counts the matrix products that are really computed."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket.__name__ in ("mm", "addmm", "addmm_", "bmm", "baddbmm")
        return func(*args, **(kwargs or {}))


def products(work: Callable[[], object]) -> int:
    with Products() as mode:
        work()
    return mode.count


def build(family: str, case: Case, *, dropout: float = 0.1) -> Built:
    config = make_config(Model(family, dropout=dropout), case, precision="fp64")
    return build_model(config, build_mesh(Layout(), 0), vocab=VOCAB)


def seeds() -> dict[str, torch.Tensor]:
    return {"loss": torch.tensor(0.01, dtype=torch.float64)}


def gradients(model: Built) -> dict[str, torch.Tensor]:
    return {p.logical_name: p.grad.clone() for p in model.parameters if p.grad is not None}


def whole(case: Case, family: str) -> dict[str, torch.Tensor]:
    model = build(family, case)
    stage = Stage(0, list(model.stages[0]), queue=model.queue)
    for number in range(3):
        stage.forward((), make_batch(1).rows(4 * number, 4 * number + 4), micro_batch=number)
        stage.backward((), seeds(), micro_batch=number)
    return gradients(model)


@pytest.mark.parametrize("recompute", ["none", "full", ("norm", "activation"), ("attention", "mlp")], ids=str)
@pytest.mark.parametrize("family", ["gpt", "llama"])
def test_a_split_backward_has_the_same_bits(family: str, recompute: Any) -> None:
    model = build(family, Case(micro=4, recompute=recompute))
    stage = Stage(0, list(model.stages[0]), queue=model.queue)
    live = []
    for number in range(3):
        stage.forward((), make_batch(1).rows(4 * number, 4 * number + 4), micro_batch=number)
    for number in range(3):
        stage.backward_input((), seeds(), micro_batch=number)
        live.append(stage.num_live)
    for number in range(3):
        stage.backward_weight(micro_batch=number)
        live.append(stage.num_live)
    assert live == [3, 3, 3, 2, 1, 0]
    assert model.queue.num_kept == 0
    expected = whole(Case(micro=4), family)
    found = gradients(model)
    assert expected.keys() == found.keys()
    different = [name for name in expected if not torch.equal(expected[name], found[name])]
    assert not different


def test_steps_have_the_same_bits() -> None:
    model = build("llama", Case(micro=4))
    stage = Stage(0, list(model.stages[0]), queue=model.queue, in_steps=True)
    num_steps = []
    for number in range(3):
        batch = make_batch(1).rows(4 * number, 4 * number + 4)
        num_steps.append(len(list(stage.forward_steps((), batch, micro_batch=number))))
        num_steps.append(len(list(stage.backward_steps((), seeds(), micro_batch=number))))
    assert num_steps == [LAYERS + 2] * 6
    expected = whole(Case(micro=4), "llama")
    assert all(torch.equal(expected[name], value) for name, value in gradients(model).items())


@pytest.mark.parametrize(
    ("recompute", "again"),
    [("none", 0), ("full", 4 * LAYERS), (("norm", "activation"), 0), (("mlp",), 2 * LAYERS)],
)
@pytest.mark.parametrize("loss_chunk", [None, 40])
def test_products_of_the_forward_are_not_computed_again(
    recompute: Any, again: int, loss_chunk: int | None
) -> None:
    """F, I and W have one product a linear layer each, B two; what is recomputed comes on top, once, in I."""
    case = Case(micro=4, recompute=recompute, loss_chunk=loss_chunk)
    model = build("llama", case, dropout=0.0)  # so that attention is one fused call
    stage = Stage(0, list(model.stages[0]), queue=model.queue)
    batch = make_batch(1).rows(0, 4)  # 40 tokens: one chunk
    counts = [
        products(lambda: stage.forward((), batch, micro_batch=0)),
        products(lambda: stage.backward_input((), seeds(), micro_batch=0)),
        products(lambda: stage.backward_weight(micro_batch=0)),
        products(lambda: stage.forward((), batch, micro_batch=0)),
        products(lambda: stage.backward((), seeds(), micro_batch=0)),
    ]
    early = 0 if loss_chunk is None else 1  # the head's two products run in the forward
    forward, inputs, weights = LINEARS + 2 * early, LINEARS - early + again, LINEARS - early
    assert counts == [forward, inputs, weights, forward, inputs + weights]


def test_a_weight_of_two_blocks_is_complete_once() -> None:
    """Head and multi-token prediction add to the same weight: reduced after one part, the other is missed."""
    config = make_config(Model("llama", overrides={"mtp_layers": 2}), Case(micro=4), precision="fp64")
    model = build_model(config, build_mesh(Layout(), 0), vocab=VOCAB)
    stage = Stage(0, list(model.stages[0]), queue=model.queue, in_steps=True)
    calls: dict[str, int] = {}
    for parameter in model.parameters:
        name = parameter.logical_name
        calls[name] = 0
        parameter.register_post_accumulate_grad_hook(
            lambda _, name=name: calls.update({name: calls[name] + 1})
        )
    stage.forward((), synthetic_batch(config, 1).rows(0, 4), micro_batch=0)
    weights = {"mtp_loss": torch.tensor(0.003, dtype=torch.float64), **seeds()}
    num_steps = 0
    steps = stage.backward_steps((), weights, micro_batch=0)
    with contextlib.suppress(StopIteration):
        while True:
            next(steps)
            num_steps += 1
    assert num_steps == 1 + config.model.layers + 1  # embedding, layers, head with what follows
    repeated = {name for name, count in calls.items() if count != 1}
    assert repeated == {"embedding.word.weight"}, (
        "a tied weight waits for the end of the step, any other does not"
    )
