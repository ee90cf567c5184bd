"""A model spread over the ranks, behind four calls. The training loop does not know which parallelism is on."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from megatron_swift.data.types import IGNORE, Batch
from megatron_swift.kernels.attention import Segments
from megatron_swift.kernels.fp8 import Fp8Linears, Fp8Options
from megatron_swift.kernels.to_device import to_device
from megatron_swift.models.decoder import Decoder, Row
from megatron_swift.models.routing import RouterOptions, Routing
from megatron_swift.parallel import data as data_parallel
from megatron_swift.parallel.compiled import Compile
from megatron_swift.parallel.context import context_segments, zigzag
from megatron_swift.parallel.data import Sharding
from megatron_swift.parallel.dropout import Dropout, noise_of
from megatron_swift.parallel.mesh import Axis, Mesh
from megatron_swift.parallel.pipeline import Pipeline
from megatron_swift.parallel.recompute import Recompute
from megatron_swift.parallel.routers import RouterTotals, routings
from megatron_swift.parallel.shards import Shards


class Counts(NamedTuple):
    """Sizes of a global batch. tokens: real ones. squares: the sum of squared segment lengths, for the attention's FLOPs.

    rows: micro-batches.
    """

    trained: int
    tokens: int
    squares: int
    rows: int = 1


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How to compute. compute_dtype: the dtype of weights in matrix products; 16-bit types keep a float32 master.

    transformer_engine : whether its attention is used: never, where it runs, or required; see kernels.te_attention.
    chunks_per_rank : virtual pipeline stages on each rank. first_layers, last_layers : of the first and last stage, None: balanced.
    context_kind    : all_gather, p2p or a2a.
    unfused         : of norm, rope and swiglu, those that are not computed by Triton kernels where these run.
    second_stream   : whether weights' gradients are formed on a second stream of a GPU, where nothing else reads them before the update.
    fp8             : how linear layers are computed in 8 bits; None: they are not.
    dropout         : what is dropped in training, and the seed of it.
    compile         : what torch.compile does; see parallel.compiled.
    router, dispatcher, grouped_experts, overlap_shared_expert : of a mixture of experts; see models.routing and parallel.expert.
    """

    compute_dtype: torch.dtype
    attention_backend: str = "auto"
    transformer_engine: str = "never"
    softmax_in_fp32: bool = True
    chunked_cross_entropy: bool = False
    unfused: tuple[str, ...] = ()
    second_stream: bool = True
    fp8: Fp8Options | None = None
    sequence_parallel: bool = False
    tp_comm_overlap: bool = False
    sharding: Sharding = Sharding.OPTIM
    context_kind: str = "all_gather"
    recompute: Recompute = field(default_factory=Recompute)
    chunks_per_rank: int = 1
    first_layers: int | None = None
    last_layers: int | None = None
    dropout: Dropout = field(default_factory=Dropout)
    compile: Compile = field(default_factory=Compile)
    router: RouterOptions = field(default_factory=RouterOptions)
    dispatcher: str = "alltoall"
    grouped_experts: bool = True
    overlap_shared_expert: bool = False


