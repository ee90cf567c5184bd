"""Hugging Face folders, read by slices and written as a stream, with a strict bijection between their keys and our parameters."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from megatron_swift.checkpoint.companions import copy_companions
from megatron_swift.checkpoint.layout import (
    Block,
    HuggingFaceTensor,
    TensorSpec,
    hugging_face_tensors,
    tensor_specs,
    whole_blocks,
)
from megatron_swift.checkpoint.manifest import Entry, sum_file
from megatron_swift.checkpoint.ranks import Group, single
from megatron_swift.checkpoint.safetensors_io import INDEX, SafetensorsFolder, write_safetensors
from megatron_swift.checkpoint.weights import TORCH_DTYPES, WeightSource, list_names
from megatron_swift.models.config import ModelConfig
from megatron_swift.utils.errors import CheckpointError, StorageError

# Keys that some folders carry and that say nothing new: old transformers saved rotary frequencies; a tied head may be saved twice.
_REDUNDANT = re.compile(r".*\.rotary_emb\.inv_freq$")
_TIED_COPY = "lm_head.weight"
_STACKED = ".experts.gate_up_proj"
_ROWS_BYTES = 1 << 23  # of a tensor in memory at a time


class HuggingFaceWeights:
    """The weights of a Hugging Face folder under our names. Opening it checks that every key is used exactly once.

    Raises CheckpointError naming missing, unexpected and wrongly shaped keys.
    """

    def __init__(self, folder: Path, cfg: ModelConfig):
        self.folder, self.files = folder, SafetensorsFolder(folder)
        self.specs = tensor_specs(cfg, stacked_experts=has_stacked_experts(self.files.file_of))
        expected = hugging_face_tensors(self.specs.values())
        present = {name for name in self.files.file_of if not _REDUNDANT.match(name)}
        if cfg.tied_embeddings:
            present.discard(_TIED_COPY)
        self._check(expected, present)

    def _check(self, expected: dict[str, HuggingFaceTensor], present: set[str]) -> None:
        missing, unexpected = expected.keys() - present, present - expected.keys()
        wrong = {
            f"{name} {self.files.shape(name)} instead of {tensor.shape}"
            for name, tensor in expected.items()
            if name in present and self.files.shape(name) != tensor.shape
        }
        problems = (("missing", missing), ("unexpected", unexpected), ("wrongly shaped", wrong))
        found = "; ".join(f"{len(names)} {kind}: {list_names(names)}" for kind, names in problems if names)
        if found:
            raise CheckpointError(
                f"the weights in {self.folder} do not fit its config.json",
                why=found,
                do="use the config.json that belongs to these weights",
            )

    def read(
        self, spec: TensorSpec, start: int = 0, stop: int | None = None, *, columns: tuple[int, int] | None = None
    ) -> Tensor:
        """Rows [start, stop), columns [columns) of one of our parameters; only those are read from disk."""
        blocks = self.specs[spec.name].blocks
        stop = spec.shape[0] if stop is None else stop
        parts, row = [], 0
        for block in blocks:
            first, last = max(start, row), min(stop, row + block.rows)
            if first < last:
                parts += self._block(block, block.start + first - row, block.start + last - row, columns)
            row += block.rows
        if not parts:  # an empty slice, of a rank that holds no row
            parts = self._block(blocks[0], 0, 0, columns)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _block(self, block: Block, start: int, stop: int, columns: tuple[int, int] | None) -> list[Tensor]:
        """Rows [start, stop) of a tensor; of a stack of experts the rows are counted through."""
        tensor, where = self.files.slice(block.hf_name), (slice(*columns),) if columns is not None else ()
        if not block.experts:
            return [tensor[(slice(start, stop), *where)]]
        size = tensor.shape[1]
        found = []
        for first, last in whole_blocks(start, stop, size):
            expert, row = divmod(first, size)
            whole = (last - first) % size == 0
            rows = slice(0, size) if whole else slice(row, row + last - first)
            experts = slice(expert, expert + (last - first) // size) if whole else slice(expert, expert + 1)
            found.append(tensor[(experts, rows, *where)].flatten(0, 1))
        return found


def has_stacked_experts(names: Iterable[str]) -> bool:
    """Whether a folder's tensors hold all experts of a layer together, as transformers 5 keeps them, and not one by one."""
    return any(name.endswith(_STACKED) for name in names)


def keeps_experts_stacked(folder: Path) -> bool:
    """The same of a folder, which may hold no weights at all."""
    if not any((folder / name).is_file() for name in (INDEX, "model.safetensors")):
        return False
    return has_stacked_experts(SafetensorsFolder(folder).file_of)


