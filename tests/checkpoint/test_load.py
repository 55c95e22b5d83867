"""What one cut saves any other cut loads, bit for bit; another model's checkpoint is refused by name."""

from __future__ import annotations

import errno
import random
from pathlib import Path

import pytest
import torch

from megads.checkpoint import save as save_module
from megads.checkpoint.load import Tolerance, load, resume
from megads.checkpoint.manifest import MAX_CHUNK_BYTES, DamageError
from megads.checkpoint.reader import open_step
from megads.checkpoint.save import save, split_box
from megads.checkpoint.store import Store
from megads.errors import CheckpointError
from megads.parallel.control import Control
from megads.parallel.parameter import Piece
from megads.parallel.shard import Box
from tests.checkpoint.samples import bits, empty_like, random_cut, same, small_state, whole
from tests.checkpoint.stores import FaultStore
from tests.checkpoint.threads import run_threads

ALONE = Control(0, 1)
DTYPES = (
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.bool,
    torch.float8_e4m3fn,
)


def random_state(rng: random.Random) -> dict[str, torch.Tensor]:
    """Tensors of 0 to 3 dims, any dtype, any bits (NaN payloads, infinities, denormals)."""
    state = {}
    for index in range(rng.randrange(1, 6)):
        shape = tuple(rng.randrange(0 if rng.random() < 0.1 else 1, 9) for _ in range(rng.randrange(4)))
        dtype = rng.choice(DTYPES)
        size = torch.Size(shape).numel() * dtype.itemsize
        top = 2 if dtype is torch.bool else 256
        raw = torch.tensor([rng.randrange(top) for _ in range(size)], dtype=torch.uint8)
        state[f"model/t{index}"] = raw.view(dtype).reshape(shape) if size else torch.empty(shape, dtype=dtype)
    return state


def join(state: dict[str, torch.Tensor], cut: list[list[Piece]]) -> dict[str, torch.Tensor]:
    """The logical tensors that pieces hold."""
    joined = {name: torch.zeros_like(t) for name, t in state.items()}
    for pieces in cut:
        for piece in pieces:
            joined[piece.name][piece.box.slices] = piece.tensor
    return joined


