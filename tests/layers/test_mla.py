"""Latent attention is what the paper defines; absorbed it is the same. Layouts: tests/parity/test_mla.py."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from megads.data.sequence import Batch
from megads.layers.mla import LatentAttention, MLASpec
from megads.layers.recompute import Origin
from megads.ops.rope import RopeSpec, YarnScaling
from megads.parallel.layout import Layout
from megads.parallel.mesh import build_mesh
from megads.parallel.parameter import Scope, fill, parameter_table
from tests.ranks import run_ranks

SEQ, ROWS, HIDDEN, EPS = 8, 3, 20, 0.1
PLAIN = MLASpec(
    heads=4, q_lora=None, kv_lora=10, nope_dim=6, rope_dim=4, v_dim=5, norm_eps=EPS, scale=0.7
)  # fmt: skip
SPECS = {"q": PLAIN, "q-lora": replace(PLAIN, q_lora=7), "wide values": replace(PLAIN, v_dim=12)}
ROPE = RopeSpec(100.0, YarnScaling(4.0, 16, many_turns=2.0, magnitude=1.1), is_interleaved=True)
DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2], [0] * 8, [0, 1, 1, 1, 1, 1, 1, 1]])


def make(
    spec: MLASpec, *, rank: int = 0, size: int = 1, sequence: bool = False, keeps_norms: bool = True
) -> LatentAttention:
    """A layer with weights so large that attention is far from even."""
    mesh = build_mesh(Layout(tensor=size), rank)
    layer = LatentAttention(
        Scope(mesh, torch.float64, 1, "attention", sequence_parallel=sequence), HIDDEN, spec,
        rope=ROPE, dropout=0.0, init_std=0.5, output_std=0.5, keeps_norms=keeps_norms,
    )  # fmt: skip
    for parameter in parameter_table([layer]):
        fill(parameter, seed=1)
        if parameter.dim() == 1:
            parameter.data += torch.linspace(-0.5, 0.5, len(parameter), dtype=torch.float64)
        parameter.grad = torch.zeros_like(parameter)
    return layer


def make_batch(*, has_documents: bool) -> Batch:
    tokens = torch.zeros(ROWS, SEQ, dtype=torch.int64)
    places = torch.arange(SEQ).expand(ROWS, SEQ)
    positions = places
    if has_documents:
        begins = torch.cat(
            (torch.ones(ROWS, 1, dtype=torch.bool), DOCUMENTS[:, 1:] != DOCUMENTS[:, :-1]), dim=1
        )
        positions = places - torch.where(begins, places, 0).cummax(1).values
    return Batch(
        tokens=tokens,
        labels=tokens,
        mask=tokens == 0,
        positions=positions,
        document_ids=DOCUMENTS if has_documents else None,
        samples=torch.arange(ROWS),
        step=1,
    )


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def _normed(x: Tensor, weight: Tensor) -> Tensor:
    return x / ((x * x).mean() + EPS).sqrt() * weight


def _turned(x: Tensor, position: int) -> Tensor:
    """The pairs (x[2i], x[2i + 1]) as complex numbers, turned; `ROPE` by its definition."""
    pairs = x.shape[0] // 2
    rates = [100.0 ** (-i / pairs) for i in range(pairs)]
    # pair 0 turns 16 / (2 pi) = 2.5 times over the context: kept; pair 1 of 2 a tenth of that
    rates[1] /= 4.0
    turn = torch.exp(1j * position * torch.tensor(rates, dtype=torch.float64)) * 1.1
    return torch.view_as_real(torch.view_as_complex(x.view(pairs, 2)) * turn).flatten()


def define(layer: LatentAttention, x: Tensor, batch: Batch, spec: MLASpec) -> Tensor:
    """[seq, batch, hidden], token by token and head by head."""
    weights = {p.logical_name.removeprefix("attention."): p for p in parameter_table([layer])}
    documents = torch.zeros_like(batch.tokens) if batch.document_ids is None else batch.document_ids
    made = []
    for row in range(ROWS):
        queries, keys, values = [], [], []
        for column in range(SEQ):
            token, position = x[column, row], int(batch.positions[row, column])
            if spec.q_lora is None:
                q = weights["q.weight"] @ token
            else:
                q = weights["q.up.weight"] @ _normed(
                    weights["q.down.weight"] @ token, weights["q.norm.weight"]
                )
            down = weights["kv.down.weight"] @ token
            kv = weights["kv.up.weight"] @ _normed(down[: spec.kv_lora], weights["kv.norm.weight"])
            shared = _turned(down[spec.kv_lora :], position)
            for head in range(spec.heads):
                mine = q.view(spec.heads, -1)[head]
                queries.append(torch.cat((mine[: spec.nope_dim], _turned(mine[spec.nope_dim :], position))))
                keys.append(torch.cat((kv.view(spec.heads, -1)[head][: spec.nope_dim], shared)))
                values.append(kv.view(spec.heads, -1)[head][spec.nope_dim :])
        for column in range(SEQ):
            seen = [c for c in range(column + 1) if documents[row, c] == documents[row, column]]
            out = []
            for head in range(spec.heads):
                q = queries[column * spec.heads + head]
                scores = torch.stack([q @ keys[c * spec.heads + head] for c in seen]) * spec.scale
                out.append(scores.softmax(0) @ torch.stack([values[c * spec.heads + head] for c in seen]))
            made.append(weights["out.weight"] @ torch.cat(out))
    return torch.stack(made).view(ROWS, SEQ, HIDDEN).transpose(0, 1)


@pytest.mark.parametrize("has_documents", [False, True])
@pytest.mark.parametrize("name", SPECS)
def test_like_the_definition(name: str, has_documents: bool) -> None:
    spec, batch = SPECS[name], make_batch(has_documents=has_documents)
    layer, x, flow = make(spec), draw(SEQ, ROWS, HIDDEN).requires_grad_(), draw(SEQ, ROWS, HIDDEN).flip(0)
    out = layer(x, batch)
    out.backward(flow)
    y, parameters = x.detach().clone().requires_grad_(), parameter_table([layer])
    wanted = define(layer, y, batch, spec)
    assert torch.allclose(out, wanted, rtol=1e-12, atol=1e-12)
    gradients = torch.autograd.grad(wanted, [y, *parameters], flow)
    for found, reference in zip([x.grad, *(p.grad for p in parameters)], gradients, strict=True):
        assert (found - reference).norm() <= 1e-12 * reference.norm()


@pytest.mark.parametrize("name", ["q", "q-lora"])
def test_norms_made_again_are_not_kept_and_change_nothing(name: str) -> None:
    batch, kept = make_batch(has_documents=False), []
    found = []
    for keeps in (True, False):
        layer, x = make(SPECS[name], keeps_norms=keeps), draw(SEQ, ROWS, HIDDEN).requires_grad_()
        sizes: dict[int, int] = {}

        def keep(tensor: Tensor, sizes: dict[int, int] = sizes) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        # behind a norm of its own, whose output is made again too
        origin = None if keeps else Origin(torch.sin, x)
        with saved_tensors_hooks(keep, lambda tensor: tensor):
            out = layer(torch.sin(x), batch, origin=origin)
        out.backward(torch.ones_like(out))
        kept.append(sum(sizes.values()))
        found.append([out, x.grad, *(p.grad for p in parameter_table([layer]))])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    outputs = HIDDEN + PLAIN.kv_lora + (SPECS[name].q_lora or 0)  # of sin and the norms
    assert kept[0] - kept[1] == SEQ * ROWS * 8 * outputs


@pytest.mark.parametrize("name", SPECS)
def test_absorbed_from_a_cache_is_the_same(name: str) -> None:
    """All tokens at once, one by one, and in two parts of unequal length."""
    layer, x, batch = make(SPECS[name]), draw(SEQ, ROWS, HIDDEN), make_batch(has_documents=False)
    with torch.no_grad():
        wanted = layer(x, batch)
        for lengths in ((SEQ,), (1,) * SEQ, (5, 3)):
            cache, made, start = torch.zeros(ROWS, 0, 14, dtype=torch.float64), [], 0
            for length in lengths:
                part = slice(start, start + length)
                now = replace(batch, positions=batch.positions[:, part])
                cache = torch.cat((cache, layer.latents(x[part], now)), dim=1)
                made.append(layer.absorbed(x[part], now, cache=cache))
                start += length
            assert cache.shape == (ROWS, SEQ, 14)
            assert (torch.cat(made) - wanted).norm() <= 1e-12 * wanted.norm()


@pytest.mark.parametrize("sequence", [False, True])
def test_absorbed_with_heads_cut(sequence: bool) -> None:
    x, batch = draw(SEQ, ROWS, HIDDEN), make_batch(has_documents=False)
    with torch.no_grad():
        wanted = make(SPECS["q-lora"])(x, batch)

    def work(rank: int, size: int) -> Tensor:
        layer = make(SPECS["q-lora"], rank=rank, size=size, sequence=sequence)
        mine = x.chunk(size)[rank] if sequence else x
        with torch.no_grad():
            return layer.absorbed(mine, batch, cache=layer.latents(mine, batch))

    found = run_ranks(work, 2)
    out = torch.cat(found) if sequence else found[1]
    assert (out - wanted).norm() <= 1e-12 * wanted.norm()


def test_without_rotary_positions_it_is_refused() -> None:
    scope = Scope(build_mesh(Layout(), 0), torch.float64, 1, "attention")
    with pytest.raises(ValueError, match="RopeSpec"):
        LatentAttention(scope, HIDDEN, PLAIN, rope=None, dropout=0.0, init_std=0.5, output_std=0.5)
