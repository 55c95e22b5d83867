"""Batches that no corpus is needed for: a pure function of config and step, and nasty on purpose.

Tokens are skewed (small ids often), the share of tokens that count differs by a factor of 20 between samples, and if
the config keeps attention inside documents, each row has its own. Equal masks would hide a mean of means.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from megads.config.root import Config
from megads.data.sequence import Batch

Masks = Literal["whole", "unequal"]

LEAST_SHARE = 0.05  # of the tokens of the first sample count; all of the last one's


def synthetic_batch(config: Config, step: int, *, masks: Masks = "unequal") -> Batch:
    """The global batch of a step, [batch.global, data.sequence_length], of ids below `model.vocab`.

    Args:
        config: `model.vocab` must not be null.
        step: from 1.
        masks: `whole`: every token counts.
    """
    vocab, rows, seq = config.model.vocab, config.batch.global_size, config.data.sequence_length
    assert vocab is not None
    generator = torch.Generator().manual_seed(100 + step)
    tokens = (vocab * torch.rand(rows, seq + 1, generator=generator) ** 3).long()
    shares = torch.linspace(LEAST_SHARE, 1.0, rows)[:, None]
    mask = torch.rand(rows, seq, generator=generator) < shares
    begins = torch.rand(rows, seq, generator=generator) < 4.0 / seq
    begins[:, 0] = True
    places = torch.arange(seq).expand(rows, seq)
    has_documents = config.data.document_mask
    batch = Batch(
        tokens=tokens[:, :-1].contiguous(),
        labels=tokens[:, 1:].contiguous(),
        mask=mask if masks == "unequal" else torch.ones_like(mask),
        positions=_places_in_documents(places, begins) if has_documents else places,
        document_ids=begins.long().cumsum(1) - 1 if has_documents else None,
        samples=torch.arange(rows),
        step=step,
    )
    parts = begins.cumsum(1) if has_documents else torch.zeros_like(places)
    return batch.look_ahead(parts, depth=config.model.mtp_layers) if config.model.mtp_layers else batch


def _places_in_documents(places: Tensor, begins: Tensor) -> Tensor:
    """[batch, seq]: the place of each token in its document."""
    return places - torch.where(begins, places, 0).cummax(1).values
