"""`python -m megads generate CHECKPOINT --prompt TEXT [key=value ...]`: sample text on a training layout.

Every rank runs its stages; the last stage picks the next token and tells the others. The prompt is computed once, and
then one token at a time with the keys and values of those before (`layers/cache.py`); context-parallel ranks each run
the whole text. A text that is longer than the model's positions slides: its last `max_positions` tokens are computed
anew for each token more. So is every text without a cache (`--no-cache`), and where experts drop tokens
(`model.capacity`): which ones they drop hangs on all tokens.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from megads.assemble.wiring import Model
from megads.data.sequence import Batch, context_columns
from megads.data.tokenizer import open_tokenizer
from megads.errors import CheckpointError, ConfigError
from megads.evaluate.restore import restore
from megads.layers.cache import Cache, caching
from megads.model.decoder import HeadBlock
from megads.parallel.bootstrap import disconnect
from megads.parallel.collectives import broadcast_
from megads.parallel.layout import sequence_unit
from megads.parallel.mesh import Mesh
from megads.pipeline.stage import Payload
from megads.pipeline.transport import TensorSpec, Transport


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: divides the logits; 0: always the likeliest token (greedy).
        top_p: sample among the likeliest tokens that together have this probability (Holtzman et al. 2020).
        seed: the same seed draws the same text.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ConfigError(
                "--temperature cannot divide logits", found=self.temperature, allowed=">= 0 (0: greedy)"
            )
        if not 0 < self.top_p <= 1:
            raise ConfigError("--top-p is no probability", found=self.top_p, allowed="above 0, at most 1")
        if not 0 <= self.seed < 2**63:
            raise ConfigError("--seed is out of range", found=self.seed, allowed="0 .. 2**63 - 1")


def pick_token(logits: Tensor, sampling: Sampling, *, generator: torch.Generator) -> int:
    """The next token for logits [vocab]."""
    logits = logits.double().cpu()
    if sampling.temperature == 0:
        return int(logits.argmax())
    probabilities = (logits / sampling.temperature).softmax(-1)
    ordered, ids = probabilities.sort(descending=True)
    before = ordered.cumsum(-1) - ordered  # probability of all likelier tokens
    ordered = torch.where(before < sampling.top_p, ordered, 0.0)
    return int(ids[torch.multinomial(ordered, 1, generator=generator)])


class Generator:
    """Continues token sequences with a model that is cut over the ranks of a mesh. All ranks call it alike.

    Args:
        has_cache: whether a token is computed once, if the model allows it; else with every token after it.
    """

    def __init__(self, model: Model, mesh: Mesh, *, has_cache: bool = True) -> None:
        moe = model.spec.moe
        self._has_cache = has_cache and (moe is None or moe.capacity is None)
        self._model = model
        self._mesh = mesh
        self._tensor_cut = mesh.group("tp").size if model.is_sequence_parallel else 1
        self._context = mesh.group("cp")
        self._multiple = sequence_unit(context=self._context.size, tensor=self._tensor_cut)
        self._pipeline = mesh.group("pp")
        self._transport = Transport(self._pipeline, mesh.device)
        self._rank_of_head = mesh.layout.pipeline_rank_of(mesh.layout.num_stages - 1)

    @torch.no_grad()
    def extend(
        self, tokens: Sequence[int], *, num_tokens: int, sampling: Sampling, stop: int | None = None
    ) -> list[int]:
        """Up to `num_tokens` tokens that follow `tokens`, without the stop token that may end them.

        The model is left as training wants it.
        """
        self._model.eval()
        draw = torch.Generator().manual_seed(sampling.seed)
        window, made, limit = list(tokens), [], self._model.spec.max_positions
        cache = Cache(min(len(window) + num_tokens, limit) + self._tensor_cut) if self._has_cache else None
        for _ in range(num_tokens):
            if cache is not None and len(window) > limit:
                cache.clear()
            logits = self._next_logits(window[-limit:], cache)
            token = torch.zeros(1, dtype=torch.int64, device=self._mesh.device)
            if logits is not None:
                token += pick_token(logits, sampling, generator=draw)
            self._transport.drain()
            broadcast_(token, self._pipeline, source=self._rank_of_head)
            if token.item() == stop:
                break
            window.append(int(token.item()))
            made.append(window[-1])
        self._model.train()
        return made

    def _next_logits(self, tokens: list[int], cache: Cache | None) -> Tensor | None:
        """Logits [vocab] after the last token on the ranks of the last stage; None on the others."""
        first = 0 if cache is None else cache.length
        num_new = len(tokens) - first
        if cache is None:
            batch = self._batch(tokens, first=0, multiple=self._multiple)
            batch = batch.context_part(self._context.rank, self._context.size)
            payload = self._run_stages(batch)
            if payload is None:
                return None
            logits = self._head.logits(payload)[0]
            return self._row_of(num_new - 1, logits, seq=self._context.size * batch.tokens.shape[1])
        batch = self._batch(tokens[first:], first=first, multiple=self._tensor_cut)
        with caching(self._model.stages.values(), cache), cache.step(num_new):
            payload = self._run_stages(batch)
        if payload is None:
            return None
        return self._head.logits(payload, columns=slice(num_new - 1, num_new))[0, 0]

    def _batch(self, tokens: list[int], *, first: int, multiple: int) -> Batch:
        """A row of the tokens at positions `first`, ...; filled up after the last, where nothing looks."""
        device = self._mesh.device
        ids = torch.tensor([tokens + [0] * (-len(tokens) % multiple)], device=device)
        positions = torch.arange(first, first + ids.shape[1], device=device)
        return Batch(
            tokens=ids,
            labels=ids,
            mask=torch.zeros_like(ids, dtype=torch.bool),
            positions=positions.clamp_max(self._model.spec.max_positions - 1)[None],
            document_ids=None,
            samples=torch.zeros(1, dtype=torch.int64, device=device),
            step=1,
        )

    def _run_stages(self, batch: Batch) -> Payload | None:
        """What the trunk hands to the head, on the ranks of the last stage; None on the others."""
        seq_local = batch.tokens.shape[1] // self._tensor_cut
        spec = TensorSpec((seq_local, 1, self._model.spec.hidden), self._model.dtype)
        payload: Payload = ()
        rank_of, own = self._mesh.layout.pipeline_rank_of, self._pipeline.rank
        for stage, blocks in sorted(self._model.stages.items()):
            if stage > 0 and (before := rank_of(stage - 1)) != own:
                payload = self._transport.receive((spec,), peer=before).wait()
            for block in blocks:
                if isinstance(block, HeadBlock):
                    return payload
                payload = block(payload, batch).payload
            if (after := rank_of(stage + 1)) != own:
                self._transport.send(payload, (spec,), peer=after)
        return None

    @property
    def _head(self) -> HeadBlock:
        """The output head, on the ranks of the last stage."""
        last = self._model.stages[self._mesh.layout.num_stages - 1]
        return next(block for block in last if isinstance(block, HeadBlock))

    def _row_of(self, column: int, logits: Tensor, *, seq: int) -> Tensor:
        """The logits [vocab] of one column of `seq`, from the context-parallel rank that has it."""
        group = self._context
        columns = [[*chain(*context_columns(r, size=group.size, length=seq))] for r in range(group.size)]
        (source,) = (r for r in range(group.size) if column in columns[r])
        is_here = source == group.rank
        row = logits[columns[source].index(column)] if is_here else torch.empty_like(logits[0])
        return broadcast_(row.contiguous(), group, source=source)


def main(argv: Sequence[str]) -> int:
    """Print the prompt and its continuation."""
    parser = argparse.ArgumentParser(prog="megads generate", description="Sample text from a checkpoint.")
    parser.add_argument("checkpoint", help="directory of a run, of its checkpoints, or of a step")
    parser.add_argument("--prompt", required=True, metavar="TEXT")
    parser.add_argument("--tokens", type=int, default=64, help="most tokens to add (default 64)")
    parser.add_argument("--temperature", type=float, default=1.0, help="0: greedy (default 1)")
    parser.add_argument("--top-p", type=float, default=0.95, help="default 0.95")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-cache", action="store_true", help="compute all tokens again for each one more")
    parser.add_argument("--weights", default="model", metavar="KIND", help="model, or ema_DECAY")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. parallel.tensor=2")
    options = parser.parse_intermixed_args(argv)
    sampling = Sampling(options.temperature, options.top_p, options.seed)
    if options.tokens < 0:
        raise ConfigError("--tokens is negative", found=options.tokens, allowed="0 or more")
    if any("\ud800" <= character <= "\udfff" for character in options.prompt):
        raise ConfigError("--prompt is no text", found=ascii(options.prompt), allowed="valid UTF-8")
    restored = restore(options.checkpoint, options.overrides, weights=options.weights)
    tokenizer = open_tokenizer(restored.config.data.tokenizer)
    if tokenizer.fingerprint != restored.tokenizer_fingerprint:
        raise CheckpointError(
            f"{restored.config.data.tokenizer}: not the tokenizer that the model was trained with",
            found=tokenizer.fingerprint[:16],
            allowed=restored.tokenizer_fingerprint[:16],
            do="data.tokenizer=FILE names the right one",
        )
    ids, _ = tokenizer.encode_batch([options.prompt])
    if not len(ids):
        raise ConfigError("--prompt has no token", found=repr(options.prompt), allowed="some text")
    made = Generator(restored.model, restored.mesh, has_cache=not options.no_cache).extend(
        ids.tolist(), num_tokens=options.tokens, sampling=sampling, stop=tokenizer.eod
    )
    if restored.mesh.rank == 0:
        print(tokenizer.decode([*ids.tolist(), *made]), flush=True)
    disconnect()
    return 0
