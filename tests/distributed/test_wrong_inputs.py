"""Wrong inputs through the real command lines: exit code 2 and one message: what, found, allowed, what to do.

Every case breaks one thing in a copy of a home that works (the first test shows that it does). A wrong key of the
config alone is not asked here: tests/config does that.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.distributed.bench import Bench, assert_refused
from tests.distributed.job import command, commands, make_corpus, make_tokenizer


def test_the_bench_works(bench: Bench) -> None:
    for argv in (bench.train(), bench.evaluate(), bench.generate()):
        ended = command(bench.path, *argv)
        assert ended.code == 0, ended.errors
    assert [json.loads(line)["step"] for line in bench.metrics.splitlines()] == [1, 2, 3, 4, 5]


# A case breaks the bench and returns a command line. Its words must be in the message.
Case = Callable[[Bench], list[str]]


def missing_config(bench: Bench) -> list[str]:
    return ["train", "nowhere.yaml"]


def missing_corpus(bench: Bench) -> list[str]:
    return bench.train("data.train=data/absent")


def missing_valid_corpus(bench: Bench) -> list[str]:
    return bench.train("data.valid=data/absent")


def truncated_idx(bench: Bench) -> list[str]:
    os.truncate(bench.data / "train.idx", (bench.data / "train.idx").stat().st_size - 8)
    return bench.train()


def cut_header(bench: Bench) -> list[str]:
    os.truncate(bench.data / "train.idx", 20)
    return bench.train()


def longer_bin(bench: Bench) -> list[str]:
    with open(bench.data / "train.bin", "ab") as stream:
        stream.write(b"\0\0")
    return bench.train()


def shorter_bin(bench: Bench) -> list[str]:
    os.truncate(bench.data / "train.bin", (bench.data / "train.bin").stat().st_size - 2)
    return bench.train()


def strange_manifest(bench: Bench) -> list[str]:
    shutil.copy(bench.data / "valid.json", bench.data / "train.json")
    return bench.train()


def short_corpus(bench: Bench) -> list[str]:
    (bench.data / "short.txt").write_text("x\n")
    make_corpus(bench.data / "short", bench.data / "tokenizer.model", [bench.data / "short.txt"])
    return bench.train("data.train=data/short", run="fresh")


def other_tokenizer(bench: Bench) -> list[str]:
    return bench.train(f"data.tokenizer={bench.other_tokenizer()}")


def small_vocabulary(bench: Bench) -> list[str]:
    return bench.train("model.vocab=400", run="fresh")


def ids_outside_vocabulary(bench: Bench) -> list[str]:
    """A corpus without a manifest, as Megatron's own tool makes them."""
    (bench.data / "train.json").unlink()
    make_tokenizer(bench.data / "small.model", bench.data / "held_out.txt", size=330)
    return bench.train("data.tokenizer=data/small.model", "data.valid=null", run="fresh")


def missing_tokenizer(bench: Bench) -> list[str]:
    return bench.train("data.tokenizer=data/absent.model")


def text_as_tokenizer(bench: Bench) -> list[str]:
    (bench.data / "tokenizer.model").write_text("once upon a time")
    return bench.train()


def tokenizer_of_no_kind(bench: Bench) -> list[str]:
    return bench.train("data.tokenizer=data/held_out.txt")


def other_width(bench: Bench) -> list[str]:
    return bench.train("model.hidden=64")


def other_depth(bench: Bench) -> list[str]:
    return bench.train("model.layers=4")


def untied(bench: Bench) -> list[str]:
    return bench.train("model.tied=false")


def other_optimizer(bench: Bench) -> list[str]:
    return bench.train("optim.name=sgd")


def other_precision(bench: Bench) -> list[str]:
    return bench.train("optim.precision=fp64")


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def flipped_byte(bench: Bench) -> list[str]:
    flip(bench.step / "chunks-00000.bin")
    return bench.train()


def flipped_byte_at_evaluation(bench: Bench) -> list[str]:
    content = bytearray((bench.step / "chunks-00000.bin").read_bytes())
    content[0] ^= 1  # a weight: evaluation reads no moments
    (bench.step / "chunks-00000.bin").write_bytes(content)
    return bench.evaluate()


def cut_chunks(bench: Bench) -> list[str]:
    os.truncate(bench.step / "chunks-00000.bin", 1000)
    return bench.train()


