"""Linear layers whose three products are of 8-bit floating point: y = q(x) q(W)^T, dx = q(dy) q(W), dW = q(dy)^T q(x).

`kernels.fp8_values` says how values become 8 bits. x and W are e4m3; gradients e5m2 with the format hybrid, e4m3 with e4m3. Each scale comes from
the values it is for ("current scaling" in Transformer Engine's words), never from earlier steps. Products are summed in float32 and
come out in x's dtype. For the backward pass the transposed q(x) is kept, one byte a value, and x itself is not.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from megatron_swift.kernels.fp8_values import Quantised, Recipe, Side, product, quantise
from megatron_swift.kernels.later import AT_ONCE, STREAM_SAID, Later
from megatron_swift.kernels.layers import PLAIN, LayerKernels
from megatron_swift.kernels.triton_runs import why_no_triton
from megatron_swift.utils.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Fp8Options:
    """format: hybrid (gradients in e5m2) or e4m3.  recipe: what shares a scale.

    fast_backward : sum the products of the backward pass within the tensor cores alone, as those of the forward pass (`product`). As in
                    Transformer Engine's recipes they are not, since errors of gradients add up over steps.
    """

    format: Literal["hybrid", "e4m3"]
    recipe: Recipe = "tensorwise"
    fast_backward: bool = False

    @property
    def grad_dtype(self) -> torch.dtype:
        """Of gradients; all else is e4m3."""
        return torch.float8_e5m2 if self.format == "hybrid" else torch.float8_e4m3fn


class _Held(NamedTuple):
    """A weight in 8 bits, and which state of which tensor it is."""

    weight: Tensor
    version: int
    quantised: Quantised


class Fp8Linears:
    """The forms of `LayerKernels.linear`, `norm_linear`, `add_norm_linear` and `swiglu_linear` in 8 bits.

    keep_weights : a weight is cast once in a pass, and both copies of it are held from then on until `forget`. Without, it is cast where it
                   is used, once more in the backward pass: for weights that leave the memory in between.
    recomputed   : layers, or MLPs, are computed again before their backward pass: linear_fc2's product shall not be.
    sentence     : for the banner.
    later        : how weights' gradients are formed.

    Call `forget` after each pass, before weights change: FSDP writes gathered weights without their version counter moving.
    """

    def __init__(
        self,
        options: Fp8Options,
        *,
        keep_weights: bool = True,
        recomputed: bool = False,
        sentence: str = "",
        later: Later = AT_ONCE,
    ):
        self.options, self.keep_weights, self.recomputed, self.sentence = options, keep_weights, recomputed, sentence
        self.later = later
        self._weights: dict[int, _Held] = {}
        self._measured: tuple[Tensor, int, Tensor] | None = None

    def forget(self) -> None:
        """Drop what is held between products."""
        self._weights.clear()
        self._measured = None

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """torch.nn.functional.linear, x [N, K]."""
        return _Linear.apply(x, weight, bias, self, torch.is_grad_enabled())  # type: ignore[no-any-return]

    def kernels(self, base: LayerKernels) -> LayerKernels:
        """`base` with products in 8 bits. Where base joins norm or SwiGLU with the product, so does this."""

        def norm_linear(x: Tensor, norm_weight: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float) -> Tensor:
            if base.norm is PLAIN.norm:
                return self.linear(base.norm(x, norm_weight, epsilon), weight, bias)
            return _NormLinear.apply(x, norm_weight, weight, bias, epsilon, self, torch.is_grad_enabled())  # type: ignore[no-any-return]

        def add_norm_linear(
            x: Tensor, added: Tensor, norm_weight: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float
        ) -> tuple[Tensor, Tensor]:
            if base.norm is PLAIN.norm:
                total, normalised = base.add_norm(x, added, norm_weight, epsilon)
                return total, self.linear(normalised, weight, bias)
            train = torch.is_grad_enabled()
            return _AddNormLinear.apply(x, added, norm_weight, weight, bias, epsilon, self, train)  # type: ignore[no-any-return]

        def swiglu_linear(gate_up: Tensor, weight: Tensor) -> Tensor:
            if self.recomputed and torch.is_grad_enabled():
                entering = _Entering(self, weight)
                return _Product.apply(_Keep.apply(base.swiglu(gate_up), entering), weight, entering)  # type: ignore[no-any-return]
            if base.swiglu is PLAIN.swiglu:
                return self.linear(base.swiglu(gate_up), weight)
            return _SwiGLULinear.apply(gate_up, weight, self, torch.is_grad_enabled())  # type: ignore[no-any-return]

        return dataclasses.replace(
            base,
            linear=self.linear,
            norm_linear=norm_linear,
            add_norm_linear=add_norm_linear,
            swiglu_linear=swiglu_linear,
        )

    # What follows is for the functions below.

    def forward(
        self, ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *, train: bool, amax: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """(y, what the backward pass needs). x is contiguous; amax: its largest value, where it is known."""
        entering = self.enter(x, columns=train, amax=amax)
        y = self.multiply(ctx, x, entering, weight, bias, train=train)
        if entering.columns is None:
            return y, ()
        ctx.kind = entering.columns.kind
        return y, (entering.columns.values, entering.columns.scale, weight)

    def enter(self, x: Tensor, *, columns: bool, amax: Tensor | None = None) -> Quantised:
        """x as it enters the product."""
        return quantise(x, torch.float8_e4m3fn, self.options.recipe, columns=columns, amax=amax)

    def multiply(
        self, ctx: Any, x: Tensor, entering: Quantised, weight: Tensor, bias: Tensor | None, *, train: bool
    ) -> Tensor:
        """The product of the forward pass."""
        held = self.weight(weight, columns=train and self.keep_weights)
        assert entering.rows is not None and held.rows is not None
        y = _first(product(entering.rows, held.rows, fast=True, dtype=x.dtype), len(x))
        ctx.held = held if self.keep_weights else None
        ctx.fp8, ctx.with_bias = self, bias is not None
        return y if bias is None else y.add_(bias)

    def backward(
        self, ctx: Any, grad: Tensor, saved: tuple[Tensor, ...], *, wants: tuple[bool, bool]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of x, weight and bias. wants: whether those of x and of the weight are needed."""
        values, scale, weight = saved
        grad = grad.contiguous()
        of_x, of_weight = wants
        leaving = quantise(
            grad,
            self.options.grad_dtype,
            self.options.recipe,
            rows=of_x,
            columns=of_weight,
            amax=self._known(grad),
        )
        d_x = d_weight = None
        if leaving.rows is not None:
            held = ctx.held or self.weight(weight, rows=False)
            assert held.columns is not None
            d_x = _first(
                product(leaving.rows, held.columns, fast=self.options.fast_backward, dtype=grad.dtype), len(grad)
            )
        if leaving.columns is not None:
            left, entered, fast = leaving.columns, Side(values, scale, ctx.kind), self.options.fast_backward
            d_weight = self.later.run(
                lambda: product(left, entered, fast=fast, dtype=weight.dtype), left.values, left.scale, values, scale
            )
        return d_x, d_weight, grad.sum(0) if ctx.with_bias else None

    def weight(self, weight: Tensor, *, rows: bool = True, columns: bool = True) -> Quantised:
        """The weight in 8 bits, these copies of it at least."""
        held = self._weights.get(id(weight))
        if held is not None and held.weight is weight and held.version == weight._version:
            there = held.quantised
            if (there.rows is not None or not rows) and (there.columns is not None or not columns):
                return there
        made = quantise(
            weight.contiguous(), torch.float8_e4m3fn, self.options.recipe, weight=True, rows=rows, columns=columns
        )
        if self.keep_weights:
            self._weights[id(weight)] = _Held(weight, weight._version, made)
        return made

    def measured(self, grad: Tensor, amax: Tensor) -> None:
        """The next product may be given this gradient, whose largest value is known."""
        self._measured = (grad, grad._version, amax)

    def _known(self, grad: Tensor) -> Tensor | None:
        """amax of grad, if it is the tensor that was measured last. That one was kept alive, so none other can lie at its place."""
        found, self._measured = self._measured, None
        if found is None or self.options.recipe != "tensorwise":
            return None
        other, version, amax = found
        same = grad.data_ptr() == other.data_ptr() and grad.shape == other.shape and grad._version == version
        return amax if same else None

    def slots(self, device: torch.device) -> Tensor | None:
        """Where a kernel that writes a value shall leave its largest one; None where the recipe has no use for it."""
        from megatron_swift.kernels.fused.fp8 import amax_slots

        return amax_slots(device) if self.options.recipe == "tensorwise" else None


