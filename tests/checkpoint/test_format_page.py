"""docs/checkpoint_format.md tells the truth: its reader, run as it stands there, reads what megads wrote."""

from __future__ import annotations

import random
import re
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megads.checkpoint.manifest import FORMAT, ITEM_SIZES, MAX_CHUNK_BYTES, VERSION
from megads.checkpoint.save import save
from megads.parallel.control import Control
from tests.checkpoint.samples import bits, random_cut, small_state, whole
from tests.checkpoint.threads import run_threads

PAGE = (Path(__file__).parents[2] / "docs/checkpoint_format.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def read_tensor(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path, str], np.ndarray[Any, Any]]:
    """The function of the page's second example."""
    _, code = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    path = tmp_path_factory.mktemp("page") / "reader.py"
    path.write_text(code, encoding="utf-8")
    names = runpy.run_path(str(path))
    function: Callable[[Path, str], np.ndarray[Any, Any]] = names["read_tensor"]
    return function


def test_the_pages_reader_reads_every_bit(
    tmp_path: Path, read_tensor: Callable[[Path, str], np.ndarray[Any, Any]]
) -> None:
    state = small_state(3)
    cut = random_cut(state, 3, random.Random(5))

    def one(control: Control) -> Path:
        return save(tmp_path, 7, pieces=cut[control.rank], objects={}, control=control)

    step = run_threads(3, one)[0]
    for name, tensor in state.items():
        assert read_tensor(step, name).tobytes() == bits(tensor), name
    file = sorted(step.glob("chunks-*.bin"))[0]
    data = bytearray(file.read_bytes())
    data[:] = bytes(len(data))
    file.write_bytes(data)
    with pytest.raises(AssertionError, match="damaged"):
        for name in state:
            read_tensor(step, name)


def test_the_librarys_example_runs(tmp_path: Path) -> None:
    table = torch.randn(10, 4)
    state = {"model/embedding.word.weight": table}
    save(tmp_path / "runs/quickstart", 3, pieces=whole(state), objects={"config": ""}, control=Control(0, 1))
    code, _ = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    path = tmp_path / "example.py"
    path.write_text(code.replace("runs/quickstart", str(tmp_path / "runs/quickstart")), encoding="utf-8")
    names = runpy.run_path(str(path))
    assert torch.equal(names["weight"], table) and torch.equal(names["first"], table[:8])


def test_the_page_names_what_the_format_has() -> None:
    assert f'`"{FORMAT}"`, `{VERSION}`' in PAGE
    assert f"at most {MAX_CHUNK_BYTES >> 20} MiB" in PAGE
    assert all(re.search(rf"\b{name}\b", PAGE) for name in ITEM_SIZES)
