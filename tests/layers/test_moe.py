"""The mixture of experts against a definition that goes token by token, in plain torch and without a kernel."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megads.data.sequence import Batch
from megads.layers.moe import MixtureOfExperts, MoEOutput
from megads.layers.recompute import recomputed
from megads.layers.router import GATE_STEPS, Choice, MoESpec, Router, TokenPlaces
from megads.parallel.layout import Layout
from megads.parallel.mesh import build_mesh
from megads.parallel.parameter import Scope, parameter_table

SEQ, ROWS, HIDDEN = 7, 3, 12
SOFTMAX = MoESpec(
    experts=8, per_token=2, ffn=10, shared_ffn=0, scores="softmax", renormalises=False, scaling=1.0,
    groups=1, groups_per_token=1, group_score="max", balance="none", balance_weight=0.0, bias_rate=0.125,
    z_weight=0.0, capacity=None,
)  # fmt: skip
SIGMOID = replace(
    SOFTMAX, scores="sigmoid", renormalises=True, scaling=2.5, per_token=3, groups=4, groups_per_token=2,
    group_score="top2", balance="bias", balance_weight=1.0, shared_ffn=14,
)  # fmt: skip
SPECS = {
    "softmax": SOFTMAX,
    "renormalised": replace(SOFTMAX, renormalises=True, z_weight=1.0),
    "sequence": replace(SOFTMAX, balance="sequence", balance_weight=1.0),
    "global": replace(SOFTMAX, balance="global", balance_weight=1.0, per_token=1),
    "groups by their best": replace(SOFTMAX, groups=4, groups_per_token=2, scaling=16.0),
    "sigmoid, bias, groups, shared": SIGMOID,
    "sigmoid, sequence": replace(SIGMOID, balance="sequence", groups=1, groups_per_token=1),
    "capacity": replace(SOFTMAX, capacity=0.75, balance="sequence", balance_weight=1.0, z_weight=1.0),
    "capacity, all fit": replace(SOFTMAX, capacity=8.0),
    "all experts": replace(SOFTMAX, per_token=8),
}


def make(spec: MoESpec) -> MixtureOfExperts:
    """A layer with weights so large that experts differ much, and a bias and a load that matter."""
    layer = MixtureOfExperts(
        Scope(build_mesh(Layout(), 0), torch.float64, 1, "mlp"),
        HIDDEN,
        spec,
        row=0,
        init_std=1.0,
        output_std=1.0,
    )
    generator = torch.Generator().manual_seed(5)
    for parameter in parameter_table([layer]):
        parameter.data.copy_(torch.randn(parameter.shape, dtype=torch.float64, generator=generator) / 2)
        parameter.grad = torch.zeros_like(parameter)
    if layer.router.bias is not None:
        layer.router.bias.copy_(torch.linspace(-0.4, 0.4, spec.experts))
    if layer.router.load is not None:
        layer.router.load.copy_(torch.linspace(0.2, 1.8, spec.experts))
    return layer


def make_batch() -> Batch:
    tokens = torch.zeros(ROWS, SEQ, dtype=torch.int64)
    return Batch(
        tokens=tokens,
        labels=tokens,
        mask=tokens == 0,
        positions=torch.arange(SEQ).expand(ROWS, SEQ),
        document_ids=None,
        samples=torch.arange(ROWS),
        step=1,
    )


def draw_input() -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(SEQ, ROWS, HIDDEN, dtype=torch.float64, generator=generator).requires_grad_()


def _expert(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    half = gate_up.shape[0] // 2
    gate, up = gate_up[:half] @ x, gate_up[half:] @ x
    return down @ (gate * torch.sigmoid(gate) * up)


def _best(values: list[float], count: int) -> list[int]:
    return sorted(range(len(values)), key=lambda i: (-values[i], i))[:count]


def _choose(scores: list[float], spec: MoESpec) -> list[int]:
    """The experts of one token: the K best, inside the best groups."""
    size = spec.experts // spec.groups
    members = [range(g * size, (g + 1) * size) for g in range(spec.groups)]
    best = 1 if spec.group_score == "max" else 2
    values = [sum(sorted((scores[i] for i in group), reverse=True)[:best]) for group in members]
    eligible = [i for g in _best(values, spec.groups_per_token) for i in members[g]]
    return sorted(eligible, key=lambda i: -scores[i])[: spec.per_token]


def define(layer: MixtureOfExperts, x: Tensor, spec: MoESpec) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """Output, sums of balance and z-loss, and tokens that chose each expert with the number of drops last."""
    made = torch.zeros_like(x)
    balance = z = torch.zeros((), dtype=torch.float64)
    tally = [0] * (spec.experts + 1)
    for row in range(ROWS):
        choices, scores = [], []
        for token in range(SEQ):
            logits = layer.router.weight @ x[token, row]
            z = z + torch.logsumexp(logits, 0) ** 2
            scores.append(torch.softmax(logits, 0) if spec.scores == "softmax" else torch.sigmoid(logits))
            seen = scores[-1] if layer.router.bias is None else scores[-1] + layer.router.bias
            choices.append(_choose(seen.tolist(), spec))
        gates = [score[choice] for score, choice in zip(scores, choices, strict=True)]
        if spec.renormalises:
            gates = [gate / gate.sum() for gate in gates]
        allowed = _with_room(gates, choices, spec)
        for token in range(SEQ):
            for slot, expert in enumerate(choices[token]):
                tally[expert] += 1
                if (token, expert) not in allowed:
                    tally[-1] += 1
                    continue
                weights = layer.experts.gate_up[expert], layer.experts.down[expert]
                part = gates[token][slot] * spec.scaling * _expert(x[token, row], *weights)
                made = made.index_put((torch.tensor(token), torch.tensor(row)), part, accumulate=True)
            if layer.shared is not None:
                part = _expert(x[token, row], layer.shared.gate_up.weight, layer.shared.down.weight)
                made = made.index_put((torch.tensor(token), torch.tensor(row)), part, accumulate=True)
        if spec.balance == "bias":
            choices = [_best(score.tolist(), spec.per_token) for score in scores]
        for expert in range(spec.experts):
            frequency = spec.experts / (spec.per_token * SEQ) * sum(expert in choice for choice in choices)
            if layer.router.load is not None:
                frequency = layer.router.load[expert].item()
            balance = balance + frequency * sum(score[expert] / score.sum() for score in scores)
    return made, balance, z, tally


def _with_room(gates: list[Tensor], choices: list[list[int]], spec: MoESpec) -> set[tuple[int, int]]:
    """(token, expert) of one sequence that are not dropped."""
    limit = SEQ if spec.capacity is None else math.ceil(spec.capacity * spec.per_token * SEQ / spec.experts)
    allowed = set()
    for expert in range(spec.experts):
        wanted = [
            (-round(gates[token][choice.index(expert)].item() * GATE_STEPS), token)
            for token, choice in enumerate(choices)
            if expert in choice
        ]
        allowed |= {(token, expert) for _, token in sorted(wanted)[:limit]}
    return allowed


def run(layer: MixtureOfExperts, x: Tensor, *, flow: Tensor) -> MoEOutput:
    """Forward and backward of <flow, y> + 2 balance + 3 z."""
    output: MoEOutput = layer(x, make_batch())
    total = (flow * output.hidden).sum()
    for loss, weight in ((output.balance_loss, 2.0), (output.z_loss, 3.0)):
        total = total if loss is None else total + weight * loss
    total.backward()
    return output


@pytest.mark.parametrize("name", SPECS)
def test_like_the_definition(name: str) -> None:
    spec = SPECS[name]
    layer, x, y = make(spec), draw_input(), draw_input()
    flow = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    output = run(layer, x, flow=flow)
    parameters = parameter_table([layer])
    got = [x.grad, *(parameter.grad.clone() for parameter in parameters)]
    assert output.num_tokens == SEQ * ROWS

    made, balance, z, tally = define(layer, y, spec)
    has_balance, has_z = spec.balance_weight > 0, spec.z_weight > 0
    assert (output.balance_loss is not None, output.z_loss is not None) == (has_balance, has_z)
    total = (flow * made).sum() + 2.0 * has_balance * balance + 3.0 * has_z * z
    wanted = torch.autograd.grad(total, [y, *parameters])
    assert torch.allclose(output.hidden, made, rtol=1e-12, atol=1e-12)
    if has_balance:
        assert output.balance_loss.item() == pytest.approx(balance.item(), rel=1e-12)
    if has_z:
        assert output.z_loss.item() == pytest.approx(z.item(), rel=1e-12)
    for mine, reference, label in zip(got, wanted, ["x", *(p.logical_name for p in parameters)], strict=True):
        assert (mine - reference).norm() <= 1e-12 * reference.norm(), label
    assert layer.router.tally.tolist() == tally
    if name == "capacity":
        assert tally[-1] > 0, "nothing was dropped: the case shows nothing"


@pytest.mark.parametrize("limit", [1, 3])
def test_drops_go_by_gate_then_position(limit: int) -> None:
    """All tokens choose expert 1; those at 4, 2 with the best gates stay, then the earliest of equal ones."""
    spec = replace(SOFTMAX, experts=2, per_token=1, capacity=limit * 2 / SEQ)
    router = make(spec).router
    places = _places()
    gates = torch.full((SEQ * ROWS, 1), 0.5, dtype=torch.float64)
    rows, columns = places.rows, places.columns
    gates[(rows == 1) & (columns == 4)] = 0.9
    gates[(rows == 1) & (columns == 2)] = 0.8
    gates += 1e-9 * torch.randn(gates.shape, dtype=torch.float64)  # rounding decides nothing
    dropped = router._dropped(torch.ones_like(gates, dtype=torch.int64), gates, places)[:, 0]
    kept = [sorted(columns[(rows == row) & ~dropped].tolist()) for row in range(ROWS)]
    assert (
        kept
        == {
            1: [[0], [4], [0]],
            3: [[0, 1, 2], [0, 2, 4], [0, 1, 2]],
        }[limit]
    )


def _places() -> TokenPlaces:
    return TokenPlaces.of(make_batch(), build_mesh(Layout(), 0))


def test_a_second_forward_counts_nothing_and_neither_does_evaluation() -> None:
    layer, x = make(SIGMOID), draw_input()
    with torch.no_grad():
        layer(x, make_batch())
    assert layer.router.tally.sum() == 0
    output: MoEOutput = recomputed(layer, x, make_batch())
    assert layer.router.tally.sum() == 0
    (output.hidden.sum() + output.balance_loss).backward()
    assert layer.router.tally[:-1].sum() == SEQ * ROWS * SIGMOID.per_token
    plain, again = make(SIGMOID), draw_input()
    kept: MoEOutput = plain(again, make_batch())
    (kept.hidden.sum() + kept.balance_loss).backward()
    assert torch.equal(x.grad, again.grad)
    for mine, other in zip(parameter_table([layer]), parameter_table([plain]), strict=True):
        assert torch.equal(mine.grad, other.grad)


def test_the_bias_goes_to_those_with_less_than_the_mean() -> None:
    router: Router = make(replace(SIGMOID, experts=4, groups=1, groups_per_token=1)).router
    assert router.bias is not None
    router.bias.zero_()
    totals = torch.tensor([10.0, 4.0, 6.0, 4.0, 99.0], dtype=torch.float64)  # mean 6; the last counts drops
    router.settle(totals, is_valid=torch.tensor(False))
    assert router.bias.tolist() == [0.0, 0.0, 0.0, 0.0]
    router.settle(totals, is_valid=torch.tensor(True))
    assert router.bias.tolist() == [-0.125, 0.125, 0.0, 0.125]


def test_the_load_is_that_of_the_last_valid_step() -> None:
    router: Router = make(replace(SOFTMAX, experts=4, balance="global", balance_weight=1.0)).router
    assert router.load is not None
    totals = torch.tensor([10.0, 4.0, 6.0, 4.0, 99.0], dtype=torch.float64)
    before = router.load.clone()
    router.settle(totals, is_valid=torch.tensor(False))
    assert torch.equal(router.load, before)
    router.settle(totals, is_valid=torch.tensor(True))
    assert torch.allclose(router.load, totals[:4] / 6.0)


def test_a_hook_sees_and_replaces_the_choice() -> None:
    """What replays a routing in tests and in `verify`: a forward hook on `Choice`, nothing in the layer."""
    layer, x = make(SIGMOID), draw_input()
    seen: list[Tensor] = []
    with torch.no_grad():
        plain = layer(x, make_batch()).hidden
        forced = torch.tensor([5, 6, 7]).expand(SEQ * ROWS, 3)
        layer.router.choice.register_forward_hook(lambda _, args, out: seen.append(out) or forced)
        other = layer(x, make_batch()).hidden
    assert seen[0].shape == (SEQ * ROWS, 3)
    assert not torch.allclose(plain, other)


@pytest.mark.parametrize("name", ["softmax", "groups by their best", "sigmoid, bias, groups, shared"])
def test_a_margin_is_what_it_takes_to_change_the_choice(name: str) -> None:
    spec = SPECS[name]
    choice, places = Choice(spec), _places()
    scores = torch.rand(
        SEQ * ROWS, spec.experts, dtype=torch.float64, generator=torch.Generator().manual_seed(2)
    )
    margins, chosen = choice.margins(scores), choice(scores, places).sort().values
    noise = torch.rand(scores.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(4)) - 0.5
    near = scores + noise * 0.49 * margins[:, None]  # a sum of two scores moves by less than half the margin
    assert torch.equal(choice(near, places).sort().values, chosen)
    last = torch.gather(scores, 1, choice(scores, places)[:, -1:])
    lowered = scores.scatter(1, choice(scores, places)[:, -1:], last - 4 * scores.max())
    assert not torch.equal(choice(lowered, places).sort().values, chosen)


def test_experts_without_tokens_have_no_gradient() -> None:
    layer, x = make(replace(SOFTMAX, per_token=1)), draw_input()
    layer.router.choice.register_forward_hook(lambda _, args, out: torch.full_like(out, 3))
    run(layer, x, flow=torch.ones_like(x))
    norms = layer.experts.gate_up.grad.flatten(1).norm(dim=1)
    assert [bool(n > 0) for n in norms] == [e == 3 for e in range(8)]


def test_bf16_router_is_float32() -> None:
    """Logits of bf16 activations are products in float32: sorted scores of near experts don't collapse."""
    scope = Scope(build_mesh(Layout(), 0), torch.bfloat16, 1, "mlp")
    layer = MixtureOfExperts(scope, HIDDEN, SOFTMAX, row=0, init_std=1.0, output_std=1.0)
    seen: list[Tensor] = []
    layer.router.choice.register_forward_hook(lambda _, args, out: seen.append(args[0]))
    x = draw_input().bfloat16()
    weight = torch.randn(8, HIDDEN, generator=torch.Generator().manual_seed(6)).bfloat16()
    layer.router.weight.data.copy_(weight)
    output = layer(x, make_batch())
    assert output.hidden.dtype == torch.bfloat16
    expected = F.linear(x.detach().flatten(0, 1).double(), weight.double()).softmax(-1)
    assert seen[0].dtype == torch.float32
    assert torch.allclose(seen[0].double(), expected, rtol=1e-5, atol=1e-7)
