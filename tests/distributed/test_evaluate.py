"""Perplexity and generation from a checkpoint, on every layout and against a model written down here.

`plain_logits` is a GPT in twenty lines of PyTorch over the tensors of the checkpoint: no layer, op, mesh or loader of
megads is in it, so what both say is what the checkpoint means.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megads.data.corpus import Corpus
from megads.data.tokenizer import open_tokenizer
from megads.evaluate.generate import Sampling, pick_token
from tests.distributed.job import Home, Layout, commands, step_directory, tensors, train

STEPS = 12
LENGTH, POSITIONS, LAYERS, HEADS = 16, 64, 3, 4  # of the config in job.py
LAYOUTS = {
    "one": Layout(),
    "data": Layout(data=2),
    "tensor": Layout(tensor=2),
    "pipeline": Layout(pipeline=2),
    "context": Layout(context=2),
}


@pytest.fixture(scope="module", params=["fp64", "fp32"])
def run(home: Home, request: pytest.FixtureRequest) -> str:
    """A short run, by its precision."""
    train(home, request.param, Layout(), f"run.stop_after={STEPS}", f"optim.precision={request.param}")
    return str(request.param)


def says(home: Home, layout: Layout, *argv: str) -> str:
    """What rank 0 prints when all ranks of the layout run the command; the others print nothing."""
    degrees = [
        f"parallel.{axis}={getattr(layout, axis)}"
        for axis in ("tensor", "context", "context_kind", "pipeline")
    ]
    first, *others = commands(*[(home.path, [*argv, *degrees])] * layout.world_size)
    assert first.code == 0, first.errors
    assert all((other.code, other.said) == (0, "") for other in others), others
    return first.said


def plain_logits(weights: dict[str, Tensor], tokens: Sequence[int]) -> Tensor:
    """Logits [seq, vocab] of the checkpoint's model after each of `tokens`, at most POSITIONS of them."""

    def part(name: str) -> Tensor:
        return weights[f"model/{name}"]

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], part(f"{name}.weight"), part(f"{name}.bias"), 1e-5)

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ part(f"{name}.weight").T + part(f"{name}.bias")

    words = part("embedding.word.weight")
    x = words[list(tokens)] + part("embedding.position.weight")[: len(tokens)]  # [seq, hidden]
    future = torch.ones(len(tokens), len(tokens), dtype=torch.bool).triu(1)
    for layer in (f"layers.{number}" for number in range(LAYERS)):
        fused = linear(norm(x, f"{layer}.attention_norm"), f"{layer}.attention.qkv")
        q, k, v = (t.view(len(tokens), HEADS, -1).transpose(0, 1) for t in fused.chunk(3, dim=-1))
        scores = (q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])).masked_fill(future, -math.inf)
        mixed = (scores.softmax(-1) @ v).transpose(0, 1).reshape(len(tokens), -1)
        x = x + linear(mixed, f"{layer}.attention.out")
        wide = F.gelu(linear(norm(x, f"{layer}.mlp_norm"), f"{layer}.mlp.up"), approximate="tanh")
        x = x + linear(wide, f"{layer}.mlp.down")
    return norm(x, "head.norm") @ words.T


def checkpoint(home: Home, run: str) -> dict[str, Tensor]:
    """The tensors of the run's last step, in fp64."""
    return {name: value.double() for name, value in tensors(step_directory(home, run, STEPS)).items()}


def test_perplexity_is_that_of_a_plain_loop_under_every_layout(home: Home, run: str) -> None:
    corpus, weights = Corpus(home.path / "data" / "valid"), checkpoint(home, run)
    ids = corpus.tokens.read(0, corpus.num_tokens).tolist()
    total = 0.0
    for start in range(0, len(ids) - 1, LENGTH):
        window = ids[start : start + LENGTH + 1]
        labels = torch.tensor(window[1:])
        total += float(F.cross_entropy(plain_logits(weights, window[:-1]), labels, reduction="sum"))
    num_bytes = (home.path / "data" / "held_out.txt").stat().st_size

    bound = {"fp64": 1e-12, "fp32": 1e-6}[run]
    for layout in LAYOUTS.values():
        score = json.loads(says(home, layout, "evaluate", run, "--data", "data/valid", "--json"))
        assert (score["data"], score["step"]) == ("data/valid", STEPS)
        assert (score["tokens"], score["bytes"]) == (len(ids) - 1, num_bytes)  # each label once
        assert score["loss"] == pytest.approx(total / (len(ids) - 1), rel=bound)
        assert score["perplexity"] == pytest.approx(math.exp(total / (len(ids) - 1)), rel=10 * bound)
        assert score["bits_per_byte"] == pytest.approx(total / math.log(2) / num_bytes, rel=bound)


