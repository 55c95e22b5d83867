"""A run of Megatron-LM, written a second time from its documented layout: files of every rank, and what they compute.

Nothing here knows the converter. The forward works on the ranks' own tensors, as Megatron core does: a rank's qkv holds
one group after the other, each with its queries, its key and its value; fc1 holds gate, then up.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

HIDDEN, HEADS, DIM, FFN, POSITIONS, VOCAB = 48, 4, 12, 72, 40, 411


@dataclass
class Run:
    """Sizes and layout; `style` is te, local or older (before core)."""

    is_llama: bool = False
    layers: int = 4
    groups: int = 4
    tensor: int = 1
    pipeline: int = 1
    virtual: int = 1
    is_tied: bool = True
    style: str = "te"
    dtype: torch.dtype = torch.float32
    padded: int = 512
    ranks: dict[tuple[int, int], dict[str, Any]] = field(default_factory=dict)

    def __str__(self) -> str:
        family = "llama" if self.is_llama else "gpt"
        tie = "tied" if self.is_tied else "untied"
        return f"{family}-g{self.groups}-tp{self.tensor}-pp{self.pipeline}-v{self.virtual}-{tie}-{self.style}"

    @property
    def args(self) -> argparse.Namespace:
        return argparse.Namespace(
            num_layers=self.layers,
            hidden_size=HIDDEN,
            num_attention_heads=HEADS,
            group_query_attention=self.groups != HEADS,
            num_query_groups=self.groups,
            kv_channels=DIM,
            ffn_hidden_size=FFN,
            max_position_embeddings=POSITIONS,
            seq_length=POSITIONS,
            padded_vocab_size=self.padded,
            make_vocab_size_divisible_by=128,
            position_embedding_type="rope" if self.is_llama else "learned_absolute",
            rotary_base=500,
            rotary_percent=1.0,
            normalization="RMSNorm" if self.is_llama else "LayerNorm",
            norm_epsilon=1e-5,
            swiglu=self.is_llama,
            add_bias_linear=not self.is_llama,
            untie_embeddings_and_output_weights=not self.is_tied,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            init_method_std=0.02,
            params_dtype=self.dtype,
            tensor_model_parallel_size=self.tensor,
            pipeline_model_parallel_size=self.pipeline,
        )

    def make(self, seed: int = 0) -> Run:
        """Draw every rank's tensors: names as in Megatron core with Transformer Engine, layers over the whole model."""
        g = torch.Generator().manual_seed(seed)

        def draw(*shape: int, base: float = 0.0) -> Tensor:
            return (base + 0.2 * torch.randn(shape, generator=g)).to(self.dtype)

        size = self.tensor
        width = (HEADS + 2 * self.groups) * DIM // size
        up = FFN * (2 if self.is_llama else 1) // size
        shared: dict[str, Tensor] = {}
        cut: list[dict[str, Tensor]] = [{} for _ in range(size)]

        def norm(name: str) -> None:
            shared[f"{name}weight"] = draw(HIDDEN, base=1.0)
            if not self.is_llama:
                shared[f"{name}bias"] = draw(HIDDEN)

        word = draw(self.padded, HIDDEN)
        head = word if self.is_tied else draw(self.padded, HIDDEN)
        word[VOCAB:] = head[VOCAB:] = 7.0  # padding that must not be seen
        for rank, names in enumerate(cut):
            rows = slice(rank * self.padded // size, (rank + 1) * self.padded // size)
            names["embedding.word_embeddings.weight"] = word[rows].clone()
            names["output_layer.weight"] = head[rows].clone()
        if not self.is_llama:
            shared["embedding.position_embeddings.weight"] = draw(POSITIONS, HIDDEN)
        for layer in range(self.layers):
            stem = f"decoder.layers.{layer}."
            norm(f"{stem}self_attention.linear_qkv.layer_norm_")
            norm(f"{stem}mlp.linear_fc1.layer_norm_")
            for names in cut:
                names[f"{stem}self_attention.linear_qkv.weight"] = draw(width, HIDDEN)
                names[f"{stem}self_attention.linear_proj.weight"] = draw(HIDDEN, HIDDEN // size)
                names[f"{stem}mlp.linear_fc1.weight"] = draw(up, HIDDEN)
                names[f"{stem}mlp.linear_fc2.weight"] = draw(HIDDEN, FFN // size)
                if not self.is_llama:
                    names[f"{stem}self_attention.linear_qkv.bias"] = draw(width)
                    names[f"{stem}mlp.linear_fc1.bias"] = draw(up)
            if not self.is_llama:
                shared[f"{stem}self_attention.linear_proj.bias"] = draw(HIDDEN)
                shared[f"{stem}mlp.linear_fc2.bias"] = draw(HIDDEN)
        norm("decoder.final_layernorm.")
        self.ranks = {(0, rank): {**shared, **names} for rank, names in enumerate(cut)}
        return self

    def stage_of(self, layer: int) -> int:
        """Chunk of a layer; chunk number = virtual stage * pipeline + pipeline rank."""
        return layer // (self.layers // (self.pipeline * self.virtual))

    def chunk(self, rank: int, number: int) -> dict[str, Any]:
        """The state dict of one chunk of one tensor rank, layers counted from 0, in the run's style."""
        last = self.pipeline * self.virtual - 1
        found: dict[str, Any] = {}
        for name, tensor in self.ranks[0, rank].items():
            words = name.split(".")
            if words[1] == "layers":
                layer = int(words[2])
                if self.stage_of(layer) != number:
                    continue
                local = layer - number * (self.layers // (last + 1))
                name = ".".join([*words[:2], str(local), *words[3:]])
            elif number != (0 if words[0] == "embedding" else last):
                continue
            if words[0] != "output_layer" or not self.is_tied or last > 0:
                found[name] = tensor
        if self.style == "older":
            return self._older(found)
        if self.style == "local":
            return {self._local(name): tensor for name, tensor in found.items()}
        found["decoder.layers.0.self_attention.core_attention._extra_state"] = None
        return found

    @staticmethod
    def _local(name: str) -> str:
        name = name.replace("self_attention.linear_qkv.layer_norm_", "input_layernorm.")
        return name.replace("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm.")

    def _older(self, names: dict[str, Tensor]) -> dict[str, Any]:
        """The nested dicts from before core."""
        tree: dict[str, Any] = {"language_model": {}}
        model = tree["language_model"]
        for name, tensor in names.items():
            name = self._local(name).replace("pre_mlp_layernorm", "post_attention_layernorm")
            for new, old in (
                ("linear_qkv", "query_key_value"),
                ("linear_proj", "dense"),
                ("linear_fc1", "dense_h_to_4h"),
                ("linear_fc2", "dense_4h_to_h"),
            ):
                name = name.replace(new, old)
            if name.startswith("embedding."):
                model.setdefault("embedding", {}).setdefault(name.split(".")[1], {})["weight"] = tensor
            elif name == "output_layer.weight" and self.is_tied:
                tree["word_embeddings_for_head"] = {"weight": tensor}
            elif name == "output_layer.weight":
                model["output_layer"] = {"weight": tensor}
            else:
                model.setdefault("encoder", {})[name.removeprefix("decoder.")] = tensor
        return tree

    def save(self, directory: Path, *, iteration: int = 500, optimizer: bool = False) -> Path:
        """Write every rank's file and the tracker."""
        for pipeline in range(self.pipeline):
            for rank in range(self.tensor):
                name = f"mp_rank_{rank:02d}" + (f"_{pipeline:03d}" if self.pipeline > 1 else "")
                place = directory / f"iter_{iteration:07d}" / name
                place.mkdir(parents=True)
                numbers = [v * self.pipeline + pipeline for v in range(self.virtual)]
                chunks = [self.chunk(rank, number) for number in numbers]
                keys = ["model"] if self.virtual == 1 else [f"model{v}" for v in range(self.virtual)]
                state: dict[str, Any] = {"args": self.args, "checkpoint_version": 3.0, "iteration": iteration}
                state |= dict(zip(keys, chunks, strict=True))
                state["rng_state"] = [{"torch_rng_state": torch.get_rng_state()}]
                if optimizer:
                    state["optimizer"] = adam_state(chunks, iteration)
                torch.save(state, place / "model_optim_rng.pt")
        (directory / "latest_checkpointed_iteration.txt").write_text(str(iteration))
        return directory

    @torch.no_grad()
    def logits(self, tokens: Tensor) -> Tensor:
        """Logits [batch, seq, VOCAB] computed on the ranks' tensors in float64."""
        ranks = [{n: t.double() for n, t in self.ranks[0, r].items()} for r in range(self.tensor)]
        first, seq = ranks[0], tokens.shape[1]
        x = torch.cat([r["embedding.word_embeddings.weight"] for r in ranks])[tokens]
        if not self.is_llama:
            x = x + first["embedding.position_embeddings.weight"][:seq]
        for layer in range(self.layers):
            stem = f"decoder.layers.{layer}."
            y = self._norm(x, first, f"{stem}self_attention.linear_qkv.layer_norm_")
            x = x + sum(self._attention(y, r, f"{stem}self_attention.") for r in ranks)
            x = x + first.get(f"{stem}self_attention.linear_proj.bias", torch.zeros(()))
            y = self._norm(x, first, f"{stem}mlp.linear_fc1.layer_norm_")
            x = x + sum(self._mlp(y, r, f"{stem}mlp.") for r in ranks)
            x = x + first.get(f"{stem}mlp.linear_fc2.bias", torch.zeros(()))
        x = self._norm(x, first, "decoder.final_layernorm.")
        return (x @ torch.cat([r["output_layer.weight"] for r in ranks]).T)[..., :VOCAB]

    def _norm(self, x: Tensor, rank: dict[str, Tensor], name: str) -> Tensor:
        if self.is_llama:
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * rank[f"{name}weight"]
        return F.layer_norm(x, (HIDDEN,), rank[f"{name}weight"], rank[f"{name}bias"], 1e-5)

    def _attention(self, x: Tensor, rank: dict[str, Tensor], name: str) -> Tensor:
        mixed = F.linear(x, rank[f"{name}linear_qkv.weight"], rank.get(f"{name}linear_qkv.bias"))
        local, each = self.groups // self.tensor, HEADS // self.groups
        mixed = mixed.view(*x.shape[:2], local, (each + 2) * DIM)  # [batch, seq, groups, (queries + 2) * dim]
        q, k, v = mixed.split([each * DIM, DIM, DIM], dim=3)
        q = q.reshape(*x.shape[:2], local * each, DIM)
        k, v = (t.repeat_interleave(each, dim=2) for t in (k, v))
        if self.is_llama:
            q, k = self._rope(q), self._rope(k)
        scores = torch.einsum("bshd,bthd->bhst", q, k) / math.sqrt(DIM)
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        weights = scores.masked_fill(mask, float("-inf")).softmax(-1)
        out = torch.einsum("bhst,bthd->bshd", weights, v).flatten(2)
        return out @ rank[f"{name}linear_proj.weight"].T

    @staticmethod
    def _rope(x: Tensor) -> Tensor:
        inverse = 500.0 ** -(torch.arange(0, DIM, 2, dtype=torch.float64) / DIM)
        angles = torch.outer(torch.arange(x.shape[1], dtype=torch.float64), inverse).repeat(1, 2)[:, None]
        low, high = x.chunk(2, dim=-1)
        return x * angles.cos() + torch.cat((-high, low), dim=-1) * angles.sin()

    def _mlp(self, x: Tensor, rank: dict[str, Tensor], name: str) -> Tensor:
        y = F.linear(x, rank[f"{name}linear_fc1.weight"], rank.get(f"{name}linear_fc1.bias"))
        if self.is_llama:
            gate, up = y.chunk(2, dim=-1)
            y = F.silu(gate) * up
        else:
            y = F.gelu(y, approximate="tanh")
        return y @ rank[f"{name}linear_fc2.weight"].T


def adam_state(chunks: list[dict[str, Any]], iteration: int) -> dict[str, Any]:
    """Float16OptimizerWithFloat16Params: groups with and without weight decay, masters beside the moments.

    A moment is a function of its master, so that a test can say which is whose.
    """
    params = [(n, t) for chunk in chunks for n, t in chunk.items() if isinstance(t, Tensor)]
    groups, masters, state, number = [], [], {}, 0
    for wd_mult in (1.0, 0.0):
        members = [t for n, t in params if (n.endswith("bias") or t.dim() == 1) == (wd_mult == 0.0)]
        numbers = list(range(number, number + len(members)))
        number += len(members)
        groups.append({"params": numbers, "wd_mult": wd_mult, "lr_mult": 1.0, "step": iteration})
        masters.append([t.float() for t in members])
        for index, tensor in zip(numbers, members, strict=True):
            state[index] = {"exp_avg": tensor.float() * 2, "exp_avg_sq": tensor.float().abs()}
    return {"optimizer": {"state": state, "param_groups": groups}, "fp32_from_fp16_params": masters}
