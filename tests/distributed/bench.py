"""A home that works, to be broken by a test, and what a refusal looks like."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tests.distributed.job import Ended, make_tokenizer


@dataclass(frozen=True)
class Bench:
    """A copy of the trained home for one case, and command lines that would work in it."""

    path: Path

    @property
    def data(self) -> Path:
        return self.path / "data"

    @property
    def run(self) -> Path:
        return self.path / "run"

    @property
    def step(self) -> Path:
        """The newest step."""
        return self.run / "checkpoints" / "step-00000003"

    @property
    def metrics(self) -> str:
        return (self.run / "metrics.jsonl").read_text()

    def train(self, *overrides: str, run: str = "run") -> list[str]:
        return ["train", "config.yaml", f"run.dir={run}", "run.stop_after=5", *overrides]

    def evaluate(self, *overrides: str, checkpoint: str = "run", data: str = "valid") -> list[str]:
        return ["evaluate", checkpoint, "--data", f"data/{data}", *overrides]

    def generate(self, *arguments: str, checkpoint: str = "run", prompt: str = "def ") -> list[str]:
        return ["generate", checkpoint, "--prompt", prompt, "--tokens", "3", *arguments]

    def other_tokenizer(self) -> str:
        """A tokenizer of the same size that is not that of the corpora."""
        make_tokenizer(self.data / "other.model", self.data / "held_out.txt", size=401)
        return "data/other.model"


def assert_refused(ended: Ended, *words: str) -> None:
    """Exit code 2 and one message, with the key or file and the three or four parts of an error."""
    text = ended.errors
    assert ended.code == 2, text
    assert "Traceback" not in text + ended.said
    assert text.count("  found:   ") == 1, text
    assert text.count("  allowed: ") == 1, text
    assert text.count("  do:      ") <= 1, text
    for word in words:
        assert word in text, text
