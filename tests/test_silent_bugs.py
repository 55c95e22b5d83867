"""Silent bugs that other trainers shipped, row by row: the test here that fails if megads had it, or why none applies.

The rows are those of the project's list (`shared/facts/silent_bugs.md`; public threads, read in 2026). A value is a
test, `file::function`, or a fault of the mutation suite, `mutation: name`. `T3` is the third of the further traps.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megads.parallel.control import Control
from megads.verify.measure import Trainee, measure
from tests.parity.harness import Case, Model, make_batch, make_config
from tests.verify.mutations import MUTATIONS

ROOT = Path(__file__).parents[1]
LIST = ROOT.parent / "shared" / "facts" / "silent_bugs.md"


@dataclass(frozen=True)
class NotApplicable:
    """Why a row has no test yet."""

    reason: str


NO_SPARSE = NotApplicable("there is no sparse attention and no indexer")
NO_METRIC = NotApplicable("megads computes no such metric")
OUTSIDE = NotApplicable("about other packages' releases, which megads does not import")

LAYOUTS = "tests/parity/test_layouts.py::test_layout_changes_nothing"
COVERING = "tests/parity/test_covering.py::test_combination_equals_one_process"
MTP = "tests/parity/test_mtp.py::"
RESUME = "tests/distributed/test_resume.py::"
DEEPSPEED = "tests/optim/test_deepspeed_zero.py::"

ROWS: dict[str, tuple[str, ...] | NotApplicable] = {
    "1": (COVERING, "mutation: no sum over ranks in the vocabulary-parallel cross entropy"),
    "2": ("tests/parity/test_objective.py::test_objective_is_torchs",),
    "3": (
        "tests/parity/test_context.py::test_cutting_rows_changes_nothing",
        "tests/parity/test_experts.py::test_what_is_reported_is_of_the_whole_batch",
        "mutation: tokens are counted over data-parallel ranks, not over the sequence's",
        MTP + "test_what_is_reported_is_of_the_whole_batch",
        MTP + "test_a_fault_is_seen",
    ),
    "4": (
        "tests/parity/test_layouts.py::test_dropout_tied_and_untied",
        "mutation: no sum of the tied embedding between the first and the last stage",
    ),
    "5": (
        "tests/parity/test_experts.py::test_layout_changes_nothing",
        "mutation: copies on tensor-parallel ranks count in the norm",
        "mutation: the load of a sequence is that of the rank's tokens",
    ),
    "6": (MTP + "test_copies_are_updated_alike", MTP + "test_layout_changes_nothing"),
    "7": ("tests/verify/test_command.py::test_equal_layouts_end_with_0_and_a_row_a_module",),
    "8": (
        LAYOUTS,
        "mutation: the backward of every stage is seeded by its number",
        "mutation: gradients are averaged over data-parallel ranks",
        "mutation: whole gradients count in the norm on every data-parallel rank",
    ),
    "9": (
        "tests/parity/test_mla.py::test_layout_changes_nothing",
        "tests/parity/test_mla.py::test_a_forgotten_sum_is_seen",
    ),
    "10": (DEEPSPEED + "test_fp32_equals_one_process",),  # tied embeddings: one parameter used twice in a step
    "11": (DEEPSPEED + "test_bf16_has_at_most_twice_the_error_of_one_process",),
    "12": (DEEPSPEED + "test_fp32_equals_one_process", COVERING),
    "13": (RESUME + "test_a_killed_rank_ends_the_job_and_the_run_goes_on_bit_for_bit",),
    "14": ("tests/test_silent_bugs.py::test_a_step_leaves_its_batch_as_it_was",),
    "15": ("tests/test_silent_bugs.py::test_the_same_run_has_the_same_bits",),
    "16": (
        "tests/checkpoint/test_verify.py::test_every_damage_of_every_file_is_named",
        RESUME + "test_load_and_save_in_another_layout_keeps_every_bit",
    ),
    "17": (
        "tests/checkpoint/test_load.py::test_any_cut_loads_what_any_other_saved",
        "tests/parity/test_experts.py::test_a_run_goes_on_under_another_layout",
    ),
    "18": (
        RESUME + "test_a_run_that_moves_between_layouts_has_the_same_losses",
        RESUME + "test_a_resume_that_forgets_adams_step_count_is_seen",
    ),
    "19": (RESUME + "test_a_run_that_moves_between_layouts_has_the_same_losses",),
    "20": (
        "tests/data/test_loader.py::test_ranks_together_hold_the_batch_of_one_rank",
        RESUME + "test_changes_of_batch_and_length_add_rows_and_neither_lose_nor_repeat_a_token",
    ),
    "21": ("tests/data/test_loader.py::test_no_token_is_lost_or_repeated_when_everything_changes",),
    "22": ("tests/data/test_order.py::test_ten_billion_samples_in_little_memory",),  # there is no index to race for
    "23": ("tests/data/test_job.py::test_any_cut_and_any_worker_count_give_the_same_documents",),
    "24": (
        "tests/data/test_blend.py::test_assignment_far_out_equals_the_exact_arithmetic",
        "tests/data/test_loader.py::test_max_epochs_is_refused_before_the_run",
    ),
    "25": (
        "tests/ops/test_attention.py::test_a_document_is_as_if_it_stood_alone",
        "tests/parity/test_packing.py::test_gradients_are_those_of_the_documents_one_by_one",
        "mutation: the ring's mask forgets documents",
    ),
    "26": ("tests/data/test_order.py::test_no_torch_on_the_way_from_text_to_corpus",),
    "27": ("tests/test_silent_bugs.py::test_no_nightly_is_asked_for",),
    "28": ("tests/assemble/test_export_hf.py::test_every_tensor_is_there_bit_for_bit_and_logits_are_equal",),
    "29": (
        "tests/model/test_mtp.py::test_an_imported_deepseek_predicts_as_transformers_does",
        "tests/model/test_mtp.py::test_a_copy_that_is_none_is_refused",
    ),
    "30": ("tests/pipeline/test_schedules.py::test_declared_bounds_are_tight_and_the_published_peaks",),
    "T1": ("tests/objective/test_language.py::test_loss_and_gradient_equal_torch",),
    "T2": (
        "mutation: no sum over ranks in the vocabulary-parallel cross entropy",
        COVERING,
        "tests/data/test_sequence.py::test_what_stands_ahead_stops_where_a_document_or_a_span_ends",
        MTP + "test_a_fault_is_seen",
    ),
    "T3": (
        "tests/layers/test_moe.py::test_a_second_forward_counts_nothing_and_neither_does_evaluation",
        "tests/parity/test_experts.py::test_what_is_reported_is_of_the_whole_batch",
    ),
    "T4": (
        "tests/model/test_mtp.py::test_embedding_first",
        "tests/model/test_mtp.py::test_an_imported_deepseek_predicts_as_transformers_does",
    ),
    "T5": NO_SPARSE,
    "T6": NO_SPARSE,
    "T7": NO_METRIC,
    "T8": OUTSIDE,
    "T9": ("tests/layers/test_moe.py::test_like_the_definition",),  # float64, where torch has no grouped product
    "T10": OUTSIDE,
    "T11": NotApplicable("about texts, not about code"),
}  # fmt: skip


def functions_of(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("row", ROWS)
def test_every_row_has_its_test(row: str) -> None:
    found = ROWS[row]
    if isinstance(found, NotApplicable):
        assert found.reason
        return
    assert found
    faults = {mutation.name for mutation in MUTATIONS}
    for name in found:
        kind, _, fault = name.partition(": ")
        if kind == "mutation":
            assert fault in faults, name
        else:
            file, _, function = name.partition("::")
            assert function in functions_of(ROOT / file), name


def test_every_row_of_the_list_is_here() -> None:
    if not LIST.exists():
        pytest.skip("the list is not beside this checkout")
    text = LIST.read_text(encoding="utf-8")
    table, _, traps = text.partition("## More traps")
    listed = set(re.findall(r"^\| (\d+) \|", table, re.MULTILINE))
    listed |= {f"T{n}" for n in re.findall(r"^(\d+)\. ", traps.partition("\n## ")[0], re.MULTILINE)}
    assert listed == set(ROWS)


# --- rows that had no test of their own

CASE = Case(tensor=2, data=2, micro=2, zero=1, sequence=True)


def test_a_step_leaves_its_batch_as_it_was() -> None:
    """Row 14: a mask that shrinks a little with each step."""
    trainee = Trainee.build(
        make_config(Model("llama", dropout=0.1), Case(micro=7), precision="fp32"), Control(0, 1)
    )
    batch, before = make_batch(1), make_batch(1)
    for _ in range(2):
        for micro_batch in (batch.rows(0, 14), batch.rows(14, 28)):
            trainee.executor.run(
                replace(micro_batch), seeds={"loss": torch.tensor(1.0)}, engine=trainee.engine
            )
    for field in fields(batch):
        value: Any = getattr(batch, field.name)
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, getattr(before, field.name)), field.name


def test_the_same_run_has_the_same_bits() -> None:
    """Row 15: on one layout nothing but the seed decides."""
    config = make_config(Model("llama", dropout=0.1, layers=2), CASE, precision="fp32")
    first, second = (measure(config, CASE.world_size, steps=3) for _ in range(2))
    assert first.losses == second.losses
    assert first.norms == second.norms
    assert all((values == second.final[name]).all() for name, values in first.final.items())


def test_no_nightly_is_asked_for() -> None:
    """Row 27: a release that cannot be installed a month later."""
    text = (ROOT / "setup.py").read_text() + (ROOT / "pyproject.toml").read_text()
    assert not re.findall(r"\d\.dev\d|nightly|git\+https", text)
    assert re.search(r"torch[=<>~]", text)
