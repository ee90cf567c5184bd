"""The local shards: all that the optimizer, the clip and the checkpoint know of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from megatron_swift.kernels.accumulate import accumulate
from megatron_swift.kernels.later import AT_ONCE, Later
from megatron_swift.parallel.mesh import Axis, Mesh
from megatron_swift.parallel.tensor import Placement

_SMALL = 2**14  # values of a parameter whose gradients are added up together with those of others


@dataclass(frozen=True)
class Box:
    """Rows [local, local + rows) of a master, which are rows [start, start + rows) of the whole parameter, in `columns` (None: all).

    owned : whether this rank counts and saves them; other ranks may hold replicas.
    """

    local: int
    rows: int
    start: int
    columns: tuple[int, int] | None
    owned: bool


@dataclass(frozen=True)
class _Partial:
    """Local rows whose gradient must be summed over the consecutive tensor-parallel ranks that replicate them."""

    local: int
    rows: int
    replicas: int


@dataclass
class Shard:
    """This rank's part of the parameter `name` of global `shape`.

    master : the values the optimizer steps, in master precision; its .grad is the gradient of this step.
    param  : the module's parameter that they stand for.
    boxes  : where its rows lie in the whole; rows in no box are padding.
    narrow : the gradient while it is in the parameter's 16-bit type: of a single micro-batch, complete on this rank; master.grad is None then.
    waiting: of a small parameter, the 16-bit gradients of this step's micro-batches until `Shards.pull`.
    stays_narrow : whether the gradient of a single micro-batch is kept in its 16-bit type.
    """

    name: str
    master: nn.Parameter
    param: nn.Parameter
    shape: tuple[int, ...]
    boxes: tuple[Box, ...]
    partials: tuple[_Partial, ...]
    narrow: Tensor | None = None
    waiting: list[Tensor] = field(default_factory=list)
    stays_narrow: bool = False

    @property
    def grad(self) -> Tensor | None:
        """This step's gradient, in whichever type it is."""
        return self.master.grad if self.narrow is None else self.narrow

    @property
    def copied(self) -> bool:
        """Whether the module holds a 16-bit copy of the master, to be refreshed after each step."""
        return not isinstance(self.param, DTensor) and self.param.dtype != self.master.dtype


