"""Offload on a CPU, where host and device are one memory: the same bits, the right tensors, two layers at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megads.assemble.wiring import Model as Built
from megads.assemble.wiring import build_model
from megads.layers import offload
from megads.parallel.layout import Layout
from megads.parallel.mesh import build_mesh
from megads.pipeline.stage import Stage
from tests.parity.harness import VOCAB, Case, Model, make_batch, make_config

LAYERS = 4
SEEDS = {"loss": torch.tensor(0.01, dtype=torch.float64)}


@pytest.fixture(autouse=True)
def small_tensors_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "MIN_BYTES", 0)


def build(family: str, case: Case) -> Built:
    config = make_config(Model(family, dropout=0.1, layers=LAYERS), case, precision="fp64")
    return build_model(config, build_mesh(Layout(), 0), vocab=VOCAB)


def run(model: Built) -> dict[str, torch.Tensor]:
    """Two micro-batches, both alive before their backwards, in the order that is no stack."""
    stage = Stage(0, list(model.stages[0]), queue=model.queue)
    for number in range(2):
        stage.forward((), make_batch(1).rows(4 * number, 4 * number + 4), micro_batch=number)
    for number in range(2):
        stage.backward_input((), SEEDS, micro_batch=number)
    for number in range(2):
        stage.backward_weight(micro_batch=number)
    return {p.logical_name: p.grad for p in model.parameters if p.grad is not None}


@pytest.mark.parametrize("recompute", ["none", "full", ("norm", "activation"), ("attention",)], ids=str)
@pytest.mark.parametrize("family", ["gpt", "llama"])
def test_bits_do_not_change(family: str, recompute: Any) -> None:
    expected = run(build(family, Case(micro=4)))
    found = run(build(family, Case(micro=4, recompute=recompute, offload=True)))
    assert expected.keys() == found.keys()
    different = [name for name in expected if not torch.equal(expected[name], found[name])]
    assert not different


class Spy:
    """What was moved, and how many layers had tensors on the device after each layer."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.groups: list[Any] = []
        self.kept: list[torch.Tensor] = []
        self.num_on_device: list[int] = []
        make, keep, layer = offload._Group.__init__, offload._Group.keep, offload._Group.release

        def made(group: Any, *args: Any) -> None:
            make(group, *args)
            self.groups.append(group)

        def kept(group: Any, tensor: torch.Tensor) -> Any:
            self.kept.append(tensor)
            return keep(group, tensor)

        def released(group: Any) -> None:
            layer(group)
            held = (any(s.device is not None for s in g._slots.values()) for g in self.groups)
            self.num_on_device.append(sum(held))

        monkeypatch.setattr(offload._Group, "__init__", made)
        monkeypatch.setattr(offload._Group, "keep", kept)
        monkeypatch.setattr(offload._Group, "release", released)


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_activations_move_and_parameters_stay(recompute: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spy = Spy(monkeypatch)
    model = build("llama", Case(micro=4, recompute=recompute, offload=True))
    stage = Stage(0, list(model.stages[0]), queue=model.queue)
    stage.forward((), make_batch(1).rows(0, 4), micro_batch=0)
    assert len(spy.groups) == LAYERS
    weights = {p.untyped_storage().data_ptr() for p in model.parameters}
    assert not any(t.untyped_storage().data_ptr() in weights for t in spy.kept)
    per_layer = [len(group._slots) for group in spy.groups]
    if recompute == "full":
        assert all(number == 1 for number in per_layer)  # a layer's input
    else:
        assert min(per_layer[1:]) > 8
    assert max(spy.num_on_device) == 1  # the layer that has just ended; the one before is on the host alone
    stage.backward((), SEEDS, micro_batch=0)
    left = [slot for group in spy.groups for slot in group._slots.values()]
    assert not any(slot.host is not None or slot.device is not None for slot in left)


def test_a_tensor_that_is_kept_twice_moves_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The input of a norm and, with norm recomputed, of the product behind it are one tensor."""
    spy = Spy(monkeypatch)
    model = build("llama", Case(micro=4, recompute=("norm",), offload=True))
    Stage(0, list(model.stages[0]), queue=model.queue).forward((), make_batch(1).rows(0, 4), micro_batch=0)
    assert len(spy.kept) > sum(len(group._slots) for group in spy.groups)


def test_nothing_moves_in_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    spy = Spy(monkeypatch)
    model = build("gpt", Case(micro=4, offload=True))
    with torch.no_grad():
        Stage(0, list(model.stages[0]), queue=model.queue).forward((), make_batch(1), micro_batch=0)
    assert spy.groups == []
