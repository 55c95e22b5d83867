"""The DeepSpeed engine beside the native one: gradients, losses, weights, norms, checkpoints; what it refuses.

Ranks are forked after deepspeed's import, so it is paid once; nothing is compiled.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch

os.environ.setdefault("DS_ACCELERATOR", "cpu")
deepspeed = pytest.importorskip("deepspeed", reason="deepspeed is not installed")

from megads.assemble.deepspeed_keys import owned_keys  # noqa: E402
from megads.assemble.step import train_step  # noqa: E402
from megads.assemble.wiring import build_engine, build_executors, build_model, layout_of  # noqa: E402
from megads.config.optim import OptimConfig  # noqa: E402
from megads.config.root import Config  # noqa: E402
from megads.errors import ConfigError  # noqa: E402
from megads.optim import deepspeed_engine, deepspeed_twin, deepspeed_zero  # noqa: E402
from megads.optim.engine import Engine  # noqa: E402
from megads.parallel.mesh import build_mesh  # noqa: E402
from tests.parity.harness import (  # noqa: E402
    GLOBAL_BATCH,
    VOCAB,
    Case,
    Model,
    Outcome,
    assemble,
    gradient_error,
    make_batch,
    make_config,
    run_case,
)
from tests.ranks import run_ranks  # noqa: E402

TIED, UNTIED = Model("gpt", layers=2), Model("llama", layers=2)
DS = Case(engine="deepspeed", micro=2)
ON_HOST: Any = {
    "zero_optimization": {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
}
STATE_ON_HOST: Any = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
CASES = (
    (UNTIED, replace(DS, data=2, zero=1)),
    (UNTIED, replace(DS, data=4, zero=2, micro=1, bucket=3000)),
    (UNTIED, replace(DS, tensor=2, data=2, zero=2, sequence=True)),
    (TIED, replace(DS, pipeline=2, data=2, zero=1)),
    (TIED, replace(DS, pipeline=2, data=2, zero=2, schedule="gpipe")),
    (TIED, replace(DS, tensor=2, zero=2, micro=4)),
)
IDS = [f"{model.family}-{case}" for model, case in CASES]


@pytest.fixture(scope="module", autouse=True)
def imported_before_the_fork() -> None:
    """DeepSpeed's first `initialize` in a process imports torch's compiler: 2 s that every rank would pay."""
    importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")


@functools.cache
def _alone(family: str, precision: str) -> Outcome:
    """One process of the native engine; precision fp64 is the reference."""
    model = TIED if family == "gpt" else UNTIED
    return run_case(model, Case(micro=4), precision=precision, steps=3)


@pytest.mark.parametrize(("model", "case"), CASES, ids=IDS)
def test_fp32_equals_one_process(model: Model, case: Case) -> None:
    reference, alone = _alone(model.family, "fp64"), _alone(model.family, "fp32")
    got = run_case(model, case, precision="fp32", steps=3)
    assert all(torch.equal(alone.initial[n], got.initial[n]) for n in alone.initial)
    assert got.losses == pytest.approx(reference.losses, rel=1e-6)
    assert got.norms == pytest.approx(reference.norms, rel=1e-6)
    errors = gradient_error(got, reference)
    assert max(errors.values()) <= 1e-5, errors


@pytest.mark.parametrize(("model", "case"), CASES[1:5], ids=IDS[1:5])
def test_bf16_has_at_most_twice_the_error_of_one_process(model: Model, case: Case) -> None:
    reference, alone = _alone(model.family, "fp64"), _alone(model.family, "bf16")
    got = run_case(model, case, precision="bf16", steps=3)
    assert all(torch.equal(alone.initial[n], got.initial[n]) for n in alone.initial), "masters were rounded"
    assert {values.dtype for values in got.final.values()} == {torch.float32}
    errors, allowed = (gradient_error(o, reference) for o in (got, alone))
    assert 1e-4 < max(allowed.values()) < 0.1
    assert max(errors.values()) <= 2 * max(allowed.values())
    for step, loss in enumerate(reference.losses):
        assert abs(got.losses[step] / loss - 1) <= 2 * max(abs(alone.losses[step] / loss - 1), 1e-3)


def _train(engine: Engine, executor: Any, mesh: Any, steps: range) -> list[float]:
    rows = GLOBAL_BATCH // mesh.layout.data
    first = mesh.group("dp").rank * rows
    return [
        train_step(
            make_batch(step).rows(first, first + rows), executor=executor, engine=engine, mesh=mesh, lr=1e-3
        ).loss.item()
        for step in steps
    ]


def _go_on(
    config: Config,
    size: int,
    *,
    saved: tuple[dict[str, torch.Tensor], Mapping[str, Any]] | None,
    steps: range,
) -> tuple[list[float], tuple[dict[str, torch.Tensor], Mapping[str, Any]]]:
    """Load what another run saved, train, save: losses, and state of all ranks as logical tensors."""

    def work(rank: int, size: int) -> Any:
        mesh = build_mesh(layout_of(config, size), rank)
        model = build_model(config, mesh, vocab=VOCAB)
        engine = build_engine(config, model, mesh=mesh)
        executor = build_executors(config, model, mesh=mesh).train
        if saved is not None:
            for parameter in model.parameters:
                if parameter.untyped_storage().nbytes():  # none of stage 3
                    parameter.data.mul_(3.0)  # weights come from the masters, on every rank
            for piece in engine.targets():
                piece.tensor.copy_(saved[0][piece.name][piece.box.slices])
            engine.load_scalars(saved[1])
        losses = _train(engine, executor, mesh, steps)
        parts = [(p.name, p.shape, p.box.slices, p.tensor.clone()) for p in engine.state()]
        return losses, parts, dict(engine.scalars())

    results = run_ranks(work, size)
    return results[0][0], (assemble([r[1] for r in results]), results[0][2])


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_checkpoints_of_the_engines_load_into_each_other(name: str) -> None:
    """native -> deepspeed's stages 2, 3, 0 -> native, each under another layout: losses, weights and moments as without
    a stop. Stage 3 keeps all in the host's memory.

    eps 1e-4 bounds what Adam makes of rounding in gradients near zero.
    """

    def config_of(case: Case) -> Config:
        config = make_config(TIED, case, precision="fp32")
        return replace(config, optim=replace(config.optim, name=name, eps=1e-4))

    native = config_of(Case(micro=4))
    gathered = config_of(replace(DS, tensor=2, data=2, zero=3, sequence=True))
    gathered = replace(gathered, optim=replace(gathered.optim, deepspeed=ON_HOST))
    straight, (expected, scalars) = _go_on(native, 1, saved=None, steps=range(1, 8))
    losses, saved = _go_on(native, 1, saved=None, steps=range(1, 3))
    for config, size, steps in (
        (config_of(replace(DS, pipeline=2, data=2, zero=2)), 4, range(3, 5)),
        (gathered, 4, range(5, 6)),
        (config_of(replace(DS, data=2, zero=0)), 2, range(6, 7)),
        (config_of(Case(tensor=2, micro=4)), 2, range(7, 8)),
    ):
        more, saved = _go_on(config, size, saved=saved, steps=steps)
        losses += more
    got, got_scalars = saved
    assert losses == pytest.approx(straight, rel=1e-6)
    assert got_scalars == scalars
    assert got.keys() == expected.keys()
    bound = 1e-4 if name == "adamw" else 1e-6
    for key, values in expected.items():
        difference = (got[key] - values).norm().item()
        assert difference <= bound * values.norm().item() + 1e-7 * values.numel() ** 0.5, key


@pytest.fixture
def fp16_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed refuses fp16 on a CPU that torch computes it on."""
    accelerator = type(deepspeed.accelerator.get_accelerator())
    monkeypatch.setattr(accelerator, "is_fp16_supported", lambda self: True)


