"""What Megatron-LM calls the tensors and sizes of a model: one table for all families, and args to config and back.

    megads                            layers.3.attention_norm.weight
    core, Transformer Engine          decoder.layers.3.self_attention.linear_qkv.layer_norm_weight
    core, local layers                decoder.layers.3.input_layernorm.weight
    before core, Megatron-DeepSpeed   encoder.layers.3.input_layernorm.weight

A tensor's names are alternatives: the one that is there is read; which are written is the user's `--transformer-impl`.
How tensors are cut over ranks: checkpoint/megatron.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from megads.checkpoint.hf_names import grouped, pattern
from megads.config.model import ModelConfig
from megads.errors import CheckpointError
from megads.model.hugging_face import refuse_width

TransformerImpl = Literal["transformer_engine", "local"]
FAMILIES = ("gpt", "llama")
HEAD_COPY = ("output_layer.weight", "word_embeddings_for_head.weight")
"""What the last stage calls its copy of a tied embedding."""


@dataclass(frozen=True, slots=True)
class MegatronRow:
    """Megatron's names of one tensor; `*` stands for the layer number.

    Attributes:
        name: logical name.
        engine: with Transformer Engine's layers.
        local: with Megatron's own layers.
        older: before Megatron core (`language_model` left out), and in Megatron-DeepSpeed.
    """

    name: str
    engine: str
    local: str
    older: tuple[str, ...]


def _layer(
    name: str, engine: str, older: str, *, local: str | None = None
) -> tuple[MegatronRow, MegatronRow]:
    """Weight and bias of one module of a layer."""
    found = []
    for kind in ("weight", "bias"):
        te = f"decoder.layers.*.{engine}{'_' if engine.endswith('layer_norm') else '.'}{kind}"
        own = te if local is None else f"decoder.layers.*.{local}.{kind}"
        old = tuple(
            f"{stem}.layers.*.{part}.{kind}" for stem in ("encoder", "transformer") for part in older.split()
        )
        found.append(MegatronRow(f"layers.*.{name}.{kind}", te, own, old))
    return found[0], found[1]


ROWS: tuple[MegatronRow, ...] = (
    MegatronRow(
        "embedding.word.weight",
        "embedding.word_embeddings.weight",
        "embedding.word_embeddings.weight",
        ("embedding.word_embeddings.weight",),
    ),
    MegatronRow(
        "embedding.position.weight",
        "embedding.position_embeddings.weight",
        "embedding.position_embeddings.weight",
        ("embedding.position_embeddings.weight",),
    ),
    *_layer(
        "attention_norm",
        "self_attention.linear_qkv.layer_norm",
        "input_layernorm input_norm",
        local="input_layernorm",
    ),
    *_layer(
        "attention.qkv",
        "self_attention.linear_qkv",
        "self_attention.query_key_value attention.query_key_value",
    ),
    *_layer("attention.out", "self_attention.linear_proj", "self_attention.dense attention.dense"),
    *_layer(
        "mlp_norm",
        "mlp.linear_fc1.layer_norm",
        "post_attention_layernorm post_attention_norm",
        local="pre_mlp_layernorm",
    ),
    *_layer("mlp.up", "mlp.linear_fc1", "mlp.dense_h_to_4h"),
    *_layer("mlp.gate_up", "mlp.linear_fc1", "mlp.dense_h_to_4h"),
    *_layer("mlp.down", "mlp.linear_fc2", "mlp.dense_4h_to_h"),
    *(
        MegatronRow(
            f"head.norm.{kind}",
            f"decoder.final_layernorm.{kind}",
            f"decoder.final_layernorm.{kind}",
            tuple(
                f"{stem}.{name}.{kind}"
                for stem in ("encoder", "transformer")
                for name in ("final_layernorm", "final_norm")
            ),
        )
        for kind in ("weight", "bias")
    ),
    MegatronRow("head.output.weight", "output_layer.weight", "output_layer.weight", ("output_layer.weight",)),
)

_BY_NAME: Mapping[str, MegatronRow] = MappingProxyType({row.name: row for row in ROWS})


def written_names(names: Sequence[str], *, impl: TransformerImpl) -> dict[str, str]:
    """Logical name -> the name that Megatron core reads, layers numbered over the whole model.

    Raises:
        CheckpointError: a tensor that Megatron's models of these families do not have.
    """
    found = {}
    for name, row in _rows_of(names).items():
        found[name] = _numbered(row.engine if impl == "transformer_engine" else row.local, name)
    return found


def read_names(names: Sequence[str], present: Sequence[str]) -> dict[str, str]:
    """Logical name -> the name among `present` that is the same tensor; both sides exactly once.

    Args:
        present: the checkpoint's names, layers numbered over the whole model.

    Raises:
        CheckpointError: tensors missing, or there without a place in this model.
    """
    bare = {name.removeprefix("language_model."): name for name in present}
    found: dict[str, str] = {}
    for name, row in _rows_of(names).items():
        choices = (_numbered(choice, name) for choice in (row.engine, row.local, *row.older))
        chosen = next((choice for choice in choices if choice in bare), None)
        if chosen is not None:
            found[name] = bare.pop(chosen)
    missing = [name for name in names if name not in found]
    extra = [name for short, name in bare.items() if short not in HEAD_COPY or "head.output.weight" in names]
    lines = [
        f"{len(n)} {title}: {grouped(n)}" for title, n in (("missing", missing), ("unexpected", extra)) if n
    ]
    if lines:
        raise CheckpointError(
            "Megatron's tensors are not those of this model",
            found="\n           ".join(lines),
            allowed=f"{len(names)} tensors",
        )
    return found


def _rows_of(names: Sequence[str]) -> dict[str, MegatronRow]:
    unknown = [name for name in names if pattern(name) not in _BY_NAME]
    if unknown:
        raise CheckpointError(
            "this model has tensors that the table of Megatron's names leaves out", found=grouped(unknown)
        )
    return {name: _BY_NAME[pattern(name)] for name in names}


def _numbered(foreign: str, name: str) -> str:
    layer = next((word for word in name.split(".") if word.isdigit()), "")
    return foreign.replace("*", layer)


def section_of(args: Mapping[str, Any], *, vocab: int | None) -> dict[str, Any]:
    """The config section `model` of a run's args.

    Args:
        vocab: token ids, where the args do not say how many rows of the embedding are no padding.

    Raises:
        CheckpointError: an architecture that no family of megads computes, naming the argument.
    """
    for name, allowed, default in _MUST_BE:
        _require(args, name, allowed, default)
    is_rotary = args.get("position_embedding_type") == "rope" or bool(
        args.get("use_rotary_position_embeddings")
    )
    is_rms = str(args.get("normalization", "LayerNorm")).lower() == "rmsnorm"
    is_gated = bool(args.get("swiglu", False))
    has_bias = bool(args.get("add_bias_linear", True)) and not args.get("disable_bias_linear")
    traits = {"rope": is_rotary, "RMSNorm": is_rms, "swiglu": is_gated, "no biases": not has_bias}
    if len(set(traits.values())) != 1:
        raise CheckpointError(
            "the args are of an architecture that no family of megads has",
            found=", ".join(name if value else f"not {name}" for name, value in traits.items()),
            allowed="all of them (llama) or none (gpt)",
        )
    heads = args.get("num_attention_heads")
    groups = args.get("num_query_groups") if args.get("group_query_attention", True) else None
    section: dict[str, Any] = {
        "family": "llama" if is_rotary else "gpt",
        "layers": args.get("num_layers"),
        "hidden": args.get("hidden_size"),
        "heads": heads,
        "kv_heads": groups or args.get("num_key_value_heads") or heads,
        "head_dim": args.get("kv_channels"),
        "ffn": args.get("ffn_hidden_size"),
        "vocab": vocab or args.get("vocab_size") or args.get("padded_vocab_size"),
        "max_positions": args.get("max_position_embeddings"),
        "tied": not args.get("untie_embeddings_and_output_weights", False),
        "norm_eps": args.get("norm_epsilon", args.get("layernorm_epsilon", 1e-5)),
        "dropout": args.get("hidden_dropout", 0.0),
        "attention_dropout": args.get("attention_dropout", 0.0),
        "init_std": args.get("init_method_std", 0.02),
    }
    if is_rotary:
        section["rope_theta"] = float(args.get("rotary_base", 10000))
    return section


_MUST_BE: tuple[tuple[str, tuple[object, ...], object], ...] = (
    ("apply_residual_connection_post_layernorm", (False,), False),
    ("apply_layernorm_1p", (False,), False),
    ("squared_relu", (False,), False),
    ("qk_layernorm", (False,), False),
    ("add_qkv_bias", (False,), False),
    ("multi_latent_attention", (False,), False),
    ("num_experts", (None, 0, 1, [1]), None),
    ("mtp_num_layers", (None, 0), None),
    ("rotary_percent", (None, 1.0), 1.0),
    ("rotary_interleaved", (False,), False),
    ("use_rope_scaling", (False,), False),
    ("rotary_seq_len_interpolation_factor", (None, 1), None),
)


def _require(args: Mapping[str, Any], name: str, allowed: tuple[object, ...], default: object) -> None:
    found = args.get(name, default)
    if found not in allowed:
        raise CheckpointError(
            f"args: {name} is not what megads' families compute",
            found=found,
            allowed=" or ".join(map(str, allowed)),
        )


def args_of(model: ModelConfig, *, sequence_length: int) -> dict[str, Any]:
    """The args of a Megatron run of this model: what `--use-checkpoint-args` reads, and what it compares.

    Args:
        model: complete.

    Raises:
        CheckpointError: a model scaled by muP.
    """
    refuse_width(model)
    if model.family not in FAMILIES:
        raise CheckpointError(
            "the table of Megatron's args leaves out this family",
            found=f"model.family {model.family}",
            allowed=", ".join(FAMILIES),
        )
    is_llama = model.family == "llama"
    return {
        "num_layers": model.layers,
        "hidden_size": model.hidden,
        "ffn_hidden_size": model.ffn,
        "num_attention_heads": model.heads,
        "kv_channels": model.head_dim,
        "group_query_attention": model.kv_heads != model.heads,
        "num_query_groups": model.kv_heads,
        "seq_length": sequence_length,
        "max_position_embeddings": model.max_positions,
        "position_embedding_type": "rope" if is_llama else "learned_absolute",
        "add_position_embedding": not is_llama,
        "use_rotary_position_embeddings": is_llama,
        "rotary_percent": 1.0,
        "rotary_base": model.rope_theta if is_llama else 10000,
        "normalization": "RMSNorm" if is_llama else "LayerNorm",
        "norm_epsilon": model.norm_eps,
        "layernorm_epsilon": model.norm_eps,
        "swiglu": is_llama,
        "openai_gelu": not is_llama,
        "add_bias_linear": not is_llama,
        "add_qkv_bias": False,
        "untie_embeddings_and_output_weights": not model.tied,
        "hidden_dropout": model.dropout,
        "attention_dropout": model.attention_dropout,
        "init_method_std": model.init_std,
        "vocab_size": model.vocab,
        "qk_layernorm": False,
        "apply_layernorm_1p": False,
        "apply_residual_connection_post_layernorm": False,
        "use_legacy_models": False,
    }
