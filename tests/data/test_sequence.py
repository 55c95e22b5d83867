"""Packing: labels are the next token, masks and positions follow documents and spans."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from megads.data.sequence import Batch, Packing, Span, context_columns, pack
from megads.errors import DataError, LayoutError

EOD = 9


def span(*tokens: int, starts: tuple[int, ...] = ()) -> Span:
    return Span(np.array(tokens, dtype=np.uint16), np.array(starts, dtype=np.int64))


def packed(*rows: list[Span], length: int = 6, **options: Any) -> Batch:
    packing = Packing(vocab_size=100, eod=EOD, **options)
    return pack(rows, packing, sequence_length=length, first_sample=4, step=7)


def test_labels_are_the_token_that_follows_in_each_span() -> None:
    batch = packed([span(1, 2, 3, 4), span(50, 51, 52, 53)])
    assert batch.tokens.tolist() == [[1, 2, 3, 50, 51, 52]]
    assert batch.labels.tolist() == [[2, 3, 4, 51, 52, 53]]
    assert batch.mask.all()
    assert batch.positions.tolist() == [[0, 1, 2, 3, 4, 5]]
    assert batch.document_ids is None


def test_document_mask_restarts_at_documents_and_at_spans() -> None:
    batch = packed([span(1, EOD, 3, 4, starts=(2,)), span(5, 6, 7, 8, starts=(0, 1))], document_mask=True)
    assert batch.document_ids is not None
    assert batch.document_ids.tolist() == [[0, 0, 1, 2, 3, 3]]
    assert batch.positions.tolist() == [[0, 1, 0, 0, 0, 1]]


def test_eod_mask_loss_leaves_out_what_follows_the_end_of_a_document() -> None:
    row = [span(1, EOD, 3, 4, 5, EOD, 7)]
    assert packed(row, eod_mask_loss=True).mask.tolist() == [[True, False, True, True, True, False]]
    assert packed(row).mask.all()


def test_padding_counts_nowhere_and_is_a_document_of_its_own() -> None:
    batch = packed([span(1, 2, 3)], [], document_mask=True)
    assert batch.mask.tolist() == [[True, True, False, False, False, False], [False] * 6]
    assert batch.document_ids is not None
    assert batch.document_ids.tolist() == [[0, 0, 1, 1, 1, 1], [0] * 6]
    assert batch.tokens.tolist() == [[1, 2, 0, 0, 0, 0], [0] * 6]


def test_types_samples_and_step() -> None:
    batch = packed([span(1, 2, 3, 4, 5, 6, 7)], [span(1, 2, 3, 4, 5, 6, 7)], document_mask=True)
    for tensor in (batch.tokens, batch.labels, batch.positions, batch.document_ids, batch.samples):
        assert tensor is not None
        assert tensor.dtype == torch.int64
    assert batch.mask.dtype == torch.bool
    assert batch.samples.tolist() == [4, 5]
    assert batch.step == 7


def test_rows_and_to_keep_every_field() -> None:
    batch = packed([span(1, 2, 3, 4, 5, 6, 7)], [span(2, 3, 4, 5, 6, 7, 8)], [span(3, 4)], document_mask=True)
    part = batch.rows(1, 3).to(torch.device("cpu"))
    assert part.tokens.tolist() == batch.tokens[1:].tolist()
    assert part.samples.tolist() == [5, 6]
    assert part.document_ids is not None
    assert part.document_ids.shape == (2, 6)
    assert part.step == 7
    assert part.tokens.data_ptr() == batch.tokens[1:].data_ptr()


def test_eod_mask_loss_without_eod_is_refused() -> None:
    with pytest.raises(DataError, match="eod_mask_loss"):
        Packing(vocab_size=10, eod_mask_loss=True)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_context_parts_are_a_row_with_equal_causal_work(size: int) -> None:
    length = 24
    parts = [context_columns(rank, size=size, length=length) for rank in range(size)]
    owned = [[column for part in rank for column in part] for rank in parts]
    assert sorted(column for rank in owned for column in rank) == list(range(length))
    assert all(rank == sorted(rank) for rank in owned)
    assert len({sum(column + 1 for column in rank) for rank in owned}) == 1  # keys that a rank's queries see


def test_a_context_part_keeps_what_belongs_together() -> None:
    row = [span(*range(1, 14), starts=(3, 4, 9))]
    batch = packed(row, [span(*range(20, 33))], length=12, document_mask=True)
    fields = ("tokens", "labels", "mask", "positions")
    whole = torch.stack([getattr(batch, field).flatten() for field in fields], dim=1).tolist()
    seen = []
    for rank in range(3):
        part = batch.context_part(rank, 3)
        assert part.columns is not None
        assert part.columns.tolist() == [2 * rank, 2 * rank + 1, 10 - 2 * rank, 11 - 2 * rank]
        assert torch.equal(part.places, part.columns)
        assert part.tokens.tolist() == batch.tokens[:, part.columns].tolist()
        assert part.tokens.is_contiguous()
        assert all(getattr(part, field).shape == (2, 4) for field in fields)
        seen += torch.stack([getattr(part, field).flatten() for field in fields], dim=1).tolist()
        assert part.document_ids is batch.document_ids  # whole: other ranks' documents decide what is seen
        one = part.rows(1, 2)
        assert one.columns is part.columns
        assert one.document_ids is not None
        assert one.document_ids.shape == (1, 12)
        assert (part.samples.tolist(), part.step) == ([4, 5], 7)
    assert sorted(seen) == sorted(whole)


def test_rows_are_cut_once_and_evenly() -> None:
    batch = packed([span(*range(13))], length=12)
    assert batch.context_part(0, 1) is batch
    assert batch.places.tolist() == list(range(12))
    with pytest.raises(LayoutError, match="12 tokens") as caught:
        batch.context_part(0, 4)
    assert "2 x 4" in str(caught.value)
    with pytest.raises(LayoutError, match="twice"):
        batch.context_part(0, 2).context_part(0, 2)


def test_document_ids_stay_on_the_host() -> None:
    batch = packed([span(*range(7))], document_mask=True).context_part(1, 3).to(torch.device("meta"))
    assert batch.document_ids is not None
    assert batch.columns is not None
    assert batch.document_ids.device.type == "cpu"
    assert {x.device.type for x in (batch.tokens, batch.mask, batch.samples, batch.columns)} == {"meta"}


def test_what_stands_ahead_stops_where_a_document_or_a_span_ends() -> None:
    """Silent bugs 3 and T2: a shift of the packed row would predict the next document of this one."""
    row = [span(1, 2, 3, EOD, 11, 12, 13, starts=(4,)), span(21, 22, 23, 24)]
    for document_mask in (False, True):
        batch = packed(row, [span(1, 2, 3)], length=9, document_mask=document_mask, depth=2)
        near, far = batch.at_depth(1), batch.at_depth(2)
        assert batch.labels[0].tolist() == [2, 3, EOD, 11, 12, 13, 22, 23, 24]
        assert near.tokens.tolist() == [[2, 3, EOD, 0, 12, 0, 22, 23, 0], [2] + [0] * 8]
        assert near.labels.tolist() == [[3, EOD, 11, 0, 13, 0, 23, 24, 0], [3] + [0] * 8]
        assert near.mask.tolist() == [[label > 0 for label in labels] for labels in near.labels.tolist()]
        assert far.tokens.tolist() == [[3, EOD, 0, 0, 0, 0, 23, 0, 0], [0] * 9]
        assert far.labels.tolist() == [[EOD, 11, 0, 0, 0, 0, 24, 0, 0], [0] * 9]
        assert torch.equal(near.positions, batch.positions)
        assert near.document_ids is batch.document_ids


def test_a_label_ahead_counts_where_it_counts_as_the_next_token() -> None:
    """A conversation: answers alone count, whoever predicts them; and nobody predicts what follows an EOD."""
    answers = np.array([False, False, True, True, False, True])
    chat = Span(np.array([1, 2, 3, 4, 5, 6, 7], np.uint16), np.empty(0, np.int64), answers)
    batch = packed([chat], depth=3)
    for depth in (1, 2, 3):
        expected = answers[depth:].tolist() + [False] * depth
        assert batch.at_depth(depth).mask.tolist() == [expected]
    batch = packed([span(1, 2, EOD, 4, 5, 6, 7)], depth=1, eod_mask_loss=True)  # its start was not said
    assert batch.at_depth(1).mask.tolist() == [[True, False, True, True, True, False]]


def test_what_stands_ahead_was_looked_up_in_whole_rows() -> None:
    """Context parts and micro-batches are cut of it; a shift of what a rank has would be wrong at every cut."""
    batch = packed([span(*range(1, 14), starts=(7,))], [span(*range(20, 33))], length=12, depth=2)
    for rank in range(3):
        part = batch.context_part(rank, 3)
        for depth in (1, 2):
            whole, cut = batch.at_depth(depth), part.at_depth(depth)
            for field in ("tokens", "labels", "mask"):
                assert torch.equal(getattr(cut, field), getattr(whole, field)[:, part.places]), field
                one = getattr(part.rows(1, 2).to(torch.device("cpu")).at_depth(depth), field)
                assert torch.equal(one, getattr(cut, field)[1:])
            assert cut.columns is part.columns
    with pytest.raises(DataError, match="2 places ahead"):
        batch.at_depth(3)
    with pytest.raises(DataError, match="multi-token prediction"):
        packed([span(1, 2)]).at_depth(1)


def test_more_places_than_columns_hold_nothing() -> None:
    batch = packed([span(1, 2, 3)], length=2, depth=4)
    assert batch.at_depth(1).labels.tolist() == [[3, 0]]
    assert not any(batch.at_depth(depth).mask.any() for depth in (2, 3, 4))