class Shards:
    """name -> Shard, for every parameter that this rank holds.

    With FSDP the master is the local part of the sharded parameter itself. Without, it is the parameter, or for a 16-bit model a copy
    in master_dtype. Its gradient is added up in master_dtype; what a single micro-batch left in bfloat16 is not widened for its own sake.
    """

    def __init__(
        self,
        chunks: Sequence[nn.Module],
        mesh: Mesh,
        *,
        master_dtype: torch.dtype,
        shapes: dict[str, tuple[int, ...]],
        place: Callable[[str], Placement],
        replicas: Callable[[str], Axis],
        tied: str | None,
        kv_replicas: Axis,
        ends: Axis,
        later: Later = AT_ONCE,
    ):
        """shapes and place: of every parameter's whole and of this rank's part. replicas: the ranks that hold it too (no FSDP).

        tied : the parameter that the first and the last pipeline stage both hold, None where no two do. ends: those two ranks.
        kv_replicas : the ranks that replicate a key/value head.
        later : how gradients are formed, and added up; only where each parameter has a master apart from it.
        """
        self.mesh, self.master_dtype, self.tied, self.ends = mesh, master_dtype, tied, ends
        self.kv_replicas, self.replicas = kv_replicas, replicas
        self.shapes, self.place, self.later = shapes, place, later
        self.by_name = {name: self._shard(name, param) for chunk in chunks for name, param in chunk.named_parameters()}

    def __iter__(self) -> Iterator[Shard]:
        return iter(self.by_name.values())

    def _shard(self, name: str, param: nn.Parameter) -> Shard:
        owned = self.replicas(name).rank == 0
        owned = owned and not (name == self.tied and self.mesh.pp.rank > 0)
        if isinstance(param, DTensor):
            _, offset = compute_local_shape_and_global_offset(param.shape, param.device_mesh, param.placements)
            return self._located(name, nn.Parameter(param.to_local().detach()), param, int(offset[0]), owned)
        if param.dtype == self.master_dtype:
            return self._located(name, nn.Parameter(param.detach()), param, 0, owned)
        shard = self._located(name, nn.Parameter(param.detach().to(self.master_dtype)), param, 0, owned)
        # float16 gradients still carry the loss scale, which only float32 divides out safely; sums over ranks are taken in float32 too.
        alone = self.replicas(name).size == 1 and not shard.partials and (name != self.tied or self.ends.size == 1)
        shard.stays_narrow = alone and param.dtype == torch.bfloat16
        param.register_post_accumulate_grad_hook(lambda p: _accumulate(shard, p, later=self.later))
        return shard

    def _located(self, name: str, master: nn.Parameter, param: nn.Parameter, first: int, owned: bool) -> Shard:
        """The shard whose master is rows [first, first + len(master)) of this rank's tensor-parallel part."""
        where = self.place(name)
        boxes, partials = [], []
        for span in where.spans:
            low, high = max(span.local, first), min(span.local + span.rows, first + len(master))
            if low >= high:
                continue
            boxes.append(
                Box(low - first, high - low, span.start + low - span.local, where.columns, owned and span.owner)
            )
            if span.partial:
                partials.append(_Partial(low - first, high - low, span.replicas))
        return Shard(name, master, param, self.shapes[name], tuple(boxes), tuple(partials))

    def pull(self, factor: float = 1.0) -> None:
        """Take the gradients from the module, finish them over the ranks, times `factor` (the inverse of the fp16 loss scale)."""
        self.later.join()
        for shard in self:
            if not shard.copied:
                grad = shard.param.grad
                assert grad is not None, f"{shard.name} got no gradient"
                shard.master.grad = grad.to_local() if isinstance(grad, DTensor) else grad
                shard.param.grad = None
        for count in {len(shard.waiting) for shard in self} - {0}:
            self._add_up([shard for shard in self if len(shard.waiting) == count])
        self._finish()
        if factor != 1.0:
            torch._foreach_mul_(self._grads(), factor)

    def _add_up(self, shards: list[Shard]) -> None:
        """What waits in these shards, as many gradients in each, added up: for all parameters at once, as each launch costs more than the sum."""
        total: Tensor | None = None
        if len(shards[0].waiting) > 1 or not all(s.stays_narrow for s in shards):
            for grads in zip(*(s.waiting for s in shards), strict=True):
                flat = torch.cat([grad.reshape(-1) for grad in grads])
                total = flat.to(self.master_dtype) if total is None else accumulate(total, flat, self.master_dtype)
        parts = [None] * len(shards) if total is None else total.split([s.master.numel() for s in shards])
        for shard, part in zip(shards, parts, strict=True):
            shard.narrow, shard.master.grad = (
                (shard.waiting[0], None) if part is None else (None, part.view_as(shard.master))
            )
            shard.waiting.clear()

    def _grads(self) -> list[Tensor]:
        return [g for s in self if (g := s.grad) is not None]

    def _finish(self) -> None:
        """Sum what is only a contribution: replicas without FSDP, replicated rows under tensor parallelism, tied embeddings."""
        for axis in (self.mesh.shard, self.mesh.edp):
            grads = [s.master.grad for s in self if self.replicas(s.name) is axis and s.master.grad is not None]
            if axis.size > 1:
                _sum_together(grads, axis)
        for axis in {self.mesh.tp.size: self.mesh.tp, self.kv_replicas.size: self.kv_replicas}.values():
            if axis.size > 1:
                wanted = [(s, p) for s in self for p in s.partials if p.replicas == axis.size]
                _sum_together(
                    [s.master.grad[p.local : p.local + p.rows] for s, p in wanted if s.master.grad is not None], axis
                )
        if self.tied in self.by_name and self.ends.size > 1:
            grad = self.by_name[self.tied].master.grad
            assert grad is not None
            _sum_together([grad], self.ends)

    def push(self) -> None:
        """Refresh the module's 16-bit copies from the masters."""
        copied = [s for s in self if s.copied]
        if copied:
            with torch.no_grad():
                torch._foreach_copy_([s.param for s in copied], [s.master for s in copied])

    def drop_grads(self) -> None:
        """Free this step's gradients."""
        for shard in self:
            shard.master.grad = shard.narrow = None
            shard.waiting.clear()

    def grad_norm(self) -> Tensor:
        """The L2 norm of the whole model's gradient, each value counted once, summed in float64: 0-dim, on the device."""
        return self._norm([(s, g) for s in self if (g := s.grad) is not None])

    def params_norm(self) -> float:
        """The L2 norm of all parameters, each value counted once."""
        return float(self._norm([(s, s.master.detach()) for s in self]))

    def _norm(self, values: list[tuple[Shard, Tensor]]) -> Tensor:
        parts = [t[b.local : b.local + b.rows] for s, t in values for b in s.boxes if b.owned]
        total = torch.zeros((), dtype=torch.float64, device=self.mesh.device)
        if parts:
            total = torch.cat(_norms(parts, self.master_dtype)).double().square().sum()
        return self.mesh.sum_(total).sqrt()

    def owned(self) -> dict[str, list[tuple[Box, Tensor]]]:
        """What this rank alone counts and saves: for each parameter the boxes it owns with their values."""
        return {s.name: [(b, s.master.detach()[b.local : b.local + b.rows]) for b in s.boxes if b.owned] for s in self}

    def full(self) -> dict[str, Tensor]:
        """Every parameter of the whole model by name, in master precision, on the CPU. For tests and small models: every rank must ask."""
        mine = {name: [(b, t.cpu()) for b, t in parts] for name, parts in self.owned().items()}
        whole: dict[str, Tensor] = {}
        for shapes, theirs in self.mesh.gather_objects(({name: self.shapes[name] for name in mine}, mine)):
            for name, shape in shapes.items():
                whole.setdefault(name, torch.full(shape, float("nan"), dtype=self.master_dtype))
            for name, box, values in [(n, *part) for n, parts in theirs.items() for part in parts]:
                rows = whole[name][box.start : box.start + box.rows]
                (rows if box.columns is None else rows[:, slice(*box.columns)]).copy_(values)
        return whole


