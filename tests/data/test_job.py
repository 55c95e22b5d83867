"""The same bytes whoever makes the parts, however they are cut, and whatever stops the work in between."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megads.data import dedup, job, part, shuffle
from megads.data.corpus import Corpus
from megads.data.job import deal_units
from megads.data.preprocess import main, preprocess
from megads.data.preprocess_options import Options
from megads.data.record import RecordOptions, Unit
from megads.data.tokenizer import open_tokenizer

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "preprocess_data.py"
SUFFIXES = ("bin", "idx", "src", "json", "mask", "bad.jsonl")
Jsonl = Callable[..., Path]


def contents(prefix: Path | str) -> dict[str, bytes]:
    """All files of a corpus, and of the held-out part where there is one."""
    names = [f"{prefix}{part}.{suffix}" for part in ("", "_valid") for suffix in SUFFIXES]
    return {name.removeprefix(str(prefix)): Path(name).read_bytes() for name in names if Path(name).exists()}


def read_indexed(prefix: Path | str) -> list[list[int]]:
    """The documents of a .bin/.idx pair, by a reader that shares no line with megads'."""
    index = Path(f"{prefix}.idx").read_bytes()
    assert index[:9] == b"MMIDIDX\x00\x00"
    version, code, num_sequences, num_offsets = struct.unpack("<QBQQ", index[9:34])
    assert (version, num_offsets) == (1, num_sequences + 1)
    size, letter = {8: (2, "H"), 4: (4, "i")}[code]
    lengths = struct.unpack(f"<{num_sequences}i", index[34 : 34 + 4 * num_sequences])
    pointers = struct.unpack(f"<{num_sequences}q", index[34 + 4 * num_sequences : 34 + 12 * num_sequences])
    documents = struct.unpack(f"<{num_offsets}q", index[34 + 12 * num_sequences :])
    assert documents == tuple(range(num_offsets))
    content = Path(f"{prefix}.bin").read_bytes()
    assert pointers[-1] + lengths[-1] * size == len(content)
    return [
        list(struct.unpack_from(f"<{length}{letter}", content, pointer))
        for length, pointer in zip(lengths, pointers, strict=True)
    ]


def command(inputs: Path, tokenizer: Path, prefix: Path, *options: str) -> list[str]:
    argv = ["--input", str(inputs), "--tokenizer", str(tokenizer), "--output-prefix", str(prefix)]
    return [*argv, "--append-eod", "--engine", open_tokenizer(tokenizer).library, *options]


lines = st.one_of(
    st.text(st.characters(exclude_categories=("Cs",)), max_size=40).map(
        lambda text: json.dumps({"text": text})
    ),
    st.sampled_from(["twice", "again and again", ""]).map(lambda text: json.dumps({"text": text})),
    st.sampled_from(["", "  ", "{", '{"no": 1}']),
)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    files=st.lists(st.lists(lines, max_size=12), min_size=1, max_size=3),
    cuts=st.lists(
        st.tuples(st.integers(4, 400), st.integers(20, 300), st.sampled_from([1, 2, 5])),
        min_size=2,
        max_size=2,
    ),
    seed=st.none() | st.integers(0, 2**32),
    dedup_too=st.booleans(),
)
def test_any_cut_and_any_worker_count_give_the_same_documents(
    files: list[list[str]],
    cuts: list[tuple[int, int, int]],
    seed: int | None,
    dedup_too: bool,
    sp_model: Path,
    tmp_path: Path,
) -> None:
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    expected, seen = [], set()
    tokenizer = open_tokenizer(sp_model)
    for number, file in enumerate(files):
        (tmp_path / f"{number}.jsonl").write_text("".join(f"{line}\n" for line in file), encoding="utf-8")
        for line in file:
            text = json.loads(line).get("text", "") if line.startswith('{"') else ""
            if text and not (dedup_too and text in seen):
                expected.append([*tokenizer.encode_batch([text])[0].tolist(), tokenizer.eod])
            seen.add(text)
    made = []
    for number, (unit_bytes, block_bytes, workers) in enumerate(cuts):
        options = Options(
            inputs=tuple(str(tmp_path / f"{i}.jsonl") for i in range(len(files))),
            tokenizer=str(sp_model),
            output_prefix=str(tmp_path / f"c{number}"),
            append_eod=True,
            workers=workers,
            records=RecordOptions(block_bytes=block_bytes),
            skip_bad=True,
            engine="sentencepiece",
            dedup=dedup_too,
            shuffle_seed=seed,
            unit_bytes=unit_bytes,
        )
        if not expected:
            with pytest.raises(Exception, match="no document has any text"):
                preprocess(options)
            return
        with mock.patch.object(job, "WORKERS_PER_UNIT", 2):  # several units are read at once
            preprocess(options)
        made.append(contents(options.output_prefix))
        documents = read_indexed(options.output_prefix)
        if seed is None:
            assert documents == expected
        assert sorted(documents) == sorted(expected)
    assert made[0] == made[1]