@pytest.mark.parametrize("seed", range(40))
def test_any_cut_loads_what_any_other_saved(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(seed)
    if seed % 2:
        monkeypatch.setattr(save_module, "MAX_CHUNK_BYTES", 64)  # many chunks a piece
    state = random_state(rng)
    writers, readers, at_once = rng.randrange(1, 5), rng.randrange(1, 5), rng.randrange(1, 4)
    saved = random_cut(state, writers, rng)
    wanted = random_cut(empty_like(state), readers, rng)
    paths = run_threads(
        writers,
        lambda c: save(
            tmp_path, 7, pieces=saved[c.rank], objects={"seed": seed}, control=c, writers_per_node=at_once
        ),
    )
    assert paths == [tmp_path / "step-00000007"] * writers
    loaded = run_threads(readers, lambda c: load(paths[0], wanted[c.rank], control=c))
    assert [dict(reader.objects) for reader in loaded] == [{"seed": seed}] * readers
    assert same(join(state, wanted), state)


def test_only_chunks_that_meet_a_box_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(save_module, "MAX_CHUNK_BYTES", 400)
    state = {"w": torch.arange(1000.0).reshape(100, 10)}
    path = save(tmp_path, 1, pieces=whole(state), objects={}, control=ALONE)

    class Counting(Store):
        total = 0

        def read_into(self, path: Path, *, offset: int, into: memoryview) -> int:
            self.total += len(into) if path.suffix == ".bin" else 0
            return super().read_into(path, offset=offset, into=into)

    store = Counting()
    piece = Piece("w", (100, 10), Box((3, 2), (5, 4)), torch.zeros(2, 2))
    load(path, [piece], store=store)
    assert torch.equal(piece.tensor, state["w"][3:5, 2:4])
    assert store.total <= 400


def test_large_pieces_become_bounded_chunks() -> None:
    box = Box((5, 0), (5 + 3000, 20000))
    parts = list(split_box(box, MAX_CHUNK_BYTES // 4))
    assert sum(p.size for p in parts) == box.size
    assert max(p.size for p in parts) * 4 <= MAX_CHUNK_BYTES
    assert all(p.shape[1] == 20000 for p in parts), "cut along rows, so that a chunk is contiguous rows"


def test_values_outside_the_box_stay(tmp_path: Path) -> None:
    path = save(tmp_path, 1, pieces=whole({"w": torch.arange(8.0)}), objects={}, control=ALONE)
    memory = torch.full((10,), -1.0)
    load(path, [Piece("w", (8,), Box((2,), (5,)), memory[4:7])])
    assert memory.tolist() == [-1.0] * 4 + [2.0, 3.0, 4.0] + [-1.0] * 3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model/w": torch.zeros(4, 6)}, ["1 different: model/w (float32 6x4, wanted float32 4x6)"]),
        ({"model/w": torch.zeros(6, 4).double()}, ["1 different: model/w (float32 6x4, wanted float64 6x4)"]),
        ({"model/w": None}, ["1 only in the checkpoint: model/w"]),
        ({"model/new": torch.zeros(2)}, ["1 not in the checkpoint: model/new"]),
        (
            {f"model/x{i:02d}": torch.zeros(2) for i in range(20)}
            | {"model/w": None, "model/b": torch.zeros(5)},
            [
                "20 not in the checkpoint: model/x00, ",
                "and 12 more",
                "1 only in the checkpoint: model/w",
                "1 different: model/b (bfloat16 5, wanted float32 5)",
            ],
        ),
    ],
)
def test_the_checkpoint_of_another_model_is_refused(
    tmp_path: Path, change: dict[str, torch.Tensor | None], words: list[str]
) -> None:
    path = save(tmp_path, 1, pieces=whole(small_state()), objects={}, control=ALONE)
    wanted = {n: t for n, t in (empty_like(small_state()) | change).items() if t is not None}
    before = {name: bits(t) for name, t in wanted.items()}
    with pytest.raises(CheckpointError, match="a checkpoint of another model") as caught:
        load(path, whole(wanted))
    assert not isinstance(caught.value, DamageError), "on_damage=previous must not skip it"
    assert caught.value.exit_code == 2
    assert all(word in str(caught.value) for word in words), caught.value
    assert before == {name: bits(t) for name, t in wanted.items()}, "nothing is filled before the check"


def test_tensors_of_other_ranks_are_not_missing_and_the_optimizer_may_stay_unread(tmp_path: Path) -> None:
    state = small_state()
    path = save(tmp_path, 1, pieces=whole(state), objects={}, control=ALONE)
    pieces = whole(empty_like(state))
    run_threads(2, lambda c: load(path, pieces[c.rank :: 2], control=c))
    assert same({p.name: p.tensor for p in pieces}, state)
    with pytest.raises(CheckpointError, match="2 only in the checkpoint: optim/count, optim/exp_avg/w"):
        load(path, pieces[:2])
    load(path, pieces[:2], tolerance=Tolerance(unread=("optim/",)))


@pytest.mark.parametrize("bad_rank", [0, 2])
def test_a_read_error_on_one_rank_is_told_by_all(tmp_path: Path, bad_rank: int) -> None:
    state = small_state()
    path = save(tmp_path, 1, pieces=whole(state), objects={}, control=ALONE)

    class Bad(Store):
        def read_into(self, path: Path, *, offset: int, into: memoryview) -> int:
            if path.suffix == ".bin":
                raise OSError(errno.EIO, "Input/output error", str(path))
            return super().read_into(path, offset=offset, into=into)

    def one(control: Control) -> None:
        store = Bad() if control.rank == bad_rank else Store()
        load(path, whole(empty_like(state)), control=control, store=store)

    for error in run_threads(3, one):
        assert isinstance(error, DamageError)
        assert f"rank {bad_rank}: {path}/chunks-00000.bin" in str(error)
        assert "Input/output error" in str(error)


def test_a_bit_that_flips_while_reading_is_found(tmp_path: Path) -> None:
    path = save(tmp_path, 1, pieces=whole(small_state()), objects={}, control=ALONE)

    class Flipping(Store):
        def read_into(self, path: Path, *, offset: int, into: memoryview) -> int:
            count = super().read_into(path, offset=offset, into=into)
            into[count // 2] ^= 16
            return count

    store = Flipping()
    with pytest.raises(DamageError, match="do not match its own hash"):
        load(path, whole(empty_like(small_state())), store=store)
    reader = open_step(path)
    name, entry = next(iter(reader.manifest.tensors.items()))
    with pytest.raises(DamageError, match=rf"chunks-00000.bin: damaged at bytes \d+\.\.\d+, tensor {name}"):
        type(reader)(path, reader.manifest, reader.digest, store).read_chunk(entry.chunks[0], name=name)


def test_ranks_that_see_different_steps_are_told(tmp_path: Path) -> None:
    state = small_state()
    paths = [
        save(tmp_path / str(i), 1, pieces=whole(state), objects={"run": i}, control=ALONE) for i in range(2)
    ]
    for error in run_threads(2, lambda c: load(paths[c.rank], whole(empty_like(state)), control=c)):
        assert isinstance(error, CheckpointError)
        assert "reads another manifest" in str(error)


def test_resume_takes_the_older_step_when_damage_shows_only_in_the_bytes(tmp_path: Path) -> None:
    states = {step: small_state(step) for step in (1, 2, 3)}
    for step, state in states.items():
        save(tmp_path, step, pieces=whole(state), objects={}, control=ALONE)
    file = tmp_path / "step-00000003" / "chunks-00000.bin"
    data = bytearray(file.read_bytes())
    data[10] ^= 1
    file.write_bytes(data)
    wanted = empty_like(states[1])

    with pytest.raises(DamageError, match=r"checkpoint.load=\S*step-00000002 loads"):
        resume("auto", tmp_path, pieces=whole(wanted), control=ALONE)
    resumed = run_threads(
        2, lambda c: resume("auto", tmp_path, pieces=whole(wanted), control=c, on_damage="previous")
    )
    assert [r.reader.step for r in resumed] == [2, 2]
    assert "step-00000002, the newest intact step; newer and damaged: " in resumed[1].sentence
    assert same(wanted, states[2])
    assert (tmp_path / "set-aside-step-00000003").is_dir()
    assert resume("auto", tmp_path, pieces=whole(wanted), control=ALONE).reader.step == 2
    save(tmp_path, 3, pieces=whole(states[3]), objects={}, control=ALONE)
    assert resume("auto", tmp_path, pieces=whole(wanted), control=ALONE).reader.step == 3
    assert same(wanted, states[3])


@pytest.mark.parametrize("operation", ["kind", "entries"])
def test_a_directory_that_cannot_be_read_is_told_on_all_ranks(tmp_path: Path, operation: str) -> None:
    save(tmp_path, 1, pieces=whole(small_state()), objects={}, control=ALONE)

    def refuse(path: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    store = Store()
    setattr(store, operation, refuse)
    results = run_threads(2, lambda c: resume("auto", tmp_path, pieces=[], control=c, store=store))
    assert {(type(e), str(e)) for e in results} == {
        (CheckpointError, f"rank 0: no step can be chosen: {tmp_path}: Permission denied")
    }


def test_newer_steps_that_cannot_be_set_aside_are_told_on_all_ranks(tmp_path: Path) -> None:
    pieces = whole(small_state())
    for step in (1, 2):
        save(tmp_path, step, pieces=pieces, objects={}, control=ALONE)
    store = FaultStore(lambda _n, name, _p: errno.EROFS if name == "rename" else None)
    results = run_threads(
        2, lambda c: resume(f"{tmp_path}/step-00000001", tmp_path, pieces=pieces, control=c, store=store)
    )
    assert all("newer steps cannot be set aside" in str(e) for e in results), results


def test_a_fresh_start_leaves_the_pieces_alone(tmp_path: Path) -> None:
    wanted = small_state()
    resumed = resume("auto", tmp_path / "checkpoints", pieces=whole(wanted), control=ALONE)
    assert resumed.reader is None
    assert "a fresh start" in resumed.sentence
    assert same(wanted, small_state())