class Engine:
    """Forward, backward and evaluation of a model on its mesh.

    chunks  : this rank's parts of the model, one unless there are virtual pipeline stages.
    shards  : the local parameters.
    kernels : one line per choice of kernel and parallelism, for the start-up banner.
    routers : what the routers of a mixture of experts did since they were last asked; None for a dense model.
    """

    def __init__(
        self,
        chunks: list[Decoder],
        mesh: Mesh,
        shards: Shards,
        options: EngineOptions,
        *,
        hidden_size: int,
        pipeline: Pipeline | None,
        kernels: dict[str, str],
        routers: RouterTotals | None,
        fp8: Fp8Linears | None = None,
    ):
        self.chunks, self.mesh, self.shards, self.options, self.kernels = chunks, mesh, shards, options, kernels
        self.hidden_size, self.pipeline, self.routers, self.fp8 = hidden_size, pipeline, routers, fp8
        self.exact_dtype = torch.promote_types(options.compute_dtype, torch.float32)

    @property
    def segment_multiple(self) -> int:
        """Every segment of a batch must have a multiple of this many tokens."""
        return 2 * self.mesh.cp.size if self.mesh.cp.size > 1 else 1

    @property
    def row_multiple(self) -> int:
        """Every batch must have a multiple of this many tokens."""
        return self.segment_multiple * (self.mesh.tp.size if self.options.sequence_parallel else 1)

    def count(self, batches: Sequence[Batch]) -> Counts:
        """What the batches of all data-parallel ranks hold, by one all-reduce."""
        if not self.mesh.speaks_for_batch:
            batches = ()
        trained, tokens = sum(b.num_trained for b in batches), sum(len(b.tokens) - b.padding for b in batches)
        squares = sum(n * n for b in batches for n in b.lengths)
        return Counts(*(int(n) for n in self.mesh.sum([trained, tokens, squares, len(batches)])))

    def forward_backward(
        self,
        batches: Sequence[Batch],
        *,
        num_tokens: int,
        num_rows: int = 1,
        loss_scale: float = 1.0,
        iteration: int = 0,
    ) -> Tensor:
        """Leave in the shards the gradient of (sum of token losses) / num_tokens over all ranks; returns the sum of token losses over all.

        It is a 0-dim float64 on the device: to read it is to wait for the whole pass.
        num_tokens : trained tokens of the global batch. loss_scale : fp16's; it is divided out of the gradients again.
        num_rows   : micro-batches of the global batch: the routers' own losses are added as their mean over them.
        iteration  : of the run: dropout takes other values in each.
        """
        losses = self._run(
            batches,
            scale=loss_scale / num_tokens,
            iteration=iteration,
            train=True,
            router_scale=loss_scale / num_rows,
        )
        self.shards.pull(1.0 / loss_scale)
        return self._total(losses)[0] * (num_tokens / loss_scale)

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch]) -> tuple[float, int]:
        """(sum of token losses, number of trained tokens) of the batches of all ranks; no gradient is left behind."""
        losses = self._run(batches, scale=1.0, train=False)
        for chunk in self.chunks:
            data_parallel.reshard(chunk)
        trained = sum(b.num_trained for b in batches) if self.mesh.speaks_for_batch else 0
        loss, tokens = self._total(losses, trained).tolist()
        return loss, int(tokens)

    def _total(self, losses: Sequence[Tensor], *counts: int) -> Tensor:
        """The sum of losses over all ranks, and of counts, float64: tensor-parallel ranks hold the same losses; stages before the last none."""
        whole = to_device(torch.tensor([0.0, *counts], dtype=torch.float64), self.mesh.device)
        if losses and self.mesh.tp.rank == 0:
            whole[0] = torch.stack(list(losses)).sum()
        return self.mesh.sum_(whole)

    def _run(
        self,
        batches: Sequence[Batch],
        *,
        scale: float,
        train: bool,
        iteration: int = 0,
        router_scale: float | None = None,
    ) -> list[Tensor]:
        """Forward (and backward) of every batch; the detached losses, each times scale. router_scale: of the routers' losses."""
        routed: list[Routing] = []
        if self.routers is not None:
            wanted = None if router_scale is None else self._scalar(router_scale)
            together = self.options.sequence_parallel
            routed = routings(batches, self.mesh, sequence_parallel=together, scale=wanted)
        rows = []
        for number, (batch, routing) in enumerate(zip_longest(batches, routed)):
            row = dataclasses.replace(self._row(batch), routing=routing)
            if train and self.options.dropout.any:
                row = self._with_noise(row, batch, (iteration, number * self.mesh.dp.size + self.mesh.dp.rank))
            rows.append(row)
        losses = self._pass(rows, self._scalar(scale), train=train)
        if self.fp8 is not None:
            self.fp8.forget()
        if self.routers is not None and train:
            self.routers.add(routed)
        return losses

    def _with_noise(self, row: Row, batch: Batch, place: tuple[int, int]) -> Row:
        """place: the iteration, and the number of the micro-batch in its global batch."""
        own = self.mesh.tp if self.options.sequence_parallel else Axis()
        noise = noise_of(batch, cp=self.mesh.cp, own=own, seeds=(self.options.dropout.seed, *place))
        noise = dataclasses.replace(
            noise, tokens=to_device(noise.tokens, self.mesh.device), own=to_device(noise.own, self.mesh.device)
        )
        return dataclasses.replace(row, segments=dataclasses.replace(row.segments, noise=noise))

    def _scalar(self, value: float) -> Tensor:
        return torch.full((), value, dtype=self.exact_dtype, device=self.mesh.device)

    def _pass(self, rows: Sequence[Row], factor: Tensor, *, train: bool) -> list[Tensor]:
        """Forward (and backward) of every row; the detached losses, each times factor."""
        sharding = self.options.sharding
        if self.pipeline is not None:
            share = self.mesh.tp.size if self.options.sequence_parallel else 1
            return self.pipeline.run(
                len(rows),
                lambda chunk, micro, hidden: self.chunks[chunk](rows[micro], factor, hidden),
                shape=lambda micro: (len(rows[micro].positions) // share, self.hidden_size),
                dtype=self.options.compute_dtype,
                device=self.mesh.device,
                train=train,
                before_backward=lambda chunk, last: data_parallel.before_backward(
                    self.chunks[chunk], last=last, sharding=sharding
                ),
            )
        losses, model = [], self.chunks[0]
        for number, row in enumerate(rows, 1):
            loss = model(row, factor)
            if train:
                data_parallel.before_backward(model, last=number == len(rows), sharding=sharding)
                loss.backward()
            losses.append(loss.detach())
        return losses

    def _row(self, batch: Batch) -> Row:
        """A batch on the device; under context parallelism this rank's part of it. Labels were shifted before the cut."""
        device, cp = self.mesh.device, self.mesh.cp
        tokens, positions, labels, weights = batch.tokens, batch.positions, batch.labels, batch.weights
        if cp.size > 1:
            segments: Segments = context_segments(batch.lengths, cp=cp.size, device=device)
            mine = zigzag(batch.lengths, cp=cp.size, rank=cp.rank).numpy()
            tokens, positions, labels = tokens[mine], positions[mine], labels[mine]
            weights = weights[mine] if weights is not None else None
        else:
            segments = Segments.of(batch.lengths, device)
        index = np.flatnonzero(labels != IGNORE)  # on the host: a mask on the device would cost a synchronisation
        of_loss = None
        if weights is not None:
            of_loss = to_device(torch.from_numpy(weights[index]).to(self.exact_dtype), device)
        return Row(
            _to(tokens, device),
            _to(positions, device),
            segments,
            _to(index, device),
            _to(labels[index], device),
            of_loss,
        )


def _to(array: np.ndarray, device: torch.device) -> Tensor:
    # A copy: rows come from a read-only memory map, which torch refuses to share quietly.
    return to_device(torch.from_numpy(np.array(array, dtype=np.int64)), device)
