"""A run with multi-token prediction from the command line: metrics, resume, another layout, evaluation, generation."""

from __future__ import annotations

import json

from tests.distributed.job import Home, Layout, commands, train

MTP = ("model.mtp_layers=2", "model.mtp_weight=[{tokens: 0, weight: 0.5}, {tokens: 300, weight: 0.1}]")


def metrics(home: Home, run: str) -> list[dict[str, float]]:
    lines = (home.path / run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_a_run_goes_on_and_is_judged_without_it(home: Home) -> None:
    options = ("optim.precision=fp64", *MTP)
    train(home, "ahead", Layout(pipeline=2), "run.stop_after=3", *options)
    train(home, "ahead", Layout(tensor=2), "run.stop_after=6", *options)
    train(home, "ahead-whole", Layout(), "run.stop_after=6", *options)
    parted, whole = metrics(home, "ahead"), metrics(home, "ahead-whole")
    assert [row["step"] for row in parted] == [1, 2, 3, 4, 5, 6]
    for a, b in zip(parted, whole, strict=True):
        assert abs(a["loss"] - b["loss"]) < 1e-9
        assert abs(a["mtp_loss"] - b["mtp_loss"]) < 1e-9
        assert 1.0 < a["mtp_loss"] < 20.0
    said = [
        commands(
            (
                home.path,
                ["generate", "ahead", "--prompt", "import ", "--tokens", "9", "--temperature", "0", *more],
            )
        )
        for more in ([], ["--no-cache"])
    ]
    assert said[0][0].code == said[1][0].code == 0, said[0][0].errors
    assert said[0][0].said == said[1][0].said
    (found,) = commands((home.path, ["evaluate", "ahead", "--data", "data/valid", "--json"]))
    assert found.code == 0, found.errors
    assert json.loads(found.said)["step"] == 6
