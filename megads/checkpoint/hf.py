"""Models in Hugging Face's format: safetensors files out and in, transformers as the judge.

Which tensor is called what: hf_names.py. What else belongs to an export (config, tokenizer, comparison, commit) is
`assemble/convert.py`'s business. The only file that imports safetensors and transformers.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from megads.checkpoint.foreign import Values
from megads.checkpoint.fp8_blocks import SCALE_SUFFIX, Quantised, dequantise, scale_shape
from megads.checkpoint.hf_names import Entry, grouped, pattern
from megads.checkpoint.store import Buffer, Store, write_file
from megads.errors import CheckpointError
from megads.parallel.shard import Shape

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
MAX_INDEX_BYTES = 1 << 28
FORMAT_DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
)
"""Name of a dtype in a safetensors file -> the dtype; only these hold weights, and FP8 where it has scales."""
FP8 = "F8_E4M3"

_SHARD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}\.safetensors")


def write_weights(
    directory: Path, tensors: Mapping[str, Values], *, max_shard_bytes: int, store: Store
) -> None:
    """Write the model's safetensors files, and their index if there are several.

    One tensor is in memory at a time (safetensors' own writer wants a whole file's). A tensor that is larger than
    `max_shard_bytes` gets a file of its own.

    Args:
        tensors: by Hugging Face's names; float8_e4m3fn is written too, its scales are tensors of their own.

    Raises:
        OSError: with the path.
    """
    shards = _plan(tensors, max_shard_bytes)
    names = [
        SINGLE_NAME if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        for number in range(1, len(shards) + 1)
    ]
    for name, shard in zip(names, shards, strict=True):
        write_file(store, directory / name, blocks=_file_blocks({key: tensors[key] for key in shard}))
    if len(shards) > 1:
        places = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        total = sum(values.size for values in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": places}
        write_json(directory / INDEX_NAME, index, store=store)


def write_json(path: Path, tree: object, *, store: Store) -> None:
    """Write and sync a JSON file."""
    write_file(store, path, blocks=[(json.dumps(tree, indent=2, ensure_ascii=False) + "\n").encode()])


def _plan(tensors: Mapping[str, Values], max_bytes: int) -> list[list[str]]:
    """Names in order, cut into files of at most `max_bytes`."""
    shards: list[list[str]] = [[]]
    room = max_bytes
    for name, values in tensors.items():
        if values.size > room and shards[-1]:
            shards.append([])
            room = max_bytes
        shards[-1].append(name)
        room -= values.size
    return shards


def _file_blocks(tensors: Mapping[str, Values]) -> Iterator[Buffer]:
    """A safetensors file: length of the header (8 bytes, little-endian), header (JSON), the tensors' bytes."""
    kinds = {dtype: name for name, dtype in (*FORMAT_DTYPES.items(), (FP8, torch.float8_e4m3fn))}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, values in tensors.items():
        start, end = end, end + values.size
        header[name] = {"dtype": kinds[values.dtype], "shape": values.shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for values in tensors.values():
        yield values.whole().contiguous().reshape(-1).view(torch.uint8).numpy().data


class Weights:
    """The tensors of a directory's safetensors files, lazily: memory-mapped, so that only what is used is read.

    FP8 weights with scales of their blocks (fp8_blocks.py) are one tensor of fp32 here; the scales have no name.

    Attributes:
        shapes: Hugging Face name -> shape.
        dtypes: Hugging Face name -> dtype of its values as a file names it, e.g. `F32`.
        has_fp8: whether some are stored in FP8.

    Raises:
        CheckpointError: no safetensors there, a file that is damaged or is not where the index says, scales that do
            not fit.
    """

    def __init__(self, directory: Path) -> None:
        self._places: dict[str, Any] = {}
        self.shapes: dict[str, Shape] = {}
        self.dtypes: dict[str, str] = {}
        for file, names in _files(directory).items():
            self._open(directory / file, names)
        stored = [n for n, kind in self.dtypes.items() if kind == FP8 and n + SCALE_SUFFIX in self.shapes]
        self._quantised = frozenset(stored)
        self.has_fp8 = bool(stored)
        for name in stored:
            self._join(name)

    def tensor(self, name: str) -> Tensor:
        """The values of a tensor."""
        values = self._stored(name)
        if name not in self._quantised:
            return values
        return dequantise(Quantised(values, self._stored(name + SCALE_SUFFIX)))

    def _stored(self, name: str) -> Tensor:
        values: Tensor = self._places[name].get_tensor(name)
        return values

    def _join(self, name: str) -> None:
        """Make one tensor of FP8 weights and their scales."""
        scales = name + SCALE_SUFFIX
        found, kind = self.shapes.pop(scales), self.dtypes.pop(scales)
        wanted = scale_shape(self.shapes[name])
        if len(wanted) != 2 or found != wanted or kind not in FORMAT_DTYPES:
            raise CheckpointError(
                f"{scales}: not the scales of FP8 weights {self.shapes[name]}",
                found=f"{kind} {found}",
                allowed=f"F32 {wanted}, one for each block of 128 x 128 of a matrix",
            )
        self.dtypes[name] = "F32"

    def _open(self, file: Path, names: frozenset[str] | None) -> None:
        import safetensors

        try:
            opened: Any = safetensors.safe_open(file, framework="pt")  # checks header, offsets and sizes
        except (OSError, safetensors.SafetensorError) as error:
            raise CheckpointError(f"{file}: not a readable safetensors file", found=error) from error
        found = frozenset(opened.keys())
        if names is not None and names != found:
            raise CheckpointError(
                f"{file}: its tensors are not those that {INDEX_NAME} says",
                found=grouped(sorted(names ^ found)),
            )
        for name in sorted(found):
            part = opened.get_slice(name)
            self._places[name] = opened
            self.shapes[name] = tuple(part.get_shape())
            self.dtypes[name] = part.get_dtype()


def _files(directory: Path) -> dict[str, frozenset[str] | None]:
    """Safetensors files of a model -> the tensors that the index puts there; None: whatever is in it."""
    index = directory / INDEX_NAME
    if not index.exists():
        if not (directory / SINGLE_NAME).is_file():
            pickles = sorted(path.name for path in directory.glob("*.bin")) if directory.is_dir() else []
            raise CheckpointError(
                f"{directory}: no weights in safetensors format",
                found=", ".join(pickles) or "neither file",
                allowed=f"{SINGLE_NAME}, or {INDEX_NAME} with its files (pickles can run code and are not read)",
            )
        return {SINGLE_NAME: None}
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise CheckpointError(f"{index}: no weight_map", allowed="tensor name -> file name")
    files: dict[str, set[str]] = {}
    for name, file in places.items():
        if not isinstance(file, str) or not _SHARD_NAME.fullmatch(file):
            raise CheckpointError(
                f"{index}: not the name of a file in this directory",
                found=repr(file)[:200],
                allowed="a plain name that ends with .safetensors",
            )
        files.setdefault(file, set()).add(name)
    return {file: frozenset(names) for file, names in files.items()}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of bounded size.

    Raises:
        CheckpointError: not there, too large, or no JSON object.
    """
    try:
        with path.open("rb") as stream:
            data = stream.read(MAX_INDEX_BYTES + 1)
        if len(data) > MAX_INDEX_BYTES:
            raise ValueError(f"more than {MAX_INDEX_BYTES} bytes")
        tree = json.loads(data)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a readable JSON file", found=error) from error
    if not isinstance(tree, dict):
        raise CheckpointError(f"{path}: not a JSON object", found=type(tree).__name__)
    return tree


def check_names(entries: Sequence[Entry], weights: Weights, *, ignored: Sequence[str] = ()) -> None:
    """Refuse weights that are not exactly those of `entries`, each in its shape; `ignored` names patterns.

    Raises:
        CheckpointError: missing, unexpected and misshapen tensors, grouped.
    """
    wanted = {entry.foreign: entry for entry in entries}
    missing = [name for name in wanted if name not in weights.shapes]
    extra = [name for name in weights.shapes if name not in wanted and pattern(name) not in ignored]
    changed = [
        f"{name} {weights.shapes[name]} for {entry.shape}"
        for name, entry in wanted.items()
        if weights.shapes.get(name, entry.shape) != entry.shape
    ]
    kinds = [name for name in wanted if name in weights.dtypes and weights.dtypes[name] not in FORMAT_DTYPES]
    groups = (("missing", missing), ("unexpected", extra), ("misshapen", changed), ("no weights", kinds))
    lines = [f"{len(names)} {title}: {grouped(names)}" for title, names in groups if names]
    if lines:
        raise CheckpointError(
            "the Hugging Face tensors are not those of this model",
            found="\n           ".join(lines),
            allowed=f"{len(wanted)} tensors",
        )


def check_copies(weights: Weights, copies: Mapping[str, str]) -> None:
    """Refuse copies of a tensor that are not what they repeat.

    Args:
        copies: pattern of names -> the name of what they repeat.

    Raises:
        CheckpointError: naming the first one that differs.
    """
    for name in weights.shapes:
        original = copies.get(pattern(name))
        if original in weights.shapes and not torch.equal(weights.tensor(name), weights.tensor(original)):
            raise CheckpointError(
                f"{name}: not what {original} is",
                found="two tensors",
                allowed="copies: megads has one weight for both",
            )


def check_installed() -> None:
    """Refuse to begin without the library that reads safetensors.

    Raises:
        CheckpointError: it is not installed.
    """
    if importlib.util.find_spec("safetensors") is None:
        raise CheckpointError(
            "Hugging Face's format needs the library safetensors, which is not installed",
            do="pip install safetensors transformers (or megads[hf]); transformers compares the logits",
        )


def has_transformers() -> bool:
    """Whether transformers is installed."""
    return importlib.util.find_spec("transformers") is not None


@dataclass(frozen=True, slots=True)
class TransformersOutputs:
    """What transformers computes: hidden states [batch, seq, hidden] after the embedding and after each layer but the
    last (what stands there is behind the final norm), and logits [batch, seq, vocab].
    """

    states: tuple[Tensor, ...]
    logits: Tensor


@torch.no_grad()
def transformers_outputs(
    directory: Path, tokens: Tensor, *, dtype: torch.dtype, unread: tuple[str, ...] = ()
) -> TransformersOutputs:
    """What the model in `directory` computes by transformers alone.

    Args:
        tokens: [batch, seq] int64.
        dtype: of the arithmetic.
        unread: name prefixes of weights that transformers' model has no place for (multi-token prediction).

    Raises:
        CheckpointError: transformers misses weights, does not know some, or cannot load the model.
    """
    import transformers

    library: Any = transformers
    library.utils.logging.disable_progress_bar()
    try:
        model, report = library.AutoModelForCausalLM.from_pretrained(
            directory, dtype=dtype, output_loading_info=True, local_files_only=True, use_safetensors=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{directory}: transformers cannot load the model", found=error) from error
    report["unexpected_keys"] = [n for n in report["unexpected_keys"] if not n.startswith(unread)]
    wrong = {kind: names for kind, names in report.items() if names}
    if wrong:
        raise CheckpointError(f"{directory}: transformers loads the model with a remark", found=wrong)
    is_tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    if is_tied != model.config.tie_word_embeddings:  # some versions obey the config, some the file
        raise CheckpointError(f"{directory}: config.json and the weights differ in whether the head is tied")
    found = model.eval()(input_ids=tokens, use_cache=False, output_hidden_states=True)
    return TransformersOutputs(tuple(found.hidden_states[:-1]), found.logits)


def transformers_ids(directory: Path, text: str) -> list[int]:
    """Token ids of a text by the tokenizer in `directory`, nothing put before or after.

    Raises:
        CheckpointError: transformers cannot load the tokenizer.
    """
    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{directory}: transformers cannot load the tokenizer", found=error) from error
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return ids
