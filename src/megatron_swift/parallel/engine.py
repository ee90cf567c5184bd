"""A model spread over the ranks, behind four calls. The training loop does not know which parallelism is on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from megatron_swift.data.types import IGNORE, Batch
from megatron_swift.kernels.attention import Segments, choose_attention
from megatron_swift.kernels.cross_entropy import chunked_linear_cross_entropy, linear_cross_entropy
from megatron_swift.models.config import ModelConfig
from megatron_swift.models.decoder import Decoder, Row, build_decoder
from megatron_swift.parallel import data as data_parallel
from megatron_swift.parallel.mesh import Mesh
from megatron_swift.parallel.shards import Shards


class Counts(NamedTuple):
    """Sizes of a global batch. squares: the sum of squared segment lengths, for the attention's FLOPs."""

    trained: int
    tokens: int
    squares: int


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How to compute. compute_dtype: the dtype of weights in matrix products; 16-bit types keep a float32 master."""

    compute_dtype: torch.dtype
    attention_backend: str = "auto"
    softmax_in_fp32: bool = True
    chunked_cross_entropy: bool = False


class Engine:
    """Forward, backward and evaluation of a model on its mesh.

    shards : the local parameters. kernels : one line per choice of kernel, for the start-up banner.
    """

    def __init__(
        self, model: Decoder, mesh: Mesh, shards: Shards, *, exact_dtype: torch.dtype, kernels: dict[str, str]
    ):
        self.model, self.mesh, self.shards, self.kernels = model, mesh, shards, kernels
        self.exact_dtype = exact_dtype

    def count(self, batches: Sequence[Batch]) -> Counts:
        """What the batches of all data-parallel ranks hold, by one all-reduce."""
        trained, tokens = sum(b.num_trained for b in batches), sum(len(b.tokens) for b in batches)
        squares = sum(n * n for b in batches for n in b.lengths)
        return Counts(*(int(n) for n in self.mesh.sum([trained, tokens, squares])))

    def forward_backward(self, batches: Sequence[Batch], *, num_tokens: int, loss_scale: float = 1.0) -> float:
        """Leave in the shards the gradient of (sum of token losses) / num_tokens over all ranks; returns the sum of token losses over all ranks.

        num_tokens : trained tokens of the global batch. loss_scale : fp16's; it is divided out of the gradients again.
        """
        scale = torch.tensor(loss_scale / num_tokens, dtype=self.exact_dtype, device=self.mesh.device)
        total = torch.zeros((), dtype=self.exact_dtype, device=self.mesh.device)
        for number, batch in enumerate(batches, 1):
            data_parallel.before_backward(self.model, last=number == len(batches))
            loss = self.model(self._row(batch), scale)
            loss.backward()
            total += loss.detach()
        self.shards.pull(1.0 / loss_scale)
        return self.mesh.sum([float(total)])[0] * num_tokens / loss_scale

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch]) -> tuple[float, int]:
        """(sum of token losses, number of trained tokens) of the batches of all ranks; no gradient is left behind."""
        one = torch.ones((), dtype=self.exact_dtype, device=self.mesh.device)
        total = sum(float(self.model(self._row(batch), one)) for batch in batches)
        data_parallel.reshard(self.model)
        loss, tokens = self.mesh.sum([total, sum(b.num_trained for b in batches)])
        return loss, int(tokens)

    def _row(self, batch: Batch) -> Row:
        device = self.mesh.device
        index = np.flatnonzero(batch.labels != IGNORE)  # on the host: a mask on the device would cost a synchronisation
        return Row(
            _to(batch.tokens, device),
            _to(batch.positions, device),
            Segments.of(batch.lengths, device),
            _to(index, device),
            _to(batch.labels[index], device),
        )


def _to(array: np.ndarray, device: torch.device) -> Tensor:
    # A copy: rows come from a read-only memory map, which torch refuses to share quietly.
    return torch.from_numpy(np.array(array, dtype=np.int64)).to(device, non_blocking=True)


def build_engine(cfg: ModelConfig, mesh: Mesh, options: EngineOptions) -> Engine:
    """Spread a model over the mesh. The parameters are uninitialised: load weights into `engine.shards`, then `push()`.

    The ordered list: layers -> kernels -> data parallelism -> shards.
    """
    exact = torch.promote_types(options.compute_dtype, torch.float32)
    device = mesh.device
    # With FSDP the parameters are the masters; without, they are what the matrix products use.
    model = build_decoder(
        cfg,
        dtype=exact if mesh.dp is not None else options.compute_dtype,
        device=torch.device("meta") if mesh.dp is not None else device,
    )
    attention = choose_attention(
        options.attention_backend, device=device, dtype=options.compute_dtype, softmax_in_fp32=options.softmax_in_fp32
    )
    model.set_attention(attention.core)
    chunked = options.chunked_cross_entropy
    model.loss_function = chunked_linear_cross_entropy if chunked else linear_cross_entropy
    if mesh.dp is not None:
        data_parallel.shard(model, mesh.dp, compute_dtype=options.compute_dtype, master_dtype=exact)
        model.to_empty(device=device)
    shards = Shards(model, mesh, master_dtype=exact)
    kernels = {
        "attention": attention.reason,
        "cross-entropy": "chunked, logits never whole" if chunked else "plain, whole logits of the trained tokens",
        "data parallel": f"FSDP2 over {mesh.dp_size} ranks, gradients summed ({mesh.backend})"
        if mesh.dp is not None
        else "none (one process)",
    }
    return Engine(model, mesh, shards, exact_dtype=exact, kernels=kernels)