def parse_size(text: str) -> int:
    """'5GB', '200MB', '1000' -> bytes: 1000s, or 1024s for KiB, MiB and so on, as transformers counts. Raises ValueError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([KMGT])(i?))?B?\s*", text, re.IGNORECASE)
    if not match:
        raise ValueError(f"{text!r} is not a size such as 5GB or 200MB")
    number, prefix, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** " KMGT".index((prefix or " ").upper()))


def write_hugging_face(
    source: WeightSource,
    cfg: ModelConfig,
    out: Path,
    *,
    like: Path,
    dtype: str,
    max_shard_size: int,
    stacked_experts: bool = False,
    group: Group | None = None,
    where: Path | None = None,
) -> None:
    """Write a complete Hugging Face folder `out` (which exists and is empty) from `source`, a few rows in memory at a time.

    like  : the folder whose config, tokenizer, template and generation files are copied; only the dtype in config.json changes.
    dtype : "float32", "bfloat16" or "float16", the type of the written weights.
    max_shard_size : bytes of weights per file; a larger tensor gets a file of its own.
    stacked_experts : write a layer's experts as one tensor (transformers 5 in memory) instead of one by one, which all readers know.
    group : the ranks that share the files out among them and all see `out`; every one of them calls it. None: this process alone.
    where : the folder that an error names instead of `out`.
    The result depends on nothing but the weights: writing it twice, on more ranks or from another layout, gives the same bytes.
    """
    group = group or single()
    specs = tensor_specs(cfg, stacked_experts=stacked_experts)
    tensors = hugging_face_tensors(specs.values())
    torch_dtype = TORCH_DTYPES[dtype]
    shards = _shards(tensors, torch_dtype.itemsize, max_shard_size)
    names = [
        "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        for number in range(1, len(shards) + 1)
    ]
    ranks = len(group.gather(None))

    def read(name: str) -> Iterator[Tensor]:
        return _in_parts(source, specs, tensors[name], torch_dtype)

    def write_mine() -> dict[str, Entry]:
        return {
            names[i]: write_safetensors(out / names[i], {n: (torch_dtype, tensors[n].shape) for n in shards[i]}, read)
            for i in range(group.rank, len(shards), ranks)
        }

    def complete() -> None:
        copy_companions(like, out, config=False)
        _write_config(like / "config.json", out / "config.json", dtype)
        if len(shards) > 1:
            total = sum(_bytes(tensor, torch_dtype.itemsize) for tensor in tensors.values())
            weight_map = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (out / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        HuggingFaceWeights(out, cfg)  # opened again: every key there, every shape right

    written = group.together(where or out, write_mine)
    group.together(where or out, lambda: _read_again(out, written[group.rank]))
    group.together(where or out, lambda: complete() if group.rank == 0 else None)


def _in_parts(
    source: WeightSource, specs: dict[str, TensorSpec], tensor: HuggingFaceTensor, dtype: torch.dtype
) -> Iterator[Tensor]:
    """A tensor's values from top to bottom."""
    for part in tensor.parts:
        spec, stop = specs[part.name], part.start + part.rows
        width = max(math.prod(spec.shape[1:]) * dtype.itemsize, 1)
        rows = max(_ROWS_BYTES // width, 1)
        for start in range(part.start, stop, rows):
            yield source.read(spec, start, min(start + rows, stop)).to(dtype)


def _read_again(out: Path, written: dict[str, Entry]) -> None:
    """Compare files with the checksums of what was written to them."""
    for name, entry in written.items():
        if sum_file(out / name) != entry:
            raise StorageError(
                f"{out / name} does not hold what was written to it",
                why="its checksum is another one",
                do="look at the disk, and export again",
            )


def _write_config(source: Path, target: Path, dtype: str) -> None:
    """config.json, byte for byte unless the dtype changes."""
    text = source.read_text(encoding="utf-8")
    config = json.loads(text)
    keys = [key for key in ("torch_dtype", "dtype") if key in config] or ["torch_dtype"]
    if any(str(config.get(key)).removeprefix("torch.") != dtype for key in keys):
        config.update(dict.fromkeys(keys, dtype))
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    target.write_text(text, encoding="utf-8")


def _bytes(tensor: HuggingFaceTensor, itemsize: int) -> int:
    return math.prod(tensor.shape) * itemsize


def _shards(tensors: dict[str, HuggingFaceTensor], itemsize: int, limit: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, tensor in tensors.items():
        size = _bytes(tensor, itemsize)
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards
