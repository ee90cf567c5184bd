"""The one interface behind which weights lie, whatever the format of their folder."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor

from megatron_swift.checkpoint.layout import TensorSpec

TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class WeightSource(Protocol):
    """Weights by our parameter names, read by slices."""

    def read(
        self, spec: TensorSpec, start: int = 0, stop: int | None = None, *, columns: tuple[int, int] | None = None
    ) -> Tensor:
        """Rows [start, stop), columns [columns) of a parameter on the CPU, in the dtype it is stored in; by default all of it."""
        ...


def list_names(names: Iterable[str], limit: int = 10) -> str:
    """The first names and how many more there are, for an error."""
    names = sorted(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