def missing_chunks(bench: Bench) -> list[str]:
    (bench.step / "chunks-00000.bin").unlink()
    return bench.train()


def missing_manifest(bench: Bench) -> list[str]:
    (bench.step / "manifest.json").unlink()
    return bench.train()


def truncated_manifest(bench: Bench) -> list[str]:
    os.truncate(bench.step / "manifest.json", 500)
    return bench.train()


def flipped_manifest(bench: Bench) -> list[str]:
    flip(bench.step / "manifest.json")
    return bench.train()


def every_step_damaged(bench: Bench) -> list[str]:
    for step in bench.step.parent.iterdir():
        flip(step / "chunks-00000.bin")
    return bench.train("checkpoint.on_damage=previous")


def no_step_but_strangers(bench: Bench) -> list[str]:
    (bench.path / "fresh" / "checkpoints" / "epoch-1").mkdir(parents=True)
    return bench.train(run="fresh")


def must_without_steps(bench: Bench) -> list[str]:
    return bench.train("checkpoint.load=must", run="fresh")


def never_with_steps(bench: Bench) -> list[str]:
    return bench.train("checkpoint.load=never")


def absent_path(bench: Bench) -> list[str]:
    return bench.train("checkpoint.load=absent", run="fresh")


def path_beside_own_steps(bench: Bench) -> list[str]:
    shutil.copytree(bench.run, bench.path / "copy")
    return bench.train("checkpoint.load=copy")


def run_directory_is_a_file(bench: Bench) -> list[str]:
    (bench.path / "fresh").write_text("a file")
    return bench.train(run="fresh")


def run_directory_under_a_file(bench: Bench) -> list[str]:
    return bench.train(run="config.yaml/fresh")


def layout_larger_than_world(bench: Bench) -> list[str]:
    return bench.train("parallel.tensor=2")


def layout_larger_than_world_at_evaluation(bench: Bench) -> list[str]:
    return bench.evaluate("parallel.pipeline=2")


def too_many_epochs(bench: Bench) -> list[str]:
    return bench.train("data.train=[{path: data/train, max_epochs: 0.1}]", run="fresh")


def other_page(bench: Bench) -> list[str]:
    return bench.train("data.page=32")


def exchanged_corpus(bench: Bench) -> list[str]:
    make_corpus(bench.data / "train", bench.data / "tokenizer.model", [bench.data / "held_out.txt"])
    return bench.train()


def torn_metrics(bench: Bench) -> list[str]:
    with open(bench.run / "metrics.jsonl", "a") as stream:
        stream.write("not a record\n")
    return bench.train()


def evaluate_nothing(bench: Bench) -> list[str]:
    return bench.evaluate(checkpoint="absent")


def evaluate_data(bench: Bench) -> list[str]:
    return bench.evaluate(checkpoint="data")


def evaluate_missing_corpus(bench: Bench) -> list[str]:
    return bench.evaluate(data="absent")


def evaluate_corpus_of_other_tokenizer(bench: Bench) -> list[str]:
    make_corpus(bench.data / "strange", bench.path / bench.other_tokenizer(), [bench.data / "held_out.txt"])
    return bench.evaluate(data="strange")


def generate_nothing(bench: Bench) -> list[str]:
    return bench.generate(checkpoint="absent")


def generate_with_other_tokenizer(bench: Bench) -> list[str]:
    return bench.generate(f"data.tokenizer={bench.other_tokenizer()}")


def negative_temperature(bench: Bench) -> list[str]:
    return bench.generate("--temperature", "-1")


def temperature_that_is_no_number(bench: Bench) -> list[str]:
    return bench.generate("--temperature", "nan")


def top_p_above_one(bench: Bench) -> list[str]:
    return bench.generate("--top-p", "1.5")


def negative_number_of_tokens(bench: Bench) -> list[str]:
    return bench.generate("--tokens", "-1")


def seed_without_end(bench: Bench) -> list[str]:
    return bench.generate("--seed", str(2**70))


def empty_prompt(bench: Bench) -> list[str]:
    return bench.generate(prompt="")


def prompt_that_is_no_text(bench: Bench) -> list[str]:
    return bench.generate(prompt=os.fsdecode(b"\xff\xfe"))


def launch_without_config(bench: Bench) -> list[str]:
    return ["launch", "--nproc", "2", "--", "train", "nowhere.yaml"]