def _poison(config: Config, size: int, bad_steps: set[int]) -> list[list[tuple[bool, float, bool]]]:
    """An infinity in one gradient of the last rank in some steps: (finite, scale, nothing changed) a step."""

    def work(rank: int, size: int) -> Any:
        mesh = build_mesh(layout_of(config, size), rank)
        model = build_model(config, mesh, vocab=VOCAB)
        engine = build_engine(config, model, mesh=mesh)
        executor = build_executors(config, model, mesh=mesh).train
        trace = []
        for step in range(1, 5):
            hook = None
            if rank == size - 1 and step in bad_steps:
                norm = next(p for p in model.parameters if "norm" in p.logical_name)
                hook = norm.register_hook(lambda g: torch.full_like(g, float("inf")))
            before = [p.tensor.clone() for p in engine.state()]
            rows = GLOBAL_BATCH // mesh.layout.data
            batch = make_batch(step).rows(0, rows)
            report = train_step(batch, executor=executor, engine=engine, mesh=mesh, lr=1e-3).report
            if hook is not None:
                hook.remove()
            still = all(torch.equal(a, p.tensor) for a, p in zip(before, engine.state(), strict=True))
            trace.append((bool(report.finite), engine.loss_scale.item(), still))
        return trace

    return run_ranks(work, size)


@pytest.mark.parametrize(
    ("zero", "keys", "precision"),
    [(0, {}, "fp16"), (1, STATE_ON_HOST, "bf16"), (2, {}, "fp32"), (2, {}, "fp16"), (3, ON_HOST, "fp16")],
)
def test_a_gradient_that_is_not_finite_changes_nothing_on_any_rank(
    zero: int, keys: Any, precision: str, fp16_on_cpu: None
) -> None:
    case = replace(DS, data=2, zero=zero, **({"tensor": 2} if zero == 3 else {"pipeline": 2}))
    config = make_config(TIED, case, precision=precision)
    traces = _poison(replace(config, optim=replace(config.optim, deepspeed=keys)), 4, {1, 3})
    assert all(trace == traces[0] for trace in traces)
    assert [(finite, still) for finite, _, still in traces[0]] == [
        (False, True),
        (True, False),
        (False, True),
        (True, False),
    ]
    halved = [32768.0, 32768.0, 16384.0, 16384.0]
    assert [scale for _, scale, _ in traces[0]] == (halved if precision == "fp16" else [1.0] * 4)


