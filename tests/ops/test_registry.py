"""The choice of an implementation: order, predicates, force, and what is said."""

from __future__ import annotations

import logging

import pytest
import torch

from megads.errors import ConfigError
from megads.ops.norm import RMS_NORM, rms_norm
from megads.ops.registry import Implementation, Op, force

OP = Op(
    "twice",
    (
        Implementation("odd_only", lambda n: ("odd_only", 2 * n), lambda n: n % 2 == 1),
        Implementation("any", lambda n: ("any", 2 * n), lambda n: True),
    ),
)


def test_the_first_that_accepts_runs() -> None:
    assert OP(3) == ("odd_only", 6)
    assert OP(4) == ("any", 8)


def test_force_holds_inside_only_and_nests() -> None:
    with force("twice", "any"):
        assert OP(3)[0] == "any"
        with force("twice", "odd_only"), force("another", "x"):
            assert OP(3)[0] == "odd_only"
        assert OP(3)[0] == "any"
    assert OP(3)[0] == "odd_only"


def test_a_forced_one_that_does_not_accept_is_refused() -> None:
    with force("twice", "odd_only"), pytest.raises(ConfigError, match="forced odd_only"):
        OP(4)
    with force("twice", "absent"), pytest.raises(ConfigError, match="odd_only, any"):
        OP(4)


def test_force_ends_with_an_error_inside() -> None:
    with pytest.raises(KeyError), force("twice", "any"):
        raise KeyError
    assert OP(3)[0] == "odd_only"


def test_the_choice_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    told = Op("told", OP.implementations)
    logging.getLogger("megads").propagate = True
    with caplog.at_level(logging.INFO, logger="megads.ops"):
        told(1), told(3), told(2)
    assert [r.getMessage() for r in caplog.records] == ["op told: odd_only", "op told: any"]


def test_the_choice_is_made_while_compiling() -> None:
    def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, weight, eps=1e-5)

    x, weight = torch.randn(4, 8, requires_grad=True), torch.randn(8)
    compiled = torch.compile(norm, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, weight), norm(x, weight))
    assert RMS_NORM.pick(x, weight, 1e-5).name == "aten"