def test_evaluation_in_words_and_of_two_corpora(home: Home, run: str) -> None:
    text = says(home, Layout(), "evaluate", run, "--data", "data/valid", "--data", "data/valid")
    first, second = text.splitlines()
    assert first == second
    assert first.startswith(f"data/valid at step {STEPS}: loss ")
    assert "bits per byte" in first


def test_greedy_text_is_the_likeliest_token_each_time(home: Home) -> None:
    """Longer than the positions last: then the oldest tokens leave the window."""
    train(home, "fp64", Layout(), f"run.stop_after={STEPS}", "optim.precision=fp64")
    weights, tokenizer = checkpoint(home, "fp64"), open_tokenizer(home.path / "data" / "tokenizer.model")
    prompt = "def bisect(a, x):\n    while lo < hi:\n"
    ids = tokenizer.encode_batch([prompt])[0].tolist()
    num_tokens = POSITIONS - len(ids) + 6
    for _ in range(num_tokens):
        token = int(plain_logits(weights, ids[-POSITIONS:])[-1].argmax())
        if token == tokenizer.eod:
            break
        ids.append(token)
    assert len(ids) > POSITIONS
    options = ["--prompt", prompt, "--temperature", "0", "--tokens", str(num_tokens)]
    texts = {name: says(home, layout, "generate", "fp64", *options) for name, layout in LAYOUTS.items()}
    assert texts == dict.fromkeys(LAYOUTS, tokenizer.decode(ids) + "\n")


def test_sampled_text_depends_on_the_seed_alone(home: Home, run: str) -> None:
    def text(layout: Layout, seed: int, *more: str) -> str:
        options = ["--prompt", "import ", "--tokens", "12", "--top-p", "0.9", "--seed", str(seed)]
        return says(home, layout, "generate", run, *options, *more)

    first = text(Layout(), 1)
    assert [text(layout, 1) for layout in LAYOUTS.values()] == [first] * len(LAYOUTS)
    assert text(Layout(), 2) != first
    assert text(Layout(), 1, "--top-p", "1e-9") == text(Layout(), 2, "--temperature", "0")


def test_a_draw_has_the_probabilities_of_the_nucleus() -> None:
    logits = torch.tensor([0.15, 0.5, 0.05, 0.3]).log()
    generator, sampling = torch.Generator().manual_seed(0), Sampling(top_p=0.75)
    draws = [pick_token(logits, sampling, generator=generator) for _ in range(4000)]
    assert set(draws) == {1, 3}  # 0.5 is not enough, 0.5 + 0.3 is
    deviation = math.sqrt(0.625 * 0.375 / len(draws))
    assert abs(draws.count(1) / len(draws) - 0.5 / 0.8) < 4 * deviation

    warm = Sampling(temperature=0.5)  # probabilities squared
    draws = [pick_token(logits, warm, generator=generator) for _ in range(4000)]
    expected = 0.25 / (0.25 + 0.09 + 0.0225 + 0.0025)
    deviation = math.sqrt(expected * (1 - expected) / len(draws))
    assert abs(draws.count(1) / len(draws) - expected) < 4 * deviation


def test_evaluation_follows_the_newest_step_or_the_one_that_is_named(home: Home, run: str) -> None:
    older = Path(run) / "checkpoints" / "step-00000003"
    losses = [
        json.loads(says(home, Layout(), "evaluate", str(path), "--data", "data/valid", "--json"))["loss"]
        for path in (older, Path(run), Path(run) / "checkpoints")
    ]
    assert losses[0] > losses[1] == losses[2]


def test_a_run_whose_layout_needs_more_ranks_is_evaluated_on_one(home: Home) -> None:
    """Every key of the run's layout that one process refuses goes back to what a single process has."""
    layout = Layout(tensor=2)
    train(home, "cut", layout, "run.stop_after=3", "parallel.sequence=true", "parallel.sequence_pieces=2")
    score = json.loads(commands((home.path, ["evaluate", "cut", "--data", "data/valid", "--json"]))[0].said)
    assert score["step"] == 3
