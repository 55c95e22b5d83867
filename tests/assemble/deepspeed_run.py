"""Models trained and saved by DeepSpeed's own engine, in processes of their own: what the conversion tests read.

    python -m tests.assemble.deepspeed_run train DIRECTORY KIND STAGE RANK WORLD PORT
    python -m tests.assemble.deepspeed_run load DIRECTORY KIND STAGE OUTPUT PORT

`train` writes DIRECTORY/ds (DeepSpeed's checkpoint), DIRECTORY/config.json and, on rank 0, DIRECTORY/truth.pt: what the
engine says its parameters and moments are. `load` has DeepSpeed read a universal checkpoint and writes the same of it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SIZES: dict[str, Any] = {"vocab_size": 97, "initializer_range": 0.2}
STEPS = 3


def make_model(kind: str) -> Any:
    import torch
    import transformers

    torch.manual_seed(1)
    if kind.startswith("gpt"):
        config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=24, **SIZES)
        return transformers.GPT2LMHeadModel(config)
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=24,
        **SIZES,
    )
    return transformers.LlamaForCausalLM(config)


def engine_of(model: Any, kind: str, stage: int, *, universal: bool) -> Any:
    import deepspeed
    import torch

    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage},
        "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,
        "checkpoint": {"load_universal": universal},
    }
    if kind.endswith("bf16"):
        config |= {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=config, dist_init_required=False
    )
    return engine


def truth_of(engine: Any) -> dict[str, Any]:
    """Kind -> name -> values, as DeepSpeed's own getters give them (collective)."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    found: dict[str, Any] = {"model": {}, "optim/exp_avg": {}, "optim/exp_avg_sq": {}}
    for name, parameter in engine.module.named_parameters():
        found["model"][name] = safe_get_full_fp32_param(parameter).clone()
        for moment in ("exp_avg", "exp_avg_sq"):
            found[f"optim/{moment}"][name] = safe_get_full_optimizer_state(parameter, moment).clone()
    return found


def connect(rank: int, world: int, port: str) -> None:
    import torch

    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_RANK": str(rank),
        "DS_ACCELERATOR": "cpu",
    }
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    torch.distributed.init_process_group("gloo")


def train(directory: Path, kind: str, stage: int, rank: int, world: int, port: str) -> None:
    import torch

    connect(rank, world, port)
    model = make_model(kind)
    if rank == 0:
        model.config.save_pretrained(directory)
    engine = engine_of(model, kind, stage, universal=False)
    g = torch.Generator().manual_seed(rank)
    for _ in range(STEPS):
        tokens = torch.randint(0, 97, (2, 24), generator=g)
        engine.backward(engine(input_ids=tokens, labels=tokens).loss)
        engine.step()
    engine.save_checkpoint(str(directory / "ds"))
    truth = truth_of(engine)
    if rank == 0:
        torch.save(truth, directory / "truth.pt")


def load(directory: Path, kind: str, stage: int, output: Path, port: str) -> None:
    import torch

    connect(0, 1, port)
    engine = engine_of(make_model(kind), kind, stage, universal=True)
    engine.load_checkpoint(str(directory))
    state = engine.optimizer.optimizer.state
    steps = {int(entry["step"]) for entry in state.values() if "step" in entry}
    torch.save({"truth": truth_of(engine), "steps": steps, "global": engine.global_steps}, output)


def run(*commands: list[str]) -> None:
    """Run ranks side by side; fails with what they said."""
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.assemble.deepspeed_run", *command],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for command in commands
    ]
    for process in started:
        said, _ = process.communicate(timeout=240)
        assert process.returncode == 0, said.decode()[-3000:]


if __name__ == "__main__":
    verb, where, kind, stage = sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    if verb == "train":
        train(where, kind, stage, int(sys.argv[5]), int(sys.argv[6]), sys.argv[7])
    else:
        load(where, kind, stage, Path(sys.argv[5]), sys.argv[6])
