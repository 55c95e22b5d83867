"""`python -m megads train CONFIG [key=value ...]`: one process, or each rank under a launcher.

    check -> connect -> open data -> build -> find the step to go on from -> loop -> save

The loop reads step n's numbers while step n + 1 is under way, so the device never waits for the host; what they decide
(stopping at a loss that is not finite, going back) acts one step late, and always before a checkpoint is written.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from megads import log
from megads.assemble import rules, source, wiring
from megads.assemble.step import StepResult, train_step
from megads.checkpoint.background import SavePlan, Saver
from megads.config.checkpoint import CheckpointConfig
from megads.config.load import dump, load
from megads.config.root import Config
from megads.data.segment import Segment, segment_at
from megads.data.sequence import Batch
from megads.optim.guard import SpikeGuard
from megads.parallel.bootstrap import connect, device_of, disconnect
from megads.parallel.control import Control
from megads.parallel.mesh import Mesh, build_mesh
from megads.parallel.place import discover
from megads.pipeline.executor import Executor
from megads.train import history as run_history
from megads.train import state
from megads.train.lock import locked
from megads.train.metrics import Done, Meter
from megads.train.pace import Pace
from megads.train.replica import check_replicas
from megads.train.report import Reporter
from megads.train.standing import Holder, Restorer, Standing
from megads.train.stop import SAVED, StopRequest
from megads.train.verdict import Judge, RollBack
from megads.train.watch import Watch

_log = logging.getLogger("megads.train")


def main(argv: Sequence[str]) -> int:
    """Train; returns the exit code.

    Raises:
        MegadsError: a wrong input, before training; a failure while training.
    """
    parser = argparse.ArgumentParser(prog="megads train", description="Train a model.")
    parser.add_argument("config", help="YAML file; `python -m megads explain` lists its keys")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="replaces a value of the file")
    options = parser.parse_args(argv)
    config = load(options.config, options.overrides)
    place = discover()
    rules.check(config, place.world_size, host_ranks=place.host_ranks)
    log.setup(place.rank)
    device = device_of(place)
    control = connect(place, timeout=config.run.timeout, device=device)
    is_stopped = Trainer(config, control, device).run()
    disconnect()
    return SAVED if is_stopped else 0


def save_plan(config: CheckpointConfig, directory: Path) -> SavePlan:
    """What the config says of saving, for steps in `directory`."""
    return SavePlan(
        directory,
        writers_per_node=config.writers_per_node,
        keep=config.keep,
        keep_every=config.keep_every,
        in_background=config.background,
        stops_on_failure=config.on_save_failure == "stop",
    )


@dataclass(frozen=True, slots=True)
class _Pending:
    """A step that was issued and whose numbers were not read yet."""

    step: int
    lr: float
    result: StepResult
    started: float  # seconds of the clock, before its data was read
    returned: float  # when the call came back: with the result on a CPU, at once on a GPU


class Trainer:
    """One run: everything it holds, and its loop."""

    def __init__(self, config: Config, control: Control, device: torch.device) -> None:
        self._control = control
        self._speaks = control.rank == 0
        self._source = source.open_source(config)
        state.check_ranks_agree(config, self._source.fingerprints, control=control)
        torch.use_deterministic_algorithms(config.run.deterministic)
        layout = wiring.layout_of(config, control.size)
        self._mesh: Mesh = build_mesh(layout, control.rank, device=device, timeout=config.run.timeout)
        self._model = wiring.build_model(config, self._mesh, vocab=self._source.tokenizer.vocab_size)
        self._config = wiring.resolved(config, self._model.spec)
        self._engine = wiring.build_engine(config, self._model, mesh=self._mesh)
        self._executors = wiring.build_executors(config, self._model, mesh=self._mesh)
        self._batch_size = config.batch.global_size  # of the training executor
        self._dir = Path(config.run.dir)
        self._checkpoints = self._dir / "checkpoints"
        channel = control.duplicate() if config.checkpoint.background else control
        self._saver = Saver(save_plan(config.checkpoint, self._checkpoints), control=channel)
        self._report = Reporter(self._config, directory=self._dir, speaks=self._speaks)
        self._meter = Meter(config, self._model, mesh=self._mesh)
        self._watch = Watch(config, self._source, self._model, mesh=self._mesh)
        self._judge = Judge(config, self._source.train, speaks=self._speaks)
        guard = None if config.optim.guard is None else SpikeGuard(config.optim.guard, device)
        self._held = Holder(self._model, self._engine, Pace(config), guard)
        self._restorer = Restorer(config, self._source, self._held, mesh=self._mesh, control=control)
        self._last_step = min(config.run.stop_after or config.run.steps, config.run.steps)
        self._ready = 0.0  # when the last step was known to be done, seconds of the clock
        self._stop = StopRequest()

    def run(self) -> bool:
        """Train from where the run stands to its last step; returns whether a signal stopped it before.

        Raises:
            MegadsError: the directory is in use, what is there does not fit, or training failed.
        """
        with locked(self._dir, control=self._control), self._stop:
            last = self._run()
        if self._stop.is_agreed and last < self._last_step:
            _log.info("stopped after step %d by %s; the same command goes on", last, self._stop.cause)
            return True
        return False

    def _run(self) -> int:
        """Restore and train; returns the last step that was done and saved."""
        standing = self._restorer.resume()
        self._write_run_files(standing)
        if self._speaks:
            source.warn_of_order(self._source)
        self._say_what_runs(standing.history)
        if standing.step >= self._last_step:
            _log.info("nothing to do: step %d of %d is done", standing.step, self._last_step)
            return standing.step
        self._stop.count(sum(self._control.all_gather(self._stop.is_raised)))
        if self._stop.is_agreed:
            return standing.step
        while True:
            try:
                last = self._train(standing)
            except RollBack as cause:
                self._saver.finish()
                standing = self._restorer.roll_back(cause, standing.history)
                self._write_run_files(standing)
            else:
                self._saver.finish()
                self._report.close()
                return last

    def _train(self, standing: Standing) -> int:
        """Train from there on; returns the last step that was done."""
        history = standing.history
        loader = source.build_loader(self._config, self._source, history=history, mesh=self._mesh)
        steps = range(standing.step + 1, self._last_step + 1)
        batches = source.prefetch(loader, steps, depth=self._config.data.prefetch, mesh=self._mesh)
        pending: _Pending | None = None
        bar = log.Progress(
            "training", total=self._config.run.steps, done=standing.step, is_shown=self._speaks
        )
        with bar, batches:
            for step in steps:
                started = time.perf_counter()
                lr = self._held.pace.rate(step, history)
                batch = batches.take(step)
                self._check_batch(batch, first_step=steps.start, reads_tokens=loader.reads_tokens)
                result = train_step(
                    batch.to(self._mesh.device),
                    executor=self._executor(segment_at(history, step).batch_size),
                    engine=self._engine,
                    mesh=self._mesh,
                    lr=lr,
                    stop=self._stop,
                    guard=self._held.guard,
                    weights=self._model.spec.weights_at(run_history.tokens_by(history, step - 1)),
                )
                returned = time.perf_counter()
                self._saver.check()
                if pending is not None:
                    self._finish(pending, history)
                pending = _Pending(step, lr, result, started, returned)
                if self._stop.is_agreed or self._must_pause(step):
                    self._finish(pending, history)
                    pending = None
                    if self._stop.is_agreed or self._is_due(step, self._config.checkpoint.every):
                        self._save(step, history)
                bar.advance()
                if self._stop.is_agreed:
                    break
        return step

    def _executor(self, batch_size: int) -> Executor:
        """That of a step of so many samples; a new one where the batch size changes."""
        if batch_size != self._batch_size:
            sized = replace(self._config, batch=replace(self._config.batch, global_size=batch_size))
            self._executors = replace(
                self._executors, train=wiring.build_executors(sized, self._model, mesh=self._mesh).train
            )
            self._batch_size = batch_size
        return self._executors.train

    def _check_batch(self, batch: Batch, *, first_step: int, reads_tokens: bool) -> None:
        """Each `data.check_every` steps, that all ranks of a model replica have the same batch."""
        every = self._config.data.check_every
        if every is not None and (batch.step - first_step) % every == 0:
            check_replicas(batch, layout=self._mesh.layout, control=self._control, reads_tokens=reads_tokens)

    def _write_run_files(self, standing: Standing) -> None:
        if self._speaks:
            log.setup(0, file=self._dir / "log")
            (self._dir / "config.yaml").write_text(dump(self._config), encoding="utf-8")
            run_history.write(self._dir / "history.json", standing.history)
            self._report.resume(standing.step)

    def _say_what_runs(self, history: tuple[Segment, ...]) -> None:
        layout, spec = self._mesh.layout, self._model.spec
        num_parameters = self._count_parameters()
        _log.info(
            "%s: %s parameters, %d layers; tensor %d x context %d x pipeline %d x data %d; %s tokens a step",
            self._config.model.family,
            log.format_count(num_parameters),
            spec.layers,
            layout.tensor,
            layout.context,
            layout.pipeline,
            layout.data,
            log.format_count(run_history.tokens_of(history, history[-1].first_step)),
        )
        if spec.moe is not None:
            _log.info(
                "%d experts in %d layers, %d a token; dealt over %d x %d ranks (expert x expert_tensor)",
                spec.moe.experts,
                len(spec.expert_layers),
                spec.moe.per_token,
                layout.expert,
                layout.etp_size,
            )

    def _count_parameters(self) -> int:
        """Elements of the whole model, each once."""
        mine = sum(piece.box.size for piece in self._engine.state() if piece.name.startswith("model/"))
        return sum(self._control.all_gather(mine))

    def _is_due(self, step: int, every: int | None) -> bool:
        """Whether something that happens each `every` steps, and at the end, happens after `step`."""
        return step == self._last_step or _is_multiple(step, every)

    def _must_pause(self, step: int) -> bool:
        log_config = self._config.log
        every = (self._config.checkpoint.every, log_config.validate_every, log_config.sample_every)
        return any(self._is_due(step, number) for number in every)

    def _finish(self, pending: _Pending, history: tuple[Segment, ...]) -> None:
        """Read a step's numbers, judge them, write and say them."""
        result = pending.result
        loss, norm = result.loss.item(), result.report.grad_norm.item()
        self._stop.count(result.num_stops.item())
        ready = time.perf_counter() if self._mesh.device.type == "cuda" else pending.returned
        seconds = ready - max(pending.started, self._ready)
        self._ready = ready
        self._judge.judge(pending.step, result, loss=loss, norm=norm, history=history)
        record = self._meter.record(Done(pending.step, pending.lr, seconds, loss, norm, result), history)
        if self._is_due(pending.step, self._config.log.validate_every):
            losses = self._watch.validate(self._executors.evaluate)
            # one that is due because this start ends here does not count: a run that never stops has none
            if _is_multiple(pending.step, self._config.log.validate_every):
                self._held.pace.observe(tuple(losses.values()), step=pending.step)
            record |= losses
        self._report.step(record, is_shown=self._is_due(pending.step, self._config.log.every))
        if self._config.log.sample_every and self._is_due(pending.step, self._config.log.sample_every):
            self._watch.sample(self._report, step=pending.step)

    def _save(self, step: int, history: tuple[Segment, ...]) -> None:
        self._saver.save(
            step,
            pieces=self._engine.state(),
            objects=state.objects(
                self._config, history, engine=self._engine, tokenizer=self._source.tokenizer.fingerprint
            )
            | {
                "schedule": self._held.pace.state(),
                "guard": {} if self._held.guard is None else dict(self._held.guard.state()),
            },
        )


def _is_multiple(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
