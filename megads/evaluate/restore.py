"""A checkpoint as a model, at any layout: what evaluation and generation start from.

A checkpoint holds its run's resolved config, so its directory is enough. The layout is the caller's: every rank is a
data-parallel replica unless an override says `parallel.tensor=...` or `parallel.pipeline=...`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megads import log
from megads.assemble import rules, wiring
from megads.checkpoint.load import Tolerance, load
from megads.checkpoint.reader import StepReader, open_step
from megads.checkpoint.retention import steps_at
from megads.checkpoint.share import Reading
from megads.checkpoint.store import Store
from megads.config.load import load_text
from megads.config.root import Config
from megads.errors import CheckpointError
from megads.parallel.bootstrap import connect, device_of
from megads.parallel.mesh import Mesh, build_mesh
from megads.parallel.parameter import pieces
from megads.parallel.place import discover

ROWS = 8  # samples that a rank scores at once, unless an override says otherwise


@dataclass(frozen=True, slots=True)
class Restored:
    """A model with the weights of a step, on this rank."""

    config: Config
    mesh: Mesh
    model: wiring.Model
    step: int
    tokenizer_fingerprint: str


def restore(checkpoint: str, overrides: Sequence[str], *, weights: str = "model") -> Restored:
    """Connect the ranks and load the newest step under `checkpoint`: a run, its checkpoints, or one step.

    Args:
        weights: their kind: `model`, or an average such as `ema_0.999`.

    Raises:
        CheckpointError: no step there, a damaged one, or one without such weights.
        ConfigError: overrides that are wrong or do not fit the ranks.
    """
    from_path = _newest(checkpoint)
    reader = open_step(from_path)
    text = reader.objects.get("config")
    if not isinstance(text, str):
        raise CheckpointError(f"{from_path}: the checkpoint holds no config", found=type(text).__name__)
    _check_kind(reader, weights)
    place = discover()
    defaults = (
        "parallel.tensor=1",
        "parallel.sequence_pieces=1",
        "parallel.context=1",
        "parallel.pipeline=1",
        "parallel.expert=1",
        "parallel.expert_tensor=null",
        "parallel.virtual_stages=1",
        "parallel.schedule=gpipe",
        "batch.ramp=null",
        "batch.ramp_unit=null",
        "data.curriculum=null",
        "parallel.stage_layers=null",
        "optim.engine=native",
        "optim.zero_stage=0",
        "optim.deepspeed={}",
        f"batch.micro={ROWS}",
        f"batch.global={ROWS * place.world_size}",
    )
    config = load_text(text, [*defaults, *overrides], source=f"{from_path}/config")
    rules.check(config, place.world_size, host_ranks=place.host_ranks)
    log.setup(place.rank)
    device = device_of(place)
    control = connect(place, timeout=config.run.timeout, device=device)
    layout = wiring.layout_of(config, place.world_size)
    mesh = build_mesh(layout, place.rank, device=device, timeout=config.run.timeout)
    model = wiring.build_model(config, mesh, vocab=config.model.vocab or 1)
    wanted = [
        piece
        for parameter in model.parameters
        for piece in pieces(parameter, parameter.detach().view(-1), kind=weights)
    ]
    wanted += [piece for piece in model.kept if piece.name.startswith("model/")]
    load(
        from_path,
        wanted,
        control=control,
        reading=Reading(config.checkpoint.checked_share, mesh.group("dp_cp"), device),
        tolerance=Tolerance(
            unread=("optim/", "router/", "ema_", *(("model/",) if weights != "model" else ()))
        ),
    )
    return Restored(config, mesh, model, reader.step, str(reader.objects.get("tokenizer", "")))


def _check_kind(reader: StepReader, weights: str) -> None:
    kinds = {name.partition("/")[0] for name in reader.manifest.tensors}
    allowed = sorted(kind for kind in kinds if kind == "model" or kind.startswith("ema_"))
    if weights not in allowed:
        raise CheckpointError(
            f"{reader.path}: no such weights",
            found=f"--weights {weights}",
            allowed=", ".join(allowed),
            do="optim.ema keeps averages while a run trains",
        )


def _newest(checkpoint: str) -> str:
    steps = steps_at(Path(checkpoint), store=Store())
    if not steps:
        raise CheckpointError(
            f"{checkpoint}: no checkpoint there",
            found="no step in it" if Path(checkpoint).exists() else "nothing there",
            allowed="the directory of a run, of its checkpoints, or of a step",
        )
    return str(steps[0])