@pytest.fixture
def many(jsonl: Jsonl, sentences: list[str]) -> Path:
    """A file of many units, with texts that come again."""
    return jsonl(
        "many.jsonl", [f"{number}: {sentences[number % 40]}" for number in range(1200)] + sentences[:40] * 3
    )


OPTIONS = (
    "--unit-bytes",
    "1000",
    "--dedup",
    "--shuffle-seed",
    "3",
    "--valid-fraction",
    "0.2",
    "--workers",
    "2",
)


def test_three_kills_change_nothing(sp_model: Path, many: Path, tmp_path: Path) -> None:
    """kill -9 at random moments, the last while parts are merged; each run goes on, and the bytes are the same."""
    assert main(command(many, sp_model, tmp_path / "whole", *OPTIONS)) == 0
    rng = random.Random(4)
    parts = tmp_path / "c.parts"
    killed, done = 0, 0
    goals = [rng.randrange(2, 30), rng.randrange(31, 70), 10_000]
    for goal in goals:
        process = subprocess.Popen(
            [sys.executable, str(TOOL), *command(many, sp_model, tmp_path / "c", *OPTIONS)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        while process.poll() is None:
            found = len(list(parts.glob("*.part"))) if parts.is_dir() else 0
            if found >= goal or (goal == goals[-1] and Path(f"{tmp_path}/c.bin.tmp").exists()):
                process.send_signal(signal.SIGKILL)
            time.sleep(0.001)
        assert process.stderr is not None
        message = process.stderr.read().decode()
        assert f"going on: {done} of" in message if done else "going on" not in message
        killed += process.returncode == -signal.SIGKILL
        done = len(list(parts.glob("*.part")))
        assert not Path(f"{tmp_path}/c.idx").exists()
    assert killed == 3
    assert main(command(many, sp_model, tmp_path / "c", *OPTIONS)) == 0
    assert contents(tmp_path / "c") == contents(tmp_path / "whole")
    assert not parts.exists()


def test_shards_in_any_order_and_the_last_one_merges(
    sp_model: Path, many: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(many, sp_model, tmp_path / "whole", *OPTIONS)) == 0
    for number in (2, 0, 1):
        assert not Path(f"{tmp_path}/c.idx").exists()
        capsys.readouterr()
        assert main(command(many, sp_model, tmp_path / "c", *OPTIONS, "--shard", f"{number}/3")) == 0
        said = capsys.readouterr().out
        assert ("parts are not there yet" in said) == (number != 1)
    assert contents(tmp_path / "c") == contents(tmp_path / "whole")
    assert (
        main(command(many, sp_model, tmp_path / "c", *OPTIONS, "--shard", "0/3")) == 0
    )  # requeued by mistake
    assert "the corpus is there already" in capsys.readouterr().err
    assert not (tmp_path / "c.parts").exists()


def test_a_dead_task_is_made_up_for_by_the_plain_command(sp_model: Path, many: Path, tmp_path: Path) -> None:
    assert main(command(many, sp_model, tmp_path / "whole", *OPTIONS)) == 0
    assert main(command(many, sp_model, tmp_path / "c", *OPTIONS, "--shard", "1/2")) == 0
    assert main(command(many, sp_model, tmp_path / "c", *OPTIONS)) == 0
    assert contents(tmp_path / "c") == contents(tmp_path / "whole")


def test_tasks_that_want_different_corpora_are_refused(
    sp_model: Path, many: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(many, sp_model, tmp_path / "c", *OPTIONS, "--shard", "1/2")) == 0
    other = ("--shuffle-seed", "4", "--shard", "0/2")
    assert main(command(many, sp_model, tmp_path / "c", *OPTIONS, *other)) == 2
    assert "found:   shuffle_seed 3\n  allowed: shuffle_seed 4 (this command)" in capsys.readouterr().err
    assert not (tmp_path / "c.idx").exists()


def test_two_ranks_of_mpi(sp_model: Path, many: Path, tmp_path: Path) -> None:
    mpiexec = shutil.which(
        "mpiexec", path=os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    )
    if find_spec("mpi4py") is None or mpiexec is None:
        pytest.skip('no MPI here: pip install "megads[mpi]"')
    assert main(command(many, sp_model, tmp_path / "whole", *OPTIONS)) == 0
    start = [mpiexec, "-n", "2", sys.executable, "-m", "mpi4py", str(TOOL), "--mpi"]
    made = subprocess.run(
        [*start, *command(many, sp_model, tmp_path / "c", *OPTIONS)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert made.returncode == 0, made.stderr
    assert made.stdout.count("next: ") == made.stderr.count("engine: ") == 1
    assert contents(tmp_path / "c") == contents(tmp_path / "whole")
    with open(many, "a") as file:
        file.write("{\n")
    failed = subprocess.run(
        [*start, *command(many, sp_model, tmp_path / "d", *OPTIONS)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert failed.returncode != 0
    assert "many.jsonl:1321" in failed.stderr
    assert "Traceback" not in failed.stderr


def stop_after(num_parts: int) -> mock._patch[object]:
    """A disk that is full once `num_parts` parts are there."""
    left = [num_parts]
    replace = os.replace

    def limited(source: Path, target: Path) -> None:
        if str(target).endswith(".part"):
            left[0] -= 1
            if left[0] < 0:
                raise OSError(28, "No space left on device", str(target))
        replace(source, target)

    return mock.patch.object(part.os, "replace", limited)


def test_other_options_do_not_mix_with_finished_parts(
    sp_model: Path, many: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with stop_after(5):
        assert main(command(many, sp_model, tmp_path / "c", *OPTIONS)) == 1
    assert main(command(many, sp_model, tmp_path / "c", *OPTIONS, "--min-bytes", "7")) == 2
    message = capsys.readouterr().err
    assert "parts of a run with other options" in message
    assert "min_bytes 0" in message
    assert "min_bytes 7 (this command)" in message
    assert main(command(many, sp_model, tmp_path / "c", *OPTIONS[:2])) == 2
    assert "dedup or valid_fraction" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "c.parts")
    assert main(command(many, sp_model, tmp_path / "c", *OPTIONS, "--min-bytes", "7")) == 0


def test_only_parts_of_a_repaired_file_are_made_again(
    sp_model: Path, jsonl: Jsonl, sentences: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").mkdir()
    jsonl("in/a.jsonl", sentences[:100])
    bad = jsonl("in/b.jsonl", sentences[100:110])
    good = bad.read_bytes()
    bad.write_bytes(good + b"{\n")
    assert main(command(tmp_path / "in", sp_model, tmp_path / "c")) == 2
    assert "b.jsonl:11" in capsys.readouterr().err
    bad.write_bytes(good)
    assert main(command(tmp_path / "in", sp_model, tmp_path / "c")) == 0
    assert "going on: 1 of 2 parts are there" in capsys.readouterr().err
    assert main(command(tmp_path / "in", sp_model, tmp_path / "d")) == 0
    assert contents(tmp_path / "c") == contents(tmp_path / "d")


def test_a_damaged_part_is_found_and_made_again(
    sp_model: Path, many: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(many, sp_model, tmp_path / "whole", *OPTIONS)) == 0
    for place in (60, -50):  # in the tokens; in the facts
        with stop_after(20):
            assert main(command(many, sp_model, tmp_path / "c", *OPTIONS)) == 1
        victim = sorted((tmp_path / "c.parts").glob("*.part"))[3]
        content = bytearray(victim.read_bytes())
        content[place] ^= 1
        victim.write_bytes(content)
        capsys.readouterr()
        code = main(command(many, sp_model, tmp_path / "c", *OPTIONS))
        if place > 0:
            assert code == 2
            assert f"{victim}: damaged, and removed" in capsys.readouterr().err
            assert not Path(f"{tmp_path}/c.idx").exists()
            assert main(command(many, sp_model, tmp_path / "c", *OPTIONS)) == 0
        assert contents(tmp_path / "c") == contents(tmp_path / "whole")
        for suffix in ("idx", "json"):
            Path(f"{tmp_path}/c.{suffix}").unlink()


def test_the_same_command_finds_its_work_done_until_an_input_changes(
    sp_model: Path, many: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(many, sp_model, tmp_path / "c")) == 0
    made = os.stat(f"{tmp_path}/c.bin").st_mtime_ns
    capsys.readouterr()
    assert main(command(many, sp_model, tmp_path / "c")) == 0
    said = capsys.readouterr()
    assert "the corpus is there already" in said.err
    assert "next: " in said.out
    assert os.stat(f"{tmp_path}/c.bin").st_mtime_ns == made
    many.write_bytes(many.read_bytes().replace(b"quick", b"brown", 1))  # as long as before
    assert main(command(many, sp_model, tmp_path / "c")) == 0
    assert "already" not in capsys.readouterr().err
    assert os.stat(f"{tmp_path}/c.bin").st_mtime_ns != made


def test_an_input_that_grows_meanwhile_is_refused(
    sp_model: Path, many: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    read = part.read_unit

    def growing(*args: object, **kwargs: object) -> object:
        with open(many, "a") as file:
            file.write(json.dumps({"text": "late"}) + "\n")
        return read(*args, **kwargs)  # type: ignore[arg-type]

    with mock.patch.object(part, "read_unit", growing):
        assert main(command(many, sp_model, tmp_path / "c")) == 2
    assert "many.jsonl: the file was changed while the corpus was made" in capsys.readouterr().err
    assert not Path(f"{tmp_path}/c.idx").exists()


def test_a_second_process_on_the_same_output_is_refused(
    sp_model: Path, many: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.parts").mkdir()
    code = (
        f"import fcntl, os, time; f = os.open({str(tmp_path / 'c.parts' / 'merge.lock')!r}, os.O_RDWR | os.O_CREAT);"
        " fcntl.flock(f, fcntl.LOCK_EX); print('held', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    try:
        assert other.stdout is not None
        other.stdout.readline()
        assert main(command(many, sp_model, tmp_path / "c")) == 2
        assert "another process is making this corpus" in capsys.readouterr().err
    finally:
        other.kill()
        other.wait()
    assert main(command(many, sp_model, tmp_path / "c")) == 0


def test_standard_input_gives_the_same_corpus(sp_model: Path, many: Path, tmp_path: Path) -> None:
    assert main(command(many, sp_model, tmp_path / "file")) == 0
    argv = [sys.executable, str(TOOL), *command(Path("-"), sp_model, tmp_path / "c")]
    subprocess.run(argv, stdin=open(many), check=True, capture_output=True)  # noqa: SIM115
    for suffix in ("bin", "idx"):
        assert Path(f"{tmp_path}/c.{suffix}").read_bytes() == Path(f"{tmp_path}/file.{suffix}").read_bytes()
    assert not (tmp_path / "c.parts").exists()
    empty = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    assert empty.returncode == 2
    assert "no document has any text" in empty.stderr
    assert not (tmp_path / "c.parts").exists()  # nobody can go on with what came that way
    shared = subprocess.run(
        [*argv, "--shard", "0/2"], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    assert shared.returncode == 2
    assert "standard input cannot be shared" in shared.stderr


def test_units_are_dealt_once_and_evenly() -> None:
    rng = random.Random(1)
    units = [Unit(i, 0, 1, rng.randrange(1, 1000)) for i in range(200)]
    shares = [deal_units(units, shard=shard, num_shards=7) for shard in range(7)]
    assert sorted((u for share in shares for u in share), key=lambda u: u.file) == units
    sizes = [sum(u.size for u in share) for share in shares]
    assert max(sizes) - min(sizes) <= 1000


def keys_of(values: Sequence[int]) -> np.ndarray:
    return np.stack([np.array(values, dtype=np.uint64) % 3, np.array(values, dtype=np.uint64)], axis=1)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pieces=st.lists(st.lists(st.integers(0, 12), max_size=9), max_size=8))
def test_all_but_the_first_of_equal_keys_are_duplicates(pieces: list[list[int]], tmp_path: Path) -> None:
    flat = [value for piece in pieces for value in piece]
    first = [value not in flat[:i] for i, value in enumerate(flat)]
    shutil.rmtree(tmp_path / "d", ignore_errors=True)
    with mock.patch.object(dedup, "RANGE", 4), mock.patch.object(dedup, "BUCKET_BYTES", 100):
        duplicates = dedup.Duplicates(tmp_path / "d", len(flat))
        assert duplicates.find(map(keys_of, pieces)) == len(flat) - sum(first)
        kept, start = [], 0
        for piece in pieces:
            kept += duplicates.is_kept(start, len(piece)).tolist()
            start += len(piece)
    assert kept == first


def test_the_order_of_a_seed_does_not_depend_on_the_buckets(
    sp_model: Path, many: Path, tmp_path: Path
) -> None:
    assert main(command(many, sp_model, tmp_path / "one", "--shuffle-seed", "7")) == 0
    with mock.patch.object(shuffle, "BUCKET_BYTES", 2000):  # tens of buckets
        assert main(command(many, sp_model, tmp_path / "many", "--shuffle-seed", "7")) == 0
    with (
        mock.patch.object(shuffle, "BUCKET_BYTES", 2000),
        mock.patch.object(shuffle, "num_buckets", lambda total, each: 1 + (total > each)),
    ):
        assert main(command(many, sp_model, tmp_path / "deep", "--shuffle-seed", "7")) == 0
    assert contents(tmp_path / "many") == contents(tmp_path / "one")
    assert contents(tmp_path / "deep") == contents(tmp_path / "one")
    assert main(command(many, sp_model, tmp_path / "plain")) == 0
    assert main(command(many, sp_model, tmp_path / "other", "--shuffle-seed", "8")) == 0
    corpora = {name: Corpus(tmp_path / name) for name in ("one", "plain", "other")}
    orders = {
        name: [corpus.source(i).record for i in range(corpus.num_documents)]  # type: ignore[union-attr]
        for name, corpus in corpora.items()
    }
    assert orders["one"] != orders["other"] != orders["plain"]
    assert sorted(orders["one"]) == sorted(orders["other"]) == orders["plain"]
    assert abs(np.corrcoef(orders["one"], orders["plain"])[0, 1]) < 0.1
    documents = dict(zip(orders["plain"], read_indexed(tmp_path / "plain"), strict=True))
    assert [documents[record] for record in orders["one"]] == read_indexed(tmp_path / "one")