def _first(y: Tensor, number: int) -> Tensor:
    return y if len(y) == number else y[:number]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, fp8: Fp8Linears, train: bool) -> Tensor:
        y, saved = fp8.forward(ctx, x.contiguous(), weight, bias, train=train)
        ctx.save_for_backward(*saved)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        wants = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        return (*ctx.fp8.backward(ctx, grad, ctx.saved_tensors, wants=wants), None, None)


class _Entering:
    """What `_Keep` hands to the `_Product` after it: x in 8 bits, and its own ctx, which keeps the tensors of both."""

    def __init__(self, fp8: Fp8Linears, weight: Tensor):
        self.fp8, self.weight = fp8, weight
        self.x: Quantised | None = None
        self.kept: Any = None


class _Keep(torch.autograd.Function):
    """x, cast and kept. torch's recomputation stops where the last tensor is kept, and a function keeps its tensors when it is through: with
    the product in the same function that would be computed once more."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, entering: _Entering) -> Tensor:
        x = x.contiguous()
        entering.x, entering.kept = entering.fp8.enter(x, columns=True), ctx
        columns = entering.x.columns
        assert columns is not None
        ctx.kind = columns.kind
        ctx.save_for_backward(columns.values, columns.scale, entering.weight)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad, None


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, entering: _Entering) -> Tensor:
        assert entering.x is not None
        y = entering.fp8.multiply(ctx, x, entering.x, weight, None, train=True)
        ctx.kept, ctx.kind, entering.x = entering.kept, entering.kept.kind, None
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        wants = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        return (*ctx.fp8.backward(ctx, grad, ctx.kept.saved_tensors, wants=wants)[:2], None)


def _after_norm(
    ctx: Any,
    x: Tensor,
    added: Tensor | None,
    norm_weight: Tensor,
    linear: tuple[Tensor, Tensor | None],
    epsilon: float,
    *,
    fp8: Fp8Linears,
    train: bool,
) -> tuple[Tensor, Tensor]:
    """(x + added, the linear layer (weight, bias) of its norm), the backward pass prepared."""
    from megatron_swift.kernels.fused.norm import norm_forward

    amax = fp8.slots(x.device)
    x, added = x.contiguous(), None if added is None else added.contiguous()
    total, normalised, rstd = norm_forward(x, norm_weight, epsilon, added, amax=amax)
    y, saved = fp8.forward(ctx, normalised, *linear, train=train, amax=amax)
    ctx.save_for_backward(total, norm_weight, rstd, *saved)
    return total, y


def _before_norm(ctx: Any, grad: Tensor, beside: Tensor | None, *, of_weight: bool) -> tuple[Tensor | None, ...]:
    """Gradients of x (and of what was added), norm, weight and bias. beside: what reaches the sum past the norm."""
    from megatron_swift.kernels.fused.norm import norm_backward

    total, norm_weight, rstd, *saved = ctx.saved_tensors
    d_normalised, d_weight, d_bias = ctx.fp8.backward(ctx, grad, saved, wants=(True, of_weight))
    amax = None if beside is None else ctx.fp8.slots(grad.device)
    beside = None if beside is None else beside.contiguous()
    dx, dn, _ = norm_backward(total, norm_weight, rstd, d_normalised, again=False, beside=beside, amax=amax)
    if amax is not None:
        ctx.fp8.measured(dx, amax)  # it is the gradient of the linear layer that made what was added
    return dx, dn, d_weight, d_bias


class _NormLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        norm_weight: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        epsilon: float,
        fp8: Fp8Linears,
        train: bool,
    ) -> Tensor:
        return _after_norm(ctx, x, None, norm_weight, (weight, bias), epsilon, fp8=fp8, train=train)[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return (*_before_norm(ctx, grad, None, of_weight=ctx.needs_input_grad[2]), None, None, None)


class _AddNormLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        added: Tensor,
        norm_weight: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        epsilon: float,
        fp8: Fp8Linears,
        train: bool,
    ) -> tuple[Tensor, Tensor]:
        return _after_norm(ctx, x, added, norm_weight, (weight, bias), epsilon, fp8=fp8, train=train)

    @staticmethod
    def backward(ctx: Any, beside: Tensor, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        dx, *rest = _before_norm(ctx, grad, beside, of_weight=ctx.needs_input_grad[3])
        return (dx, dx, *rest, None, None, None)


class _SwiGLULinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, weight: Tensor, fp8: Fp8Linears, train: bool) -> Tensor:
        from megatron_swift.kernels.fused.swiglu import swiglu_forward

        gate_up = gate_up.contiguous()
        amax = fp8.slots(gate_up.device)
        y, saved = fp8.forward(ctx, swiglu_forward(gate_up, amax=amax), weight, None, train=train, amax=amax)
        ctx.save_for_backward(gate_up, *saved)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        from megatron_swift.kernels.fused.swiglu import swiglu_backward

        gate_up, *saved = ctx.saved_tensors
        d_product, d_weight, _ = ctx.fp8.backward(ctx, grad, saved, wants=(True, ctx.needs_input_grad[1]))
        amax = ctx.fp8.slots(grad.device)
        d_gate_up, _ = swiglu_backward(gate_up, d_product, again=False, amax=amax)
        if amax is not None:
            ctx.fp8.measured(d_gate_up, amax)
        return d_gate_up, d_weight, None, None


def choose_fp8(
    options: Fp8Options | None,
    *,
    device: torch.device,
    dtype: torch.dtype,
    keep_weights: bool,
    recomputed: bool,
    later: Later = AT_ONCE,
) -> Fp8Linears | None:
    """The products, None without options. UsageError for a GPU that cannot.

    keep_weights : whether weights stay in memory between the forward and the backward pass.  recomputed, later: see `Fp8Linears`.
    """
    if options is None:
        return None
    if device.type == "cuda":
        assert dtype is torch.bfloat16, "args.fp8_rules saw to it"
        _require(device, options.recipe)
        reason = why_no_triton(device)
        how = "torch's scaled products, cast by " + (
            f"torch's own operators ({reason})" if reason else "Triton kernels"
        )
    else:
        how = f"rounded by torch's own operators, multiplied in float32 (no 8-bit products on the {device.type})"
    where = "linear layers of attention, dense MLPs and shared experts"
    sentence = f"{options.format}, {options.recipe}, {where}; {how}{STREAM_SAID if later is not AT_ONCE else ''}"
    return Fp8Linears(options, keep_weights=keep_weights, recomputed=recomputed, sentence=sentence, later=later)


def _require(device: torch.device, recipe: Recipe) -> None:
    found = torch.cuda.get_device_capability(device)
    if found < (8, 9):
        raise UsageError(
            "--fp8_format needs a GPU with 8-bit products",
            why=f"this one, {torch.cuda.get_device_name(device)}, has compute capability {found[0]}.{found[1]}, not 8.9 or more",
            do="leave --fp8_format out",
        )
    if recipe == "blockwise" and found[0] != 9:
        raise UsageError(
            "--fp8_recipe blockwise needs a Hopper GPU",
            why=f"torch has its products for compute capability 9.0; this one is {found[0]}.{found[1]}",
            do="use --fp8_recipe tensorwise",
        )
