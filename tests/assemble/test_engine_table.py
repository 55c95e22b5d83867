"""`assemble/engine_table.py`: README.md shows what the cross-checks say, and rows hold exactly the legal choices."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest

from megads.assemble import engine_table
from megads.assemble.engine_table import (
    BEGIN,
    END,
    ENGINES,
    EXPERTS,
    PIPELINES,
    PRECISIONS,
    Choice,
    markdown,
    replace_block,
    rows,
)

README = Path(__file__).parents[2] / "README.md"


def test_readme_shows_the_table() -> None:
    text = README.read_text(encoding="utf-8")
    assert text.count(BEGIN) == text.count(END) == 1
    assert markdown() in text, "the rules changed: python tools/engine_table.py --write"
    assert replace_block(text) == text


def test_an_old_table_is_replaced_and_nothing_else() -> None:
    assert replace_block(f"a\n{BEGIN}\n| old |\n{END}\nb\n") == f"a\n{markdown()}\nb\n"


def test_rows_hold_the_legal_choices_once() -> None:
    listed = [choice for row in rows() for choice in row.choices]
    assert len(set(listed)) == len(listed)
    for engine, offloads in ENGINES.items():
        for rest in product(range(4), offloads, PRECISIONS, PIPELINES, EXPERTS):
            choice = Choice(engine, *rest)
            assert choice.is_legal == (choice in listed), choice


def test_what_is_no_product_is_not_shown_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    legal = engine_table.findings
    monkeypatch.setattr(
        engine_table,
        "findings",
        lambda config, size: (
            ("no",) if (config.optim.precision, config.model.experts) == ("bf16", 4) else legal(config, size)
        ),
    )
    with pytest.raises(AssertionError, match="no product"):
        rows()