def test_fp16_equals_one_process(fp16_on_cpu: None) -> None:
    reference, alone = _alone("gpt", "fp64"), _alone("gpt", "fp16")
    got = run_case(TIED, replace(DS, pipeline=2, data=2, zero=1), precision="fp16", steps=3)
    errors, allowed = (gradient_error(o, reference) for o in (got, alone))
    assert max(errors.values()) <= 2 * max(allowed.values())


def _optim(**changes: Any) -> OptimConfig:
    return replace(make_config(TIED, replace(DS, zero=2), precision="bf16").optim, **changes)


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_what_the_engine_writes_the_user_may_not(precision: Any, zero_stage: int) -> None:
    """Every key of the configuration that the user did not give is refused from a user, but for one default."""
    written = deepspeed_zero.deepspeed_config(_optim(precision=precision, zero_stage=zero_stage))
    flat = [f"zero_optimization.{key}" for key in written.pop("zero_optimization")] + list(written)
    owned = owned_keys(deepspeed_zero.deepspeed_config(_optim(precision=precision, zero_stage=zero_stage)))
    assert set(flat) - set(owned) == {"communication_data_type"}


def test_keys_of_the_user_reach_deepspeed() -> None:
    keys = {
        "communication_data_type": "bf16",
        "zero_optimization": {"overlap_comm": True},
        "dump_state": False,
    }
    config = make_config(UNTIED, replace(DS, data=2, zero=2), precision="bf16")
    config = replace(config, optim=replace(config.optim, deepspeed=keys))

    def work(rank: int, size: int) -> Any:
        mesh = build_mesh(layout_of(config, size), rank)
        model = build_model(config, mesh, vocab=VOCAB)
        engine: Any = build_engine(config, model, mesh=mesh)
        executor = build_executors(config, model, mesh=mesh).train
        inner = engine._twins._engine.optimizer
        return inner.communication_data_type, inner.overlap_comm, _train(engine, executor, mesh, range(1, 4))

    dtype, overlaps, losses = run_ranks(work, 2)[0]
    assert (dtype, overlaps) == (torch.bfloat16, True)
    assert losses == pytest.approx(_alone("llama", "bf16").losses, rel=1e-2)


def test_a_key_that_deepspeed_refuses_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(TIED, replace(DS, zero=2), precision="fp32")
    config = replace(
        config, optim=replace(config.optim, deepspeed={"zero_optimization": {"overlap_com": True}})
    )

    def work(rank: int, size: int) -> str:
        mesh = build_mesh(layout_of(config, size), rank)
        with pytest.raises(ConfigError) as caught:
            build_engine(config, build_model(config, mesh, vocab=VOCAB), mesh=mesh)
        return str(caught.value)

    (said,) = run_ranks(work, 1)
    assert "overlap_com" in said and "optim.deepspeed" in said


def test_deepspeed_that_is_not_installed_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "deepspeed", None)
    with pytest.raises(ConfigError, match=r"needs the package deepspeed(.|\n)*optim\.engine=native"):
        deepspeed_zero.load_deepspeed(torch.device("cpu"))


def test_start_says_what_zero_2_costs() -> None:
    """In a world of one: the engine joins it to itself, and says that gradients are not sharded."""
    config = make_config(TIED, replace(DS, zero=2, micro=4), precision="bf16")

    def work(rank: int, size: int) -> list[str]:
        said: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
        logging.getLogger("megads.optim").addHandler(handler)
        logging.getLogger("megads.optim").setLevel(logging.INFO)
        mesh = build_mesh(layout_of(config, size), rank)
        build_engine(config, build_model(config, mesh, vocab=VOCAB), mesh=mesh)
        return said

    ((line,),) = run_ranks(work, 1)
    assert "ZeRO-2" in line and "gradients are whole on each, in float32" in line and "in bf16" in line


def _keep_the_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    right = deepspeed_zero.deepspeed_config
    monkeypatch.setattr(
        deepspeed_zero, "deepspeed_config", lambda config: right(config) | {"gradient_allreduce_op": "mean"}
    )


def _forget_the_tie(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deepspeed_twin, "all_reduce_", lambda tensor, group: tensor)


def _forget_the_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deepspeed_engine, "clip_factor", lambda norm, limit: torch.ones_like(norm))


@pytest.mark.parametrize("mutation", [_keep_the_mean, _forget_the_tie, _forget_the_clip])
def test_a_broken_engine_is_seen(mutation: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    mutation(monkeypatch)
    try:
        got = run_case(TIED, replace(DS, pipeline=2, data=2, zero=2), precision="fp32", steps=1)
    except AssertionError as error:
        assert "ranks disagree" in str(error)
    else:
        reference = _alone("gpt", "fp64")
        errors = gradient_error(got, reference)
        assert max(*errors.values(), abs(got.norms[0] / reference.norms[0] - 1)) > 1e-3