def launch_of_a_layout_that_does_not_fit(bench: Bench) -> list[str]:
    return ["launch", "--nproc", "3", "--", *bench.train("parallel.tensor=2")]


CASES: tuple[tuple[Case, tuple[str, ...]], ...] = (
    (missing_config, ("nowhere.yaml", "nothing there")),
    (missing_corpus, ("absent.",)),
    (missing_valid_corpus, ("absent.",)),
    (truncated_idx, ("train.idx",)),
    (cut_header, ("train.idx",)),
    (longer_bin, ("train.bin",)),
    (shorter_bin, ("train.bin",)),
    (strange_manifest, ("train.json",)),
    (short_corpus, ("short", "at least 17")),
    (other_tokenizer, ("data/train", "another tokenizer", "do:")),
    (small_vocabulary, ("model.vocab", "400", "at least 401")),
    (ids_outside_vocabulary, ("train.bin", "0..329")),
    (missing_tokenizer, ("absent.model",)),
    (text_as_tokenizer, ("tokenizer.model",)),
    (tokenizer_of_no_kind, ("held_out.txt",)),
    (other_width, ("step-00000003", "another model", "401x32", "401x64", "do:")),
    (other_depth, ("another model", "not in the checkpoint", "layers.3.")),
    (untied, ("another model", "head.output.weight")),
    (other_optimizer, ("another model", "optim/exp_avg/")),
    (other_precision, ("another model", "float32", "float64")),
    (flipped_byte, ("step-00000003/chunks-00000.bin", "tensor ", "step-00000002", "do:")),
    (flipped_byte_at_evaluation, ("step-00000003/chunks-00000.bin", "tensor model/")),
    (cut_chunks, ("step-00000003/chunks-00000.bin", "1000 bytes", "step-00000002")),
    (missing_chunks, ("step-00000003/chunks-00000.bin", "missing", "step-00000002")),
    (missing_manifest, ("step-00000003/manifest.json", "step-00000002")),
    (truncated_manifest, ("step-00000003/manifest.json", "step-00000002")),
    (flipped_manifest, ("step-00000003/manifest.json", "step-00000002")),
    (every_step_damaged, ("every step is damaged", "step-00000001/chunks", "step-00000003/chunks")),
    (no_step_but_strangers, ("fresh/checkpoints", "epoch-1", "checkpoint.load")),
    (must_without_steps, ("fresh/checkpoints", "checkpoint.load=must")),
    (never_with_steps, ("checkpoint.load=never", "step-00000003", "do:")),
    (absent_path, ("checkpoint.load=", "absent", "nothing there")),
    (path_beside_own_steps, ("checkpoint.load=", "copy", "step-00000003")),
    (run_directory_is_a_file, ("fresh", "do:")),
    (run_directory_under_a_file, ("config.yaml/fresh", "do:")),
    (layout_larger_than_world, ("parallel.tensor", "2 x 1 = 2 ranks")),
    (layout_larger_than_world_at_evaluation, ("parallel.pipeline", "1 x 2 = 2 ranks")),
    (too_many_epochs, ("data/train", "max_epochs", "0.1 epochs")),
    (other_page, ("data.page", "32", "16")),
    (exchanged_corpus, ("data/train",)),
    (torn_metrics, ("metrics.jsonl", "not a record")),
    (evaluate_nothing, ("absent",)),
    (evaluate_data, ("data",)),
    (evaluate_missing_corpus, ("absent.",)),
    (evaluate_corpus_of_other_tokenizer, ("strange", "another tokenizer")),
    (generate_nothing, ("absent",)),
    (generate_with_other_tokenizer, ("other.model", "data.tokenizer")),
    (negative_temperature, ("--temperature", "-1")),
    (temperature_that_is_no_number, ("--temperature", "nan")),
    (top_p_above_one, ("--top-p", "1.5")),
    (negative_number_of_tokens, ("--tokens", "-1")),
    (seed_without_end, ("--seed", str(2**70))),
    (empty_prompt, ("--prompt",)),
    (prompt_that_is_no_text, ("--prompt",)),
    (launch_without_config, ("nowhere.yaml",)),
    (launch_of_a_layout_that_does_not_fit, ("3 ranks", "parallel.tensor")),
)


