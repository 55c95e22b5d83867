"""`python -m megads evaluate CHECKPOINT --data PREFIX [key=value ...]`: perplexity and bits per byte, at any layout.

    perplexity = exp(sum of losses / tokens)        bits per byte = sum of losses / ln 2 / UTF-8 bytes of the text

Every token of the corpus but the first is predicted once, end-of-document tokens included; windows of the training
length follow one another without context from the one before. Bits per byte do not depend on the tokenizer, so they
compare with other models and with compressors. Of chat data only what its loss mask counts is scored; after a run with
`data.packing` best_fit documents are whole, in the rows of PREFIX.pack-L.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import torch

from megads import log
from megads.assemble.source import build_valid_loader, check_vocabulary
from megads.assemble.wiring import Model, build_executors
from megads.data.corpus import Corpus
from megads.data.loader import ValidLoader
from megads.data.sequence import Packing
from megads.data.tokenizer import open_tokenizer
from megads.evaluate.restore import restore
from megads.objective.language import count_tokens
from megads.parallel.bootstrap import disconnect
from megads.parallel.mesh import Mesh
from megads.pipeline.executor import Executor, global_sum


@dataclass(frozen=True, slots=True)
class Score:
    """Sum of the losses in nats, and how many tokens they are of."""

    loss_sum: float
    num_tokens: int

    @property
    def loss(self) -> float:
        """Mean loss of a token, in nats."""
        return self.loss_sum / max(self.num_tokens, 1)

    @property
    def perplexity(self) -> float:
        """exp of the mean loss; infinite if that is more than a float can hold."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    def bits_per_byte(self, text_bytes: int) -> float:
        """Bits that the model needs for a byte of the text."""
        return self.loss_sum / math.log(2.0) / text_bytes


@torch.no_grad()
def evaluate(
    batches: ValidLoader, model: Model, *, executor: Executor, mesh: Mesh, max_batches: int | None = None
) -> Score:
    """Score held-out batches with dropout off. All ranks call it.

    Args:
        executor: of the forward half.
        max_batches: read the head of the corpus only; None: all of it.
    """
    loss = torch.zeros((), dtype=torch.float64, device=mesh.device)
    count = torch.zeros((), dtype=torch.float64, device=mesh.device)
    context = mesh.group("cp")
    model.eval()
    for batch in islice(batches, max_batches):
        batch = batch.to(mesh.device).context_part(context.rank, context.size)
        loss += global_sum(executor.run(batch), "loss", mesh=mesh)
        count += count_tokens(batch, mesh)
    model.train()
    return Score(loss.item(), int(count.item()))


def main(argv: Sequence[str]) -> int:
    """Evaluate a checkpoint on held-out corpora; prints one line, or one JSON object, a corpus."""
    parser = argparse.ArgumentParser(
        prog="megads evaluate", description="Perplexity and bits per byte of a checkpoint."
    )
    parser.add_argument("checkpoint", help="directory of a run, of its checkpoints, or of a step")
    parser.add_argument("--data", required=True, action="append", metavar="PREFIX", help="held-out corpus")
    parser.add_argument("--json", action="store_true", help="one JSON object a corpus")
    parser.add_argument("--weights", default="model", metavar="KIND", help="model, or ema_DECAY")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. parallel.tensor=2")
    options = parser.parse_intermixed_args(argv)
    restored = restore(options.checkpoint, options.overrides, weights=options.weights)
    config, mesh = restored.config, restored.mesh
    tokenizer = open_tokenizer(config.data.tokenizer)
    check_vocabulary(config, tokenizer)
    executor = build_executors(config, restored.model, mesh=mesh).evaluate
    for prefix in options.data:
        corpus = Corpus(prefix)
        corpus.check_tokenizer(restored.tokenizer_fingerprint, vocab_size=tokenizer.vocab_size)
        packing = Packing(vocab_size=tokenizer.vocab_size, document_mask=config.data.document_mask)
        batches = build_valid_loader(config, corpus, packing=packing, mesh=mesh)
        score = evaluate(batches, restored.model, executor=executor, mesh=mesh)
        if mesh.rank == 0:
            print(_report(prefix, restored.step, score, batches.text_bytes, as_json=options.json), flush=True)
    disconnect()
    return 0


def _report(prefix: str, step: int, score: Score, text_bytes: int | None, *, as_json: bool) -> str:
    bits = None if text_bytes is None else score.bits_per_byte(text_bytes)
    if as_json:
        return json.dumps(
            {
                "data": prefix,
                "step": step,
                "loss": score.loss,
                "perplexity": score.perplexity,
                "bits_per_byte": bits,
                "tokens": score.num_tokens,
                "bytes": text_bytes,
            }
        )
    rest = (
        "no bits per byte (no manifest, or not all text counts)"
        if bits is None
        else f"{bits:.4f} bits per byte"
    )
    return (
        f"{prefix} at step {step}: loss {score.loss:.4f}, perplexity {score.perplexity:.2f}, {rest}, "
        f"{log.format_count(score.num_tokens)} tokens"
    )