def _sum_together(tensors: list[Tensor], axis: Axis) -> None:
    """One all-reduce over the axis for all the tensors, in place."""
    if tensors:
        flat = torch.cat([t.reshape(-1) for t in tensors])
        dist.all_reduce(flat, group=axis.group)
        for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))


def _norms(parts: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Norms in `dtype` whose squares add up to the whole's."""
    if parts[0].is_cuda:  # chunks of 2^16 values, a few launches for all
        return [torch.stack(torch._foreach_norm(parts, 2, dtype=dtype))]  # type: ignore[arg-type]
    # Row by row: over millions of values the float32 sums of a CPU kernel lose a thousandth, the more the larger a rank's part.
    return [torch.linalg.vector_norm(part, dim=-1, dtype=dtype).reshape(-1) for part in parts]


def _accumulate(shard: Shard, param: Tensor, *, later: Later) -> None:
    """Add a 16-bit gradient to the master's: called once per micro-batch, so sums over micro-batches keep full precision.

    A step's first one is kept as it is where it may stay narrow: without a second one nothing is added.
    """
    master, grad = shard.master, param.grad
    assert grad is not None
    param.grad = None
    before = shard.grad
    if master.numel() <= _SMALL:
        shard.waiting.append(grad)
    elif before is not None:
        master.grad, shard.narrow = later.follow(lambda: accumulate(before, grad, master.dtype), before, grad), None
    elif shard.stays_narrow:
        shard.narrow = grad
    else:
        master.grad = later.follow(lambda: grad.to(master.dtype), grad)