@pytest.mark.parametrize(("case", "words"), CASES, ids=[case.__name__ for case, _ in CASES])
def test_wrong_input(bench: Bench, case: Case, words: tuple[str, ...]) -> None:
    argv = case(bench)
    before = bench.metrics
    ended = command(bench.path, *argv)
    assert_refused(ended, *words)
    assert bench.metrics == before
    assert not (bench.path / "fresh" / "metrics.jsonl").exists()


def test_a_misspelt_verb_is_refused_with_the_nearest_one(tmp_path: Path) -> None:
    ended = command(tmp_path, "trian", "config.yaml")
    assert ended.code == 2
    assert "did you mean train?" in ended.errors


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"RANK": "zero", "WORLD_SIZE": "1"}, ("RANK", "'zero'")),
        ({"RANK": "0", "WORLD_SIZE": "many"}, ("WORLD_SIZE", "'many'")),
        ({"RANK": "0"}, ("WORLD_SIZE", "nothing")),
        ({"WORLD_SIZE": "2"}, ("RANK", "nothing")),
        ({"RANK": "2", "WORLD_SIZE": "2"}, ("RANK=2", "WORLD_SIZE=2")),
        ({"RANK": "0", "WORLD_SIZE": "0"}, ("RANK=0", "WORLD_SIZE=0")),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "-1"}, ("LOCAL_RANK", "'-1'")),
        ({"RANK": "0", "WORLD_SIZE": "2"}, ("MASTER_", "nothing")),
        (
            {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "x"},
            ("MASTER_PORT", "'x'"),
        ),
    ],
    ids=lambda value: " ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_rubbish_from_a_launcher(bench: Bench, environment: dict[str, str], words: tuple[str, ...]) -> None:
    ended = command(bench.path, *bench.train(), environment=environment)
    assert_refused(ended, *words)


def test_no_space_is_told_before_training(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_bavail=3, f_frsize=4096))
    before = bench.metrics
    assert_refused(command(bench.path, *bench.train()), "checkpoints", "12,288 bytes free", "run.dir")
    assert bench.metrics == before


def test_damage_is_passed_over_where_the_config_says_so(bench: Bench) -> None:
    flip(bench.step / "chunks-00000.bin")
    ended = command(bench.path, *bench.train("checkpoint.on_damage=previous"))
    assert ended.code == 0, ended.errors
    assert "goes on from" in ended.errors
    assert "step-00000003/chunks-00000.bin: damaged" in ended.errors
    assert (bench.step.parent / "set-aside-step-00000003").is_dir()
    assert [json.loads(line)["step"] for line in bench.metrics.splitlines()] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("change", ["run.seed=8", "optim.lr=0.002", "data.tokenizer=data/same.model"])
def test_ranks_that_were_told_different_things(bench: Bench, change: str) -> None:
    shutil.copy(bench.data / "tokenizer.model", bench.data / "same.model")
    before = bench.metrics
    for ended in commands((bench.path, bench.train()), (bench.path, bench.train(change))):
        key, value = change.split("=")
        assert_refused(ended, f"rank 1 differs from rank 0: {key}", f"{value} on rank 1", "do:")
    assert bench.metrics == before


def test_ranks_that_find_different_files(bench: Bench) -> None:
    """A host with a stale copy of the corpus under the same path."""
    stale = bench.path / "stale"
    shutil.copytree(bench.data, stale / "data")
    shutil.copy(bench.path / "config.yaml", stale)
    make_corpus(stale / "data" / "train", bench.data / "tokenizer.model", [bench.data / "held_out.txt"])
    for ended in commands((bench.path, bench.train()), (stale, bench.train())):
        assert_refused(ended, "rank 1 differs from rank 0", "fingerprint of data/train")


def test_a_wrong_input_that_only_ranks_meet_is_told_once_by_the_launcher(bench: Bench) -> None:
    argv = ["launch", "--nproc", "2", "--", *bench.train("checkpoint.load=never")]
    assert_refused(command(bench.path, *argv), "rank ", "checkpoint.load=never")


def test_the_launcher_opens_the_data_before_there_are_ranks(bench: Bench) -> None:
    argv = ["launch", "--nproc", "2", "--", *bench.train("data.train=data/absent")]
    ended = command(bench.path, *argv)
    assert_refused(ended, "absent.")
    assert "rank " not in ended.errors
