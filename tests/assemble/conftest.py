"""Fixtures of the conversion tests: one tokenizer of each kind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.assemble.models import make_huggingface, make_sentencepiece

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def sp_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sentencepiece(tmp_path_factory.mktemp("sp"))


@pytest.fixture(scope="session")
def hf_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_huggingface(tmp_path_factory.mktemp("hf"))
