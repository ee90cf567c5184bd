"""The weights and optimizer state of a Megatron-Core folder under our names, whichever version and layout wrote them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from megatron_swift.checkpoint.formats import open_tensors
from megatron_swift.checkpoint.layout import TensorSpec
from megatron_swift.utils.errors import CheckpointError

MASTER = "optimizer.state.fp32_param."
# Megatron-Core's fully_reshardable optimizer state (0.16) calls the float32 weights so.
_OTHER_MASTER = "optimizer.state.param."
_VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")
_MODEL = ("decoder.", "embedding.", "output_layer.")


class MegatronWeights:
    """Opening it checks that the folder holds every parameter in its shape, and none that the model has not.

    Accepted besides our own files: the keys of Megatron-Core's local (not Transformer-Engine) layers, and vocabularies padded with
    rows that no token uses. Raises CheckpointError naming what is missing or unexpected.
    """

    def __init__(self, folder: Path, specs: dict[str, TensorSpec], *, num_layers: int):
        self.files = open_tensors(folder, specs, num_layers=num_layers)
        self.num_layers, self.specs = num_layers, specs
        self._keys = {spec.megatron_key: self._stored_key(spec.megatron_key) for spec in specs.values()}
        stored = self.files.tensors.keys()
        missing = sorted({key for key, found in self._keys.items() if found not in stored})
        known = set(self._keys.values())
        extra = sorted(k for k in stored if k.startswith(_MODEL) and k not in known)
        if missing or extra:
            raise CheckpointError(
                f"the weights in {folder} do not fit the model",
                why=f"missing: {missing[:10]}; unexpected: {extra[:10]}",
                do="give the model it was trained from",
            )
        for spec in specs.values():
            self._check_shape(spec)

    def _stored_key(self, key: str) -> str:
        """Local layers save the norm before experts under the name that it has in a dense layer."""
        local = key.replace(".pre_mlp_layernorm.", ".mlp.linear_fc1.layer_norm_")
        return local if key not in self.files and local in self.files else key

    def _check_shape(self, spec: TensorSpec) -> None:
        whole, found = spec.megatron_shape(self.num_layers), self.files.shape(self._keys[spec.megatron_key])
        padded = spec.name in _VOCABULARY and found[1:] == whole[1:] and found[0] > whole[0]
        if found != whole and not padded:
            raise CheckpointError(
                f"{self.files.folder}: {spec.megatron_key} has shape {found}, the model needs {whole}"
            )

    def key(self, spec: TensorSpec, prefix: str = "") -> str:
        """The stored key of a parameter, or with a prefix (MASTER, "optimizer.state.exp_avg.") of its optimizer state."""
        key = prefix + self._keys[spec.megatron_key]
        if prefix == MASTER and key not in self.files:
            other = _OTHER_MASTER + self._keys[spec.megatron_key]
            return other if other in self.files else key
        return key

    def has(self, prefix: str) -> bool:
        """Whether every parameter has a tensor behind the prefix."""
        return all(self.key(spec, prefix) in self.files for spec in self.specs.values())

    def read(
        self,
        spec: TensorSpec,
        start: int = 0,
        stop: int | None = None,
        *,
        columns: tuple[int, int] | None = None,
        prefix: str = "",
    ) -> Tensor:
        """Rows [start, stop), columns [columns) of a parameter, or with a prefix of its optimizer state."""
        stop = spec.shape[0] if stop is None else stop
        width = spec.shape[1:] if columns is None else (columns[1] - columns[0],)
        parts = [
            self.files.read(self.key(spec, prefix), offset, size).reshape(last - first, *width)
            for (first, last), offset, size in spec.megatron_boxes(start, stop, columns)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def read_into(
        self, out: Tensor, spec: TensorSpec, start: int, *, columns: tuple[int, int] | None = None, prefix: str = ""
    ) -> None:
        """Like `read`, of as many rows as `out` has, into it."""
        key = self.key(spec, prefix)
        for (first, last), offset, size in spec.megatron_boxes(start, start + len(out), columns):
            part = out[first - start : last - start]
            if part.is_contiguous():
                self.files.fill(part.view(size), key, offset)
            else:
                part.copy_(self.files.read(key, offset, size).reshape(part.shape))
