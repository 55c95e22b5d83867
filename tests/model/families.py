"""Tiny models of transformers, one or more a family, and what transformers makes of them: the judge of every family.

Weights are random and nowhere at their initial 0 or 1; routers choose by margins that rounding does not reach. The
arithmetic is transformers' own: eager attention, eager experts, float32, one process.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F

from megads.config.batch import BatchConfig
from megads.config.root import Config
from megads.verify.batch import synthetic_batch

VOCAB, SEQ, ROWS, STEPS = 61, 12, 8, 6
LEAST_MARGIN = 2e-5  # of a router's choice, in every step
OPTIM = {"betas": (0.9, 0.95), "eps": 1e-4, "weight_decay": 0.1, "clip": 1.0}
LR = 1e-3  # of megads/verify/measure.py


@dataclass(frozen=True)
class FamilyCase:
    """A tiny model.

    Attributes:
        kind: class of its config in transformers.
        changes: to the sizes below.
    """

    name: str
    kind: str
    changes: dict[str, Any] = field(default_factory=dict)
    seed: int = 0

    def __str__(self) -> str:
        return self.name

    def make(self) -> Any:
        """The model in transformers."""
        import transformers

        torch.manual_seed(self.seed)
        sizes = {
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "intermediate_size": 40,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "initializer_range": 0.2,
            "tie_word_embeddings": False,
        }
        config = getattr(transformers, self.kind)(**{**sizes, **self.changes})
        config._attn_implementation = "eager"
        config._experts_implementation = "eager"
        model = transformers.AutoModelForCausalLM.from_config(config).float()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith(("norm.weight", ".bias")):
                    parameter.add_(0.2 * torch.randn_like(parameter))
                elif "gate_up_proj" in name or "down_proj" in name or name.endswith("gate.weight"):
                    parameter.copy_(0.3 * torch.randn_like(parameter))
            for name, buffer in model.named_buffers():
                if name.endswith("e_score_correction_bias"):
                    buffer.copy_(0.2 * torch.randn_like(buffer))
        return model.eval()


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 16}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 14,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 10,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "n_shared_experts": 2,
}
SHARP = {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}
GROUPS = {"n_group": 4, "topk_group": 2}

CASES = (
    FamilyCase("llama3", "LlamaConfig", {"rope_parameters": LLAMA3}),
    FamilyCase("qwen2-tied", "Qwen2Config", {"tie_word_embeddings": True}),
    FamilyCase("qwen3", "Qwen3Config", {"head_dim": 12, "rope_parameters": YARN}),
    FamilyCase(
        "qwen3-tied-mqa",
        "Qwen3Config",
        {"head_dim": 10, "num_key_value_heads": 1, "tie_word_embeddings": True},
    ),
    FamilyCase(
        "qwen3_moe",
        "Qwen3MoeConfig",
        {**EXPERTS, "head_dim": 12, "norm_topk_prob": True, "num_hidden_layers": 4, "decoder_sparse_step": 2},
    ),
    FamilyCase("qwen3_moe-plain-gates", "Qwen3MoeConfig", {**EXPERTS, "head_dim": 8, "mlp_only_layers": [1]}),
    FamilyCase("mixtral", "MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}, seed=1),
    FamilyCase("deepseek_v2-lite", "DeepseekV2Config", {**LATENT, "q_lora_rank": None}, seed=2),
    FamilyCase(
        "deepseek_v2",
        "DeepseekV2Config",
        {
            **LATENT,
            **GROUPS,
            "q_lora_rank": 18,
            "topk_method": "group_limited_greedy",
            "routed_scaling_factor": 3.0,
            "rope_parameters": {**SHARP, "mscale": 0.7, "mscale_all_dim": 0.7},
        },
        seed=4,
    ),
    FamilyCase(
        "deepseek_v3",
        "DeepseekV3Config",
        {
            **LATENT,
            **GROUPS,
            "q_lora_rank": 18,
            "num_mtp_layers": 0,
            "rope_parameters": SHARP,
            "rms_norm_eps": 1e-5,
        },
        seed=1,
    ),
)


@dataclass(frozen=True)
class Judgement:
    """What transformers makes of a case.

    Attributes:
        logits: [batch, seq, vocab] of the batch of step 1.
        gradients: of step 1, before clipping, by transformers' names.
        losses: of each step.
        margin: the least by which a router chose, in all steps.
    """

    logits: torch.Tensor
    gradients: dict[str, torch.Tensor]
    losses: list[float]
    margin: float


def training_config(config: Config) -> Config:
    """The config of an imported model, with the batch and optimizer of these tests."""
    optim = replace(config.optim, **OPTIM)
    return replace(
        config,
        model=replace(config.model, bias_rate=1e-12),  # transformers moves no bias
        batch=BatchConfig(global_size=ROWS, micro=1),
        data=replace(config.data, sequence_length=SEQ),
        optim=optim,
    )


def judge(model: Any, config: Config) -> Judgement:
    """Train the model in transformers and torch for some steps on the batches of `config`."""
    margins: list[float] = []
    for module in model.modules():
        if type(module).__name__.lower().endswith("topkrouter"):
            module.register_forward_hook(lambda router, _, out: margins.append(_margin(router, out[0])))
    norms_and_biases = [p for p in model.parameters() if p.dim() == 1]
    matrices = [p for p in model.parameters() if p.dim() > 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices}, {"params": norms_and_biases, "weight_decay": 0.0}],
        lr=LR,
        betas=config.optim.betas,
        eps=config.optim.eps,
        weight_decay=config.optim.weight_decay,
    )
    found: list[tuple[torch.Tensor, dict[str, torch.Tensor], float]] = []
    for step in range(1, STEPS + 1):
        batch = synthetic_batch(config, step)
        optimizer.zero_grad()
        logits = model(input_ids=batch.tokens, use_cache=False).logits
        losses = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="none")
        loss = losses[batch.mask.flatten()].sum() / batch.mask.sum()
        loss.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
        found.append((logits.detach(), gradients, loss.item()))
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip or float("inf"))
        optimizer.step()
    logits, gradients, _ = found[0]
    return Judgement(logits, gradients, [loss for *_, loss in found], min(margins, default=float("inf")))


def _margin(router: Any, logits: torch.Tensor) -> float:
    bias = getattr(router, "e_score_correction_bias", None)
    scores = logits.detach().softmax(-1) if bias is None else logits.detach().sigmoid() + bias
    groups, kept = getattr(router, "num_group", None) or 1, getattr(router, "topk_group", None) or 1
    margin = float("inf")
    if kept < groups:
        members = scores.view(-1, groups, scores.shape[-1] // groups)
        worth = members.topk(1 if bias is None else 2, dim=-1).values.sum(-1)
        order = worth.sort(dim=-1, descending=True)
        margin = float((order.values[:, kept - 1] - order.values[:, kept]).min())
        scores = members.gather(1, order.indices[:, :kept, None].expand(-1, -1, members.shape[-1])).flatten(1)
    best = scores.topk(router.top_k + 1, dim=-1).values
    return min(margin, float((best[..., -2] - best[..., -1]).min()))
