"""`--torch_compile`: what lies around the core attention of each layer, compiled by torch for any number of tokens.

A layer has two compiled parts: from its first norm to the rotated queries and keys, and from the attention's output to the end of a dense
MLP, or to the norm in front of a router. The core attention, which may loop over segments on the host, routers and experts stay outside. Modules are
arguments of the parts, so that all layers of a kind share a graph whose inputs are their parameters; and the number of tokens is
marked dynamic, so that a part has one graph, whatever the lengths; evaluation takes it too. docs/compiling.md is for users.

Where a collective, a dropout or recomputation stands inside a part, norm, rotation and SwiGLU are compiled one by one instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_swift.kernels.attention import Segments
from megatron_swift.kernels.layers import (
    NAMES,
    PLAIN,
    LayerKernels,
    add_norm,
    rms_norm,
    split_norm_rotate,
    split_rotate,
    swiglu,
)
from megatron_swift.kernels.triton_runs import why_no_triton
from megatron_swift.models.decoder import Decoder, LayerForm, Rotation, TransformerLayer
from megatron_swift.models.layers import MLP, Attention, LayerNorm, Linear, NormLinear, RMSNorm
from megatron_swift.models.routing import Routing
from megatron_swift.parallel.recompute import Recompute
from megatron_swift.utils.compilers import why_no_compiler
from megatron_swift.utils.errors import UsageError

# torch makes another graph for a dimension of 1. Such rows are so rare that they are computed as they are written.
_FEWEST = 2
R = TypeVar("R")


@dataclass(frozen=True)
class Compile:
    """when: auto, true or false. backend: what torch.compile takes; the tests have some that count graphs or need no compiler."""

    when: str = "auto"
    backend: str | Callable[..., Any] = "inductor"


@dataclass(frozen=True, kw_only=True)
class Around:
    """What else is in a layer. tensor_parallel: whether the collectives of tensor parallelism are. fp8: whether products are in 8 bits."""

    tensor_parallel: bool
    fp8: bool
    hidden_dropout: float
    recompute: Recompute

    @property
    def between(self) -> str:
        """What must stay outside of a graph and stands inside the two parts of a layer; "" for nothing."""
        if self.tensor_parallel:
            return "the collectives of tensor parallelism"
        if self.hidden_dropout:
            return "dropout"
        again = [name for name in ("layernorm", "mlp") if self.recompute.has(name)]
        return f"recompute_modules {' '.join(again)}" if again else ""


def install(
    model: Decoder,
    options: Compile,
    around: Around,
    *,
    device: torch.device,
    dtype: torch.dtype,
    kernels: dict[str, str],
) -> None:
    """Have the layers compiled if the options say so, and say it in `kernels`. Comes after all that exchanges modules and kernels.

    Raises UsageError for `true` where no compiler works, or where there is nothing in the model to compile.
    """
    if options.when == "false":
        return
    why = _why_not(model, device=device, dtype=dtype) if options.when == "auto" else ""
    if around.fp8:
        why = "the products in 8 bits come with norms and activations of their own"
    if not why and options.backend == "inductor":
        why = why_no_compiler(gpu=device.type == "cuda") or _why_broken(device)
    parts = "" if why else _in_parts(model, options) if not around.between else _one_by_one(model, options, around)
    if parts:
        kernels["compile"] = parts
        kernels["layers"] += ", where layers are not compiled"
        return
    why = why or f"{around.between} stands between all that could be compiled of this model"
    if options.when == "true":
        raise UsageError("--torch_compile true cannot be used here", why=why, do="leave --torch_compile out")
    kernels["compile"] = f"off ({why})"


def _why_not(model: Decoder, *, device: torch.device, dtype: torch.dtype) -> str:
    """Why `auto` does not compile; "" where it does: on a GPU, if the norm or the activation has no Triton kernel."""
    if device.type != "cuda":
        return "auto: on a CPU it takes a minute to start, and saves little"
    if not why_no_triton(device) and dtype is not torch.float64 and {"norm", "swiglu"} <= model.fusible:
        return "auto: there are Triton kernels for this model"
    return ""


def _why_broken(device: torch.device) -> str:
    """What is wrong when something tiny is compiled and run; "" for nothing."""
    try:
        torch.compile(_tiny)(torch.ones(_FEWEST, device=device))
    except RuntimeError as error:  # what the compilers raise comes wrapped in torch's own errors
        return f"torch could not compile x + 1: {str(error).strip().splitlines()[0]}"
    return ""


def _tiny(x: Tensor) -> Tensor:
    return x + 1


def _over_tokens(function: Callable[..., Any], options: Compile, *, still: int = 0) -> Callable[..., Any]:
    """`function` compiled, its tensors' first dims being tokens, two at least; one that is broken by something is an error.

    still : how many of the last arguments never carry a gradient. Evaluation takes the graph of training, and drops what that keeps: a graph
    of its own would double their number.
    """
    compiled = torch.compile(function, backend=options.backend, fullgraph=True)
    from torch._dynamo import mark_dynamic  # a second to import, for those alone who compile

    def run(*args: Any) -> Any:
        train = torch.is_grad_enabled()
        given = list(args)
        for place, arg in enumerate(args):
            if not isinstance(arg, Tensor) or isinstance(arg, nn.Parameter):
                continue
            if not train:
                given[place] = arg = arg.detach().requires_grad_(place < len(args) - still)
            mark_dynamic(arg, 0)
        if train:
            return compiled(*given)
        with torch.enable_grad():
            results = compiled(*given)
        return results.detach() if isinstance(results, Tensor) else tuple(result.detach() for result in results)

    return run


def _end_of_dense(projection: Linear, mlp: MLP, attended: Tensor, x: Tensor) -> Tensor:
    x, added = mlp(x, projection(attended))
    return x + added


def _middle_of_sparse(
    projection: Linear, norm: RMSNorm | LayerNorm, attended: Tensor, x: Tensor
) -> tuple[Tensor, Tensor]:
    """The sum so far, and what enters the router and all experts."""
    return norm.after_add(x, projection(attended))


def _in_parts(model: Decoder, options: Compile) -> str:
    form = _layer_form(options)
    for layer in model.layers:
        layer.form = form
        for module in _compiled_modules(layer):
            module.kernels = PLAIN  # the compiler fuses what it can see
    rest = "; routers and experts are not" if model.sparse else ""
    return f"{_name(options)}: each layer, in two parts around its core attention, for any number of tokens{rest}"


def _layer_form(options: Compile) -> LayerForm:
    heads = _over_tokens(Attention.heads, options, still=2)  # cos and sin
    end, middle = _over_tokens(_end_of_dense, options), _over_tokens(_middle_of_sparse, options)

    def form(
        layer: TransformerLayer,
        x: Tensor,
        rotary: Rotation,
        segments: Segments,
        routing: Routing | None,
        added: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        if len(x) < _FEWEST:
            return layer.written_out(x, rotary, segments, routing, added)
        if (
            added is not None
        ):  # of experts, which are not compiled; a graph with it would be one more beside that of the first layer
            x = x + added
        attention = layer.self_attention
        x, q, k, v = heads(attention, x, *rotary)
        attended = attention.core(q, k, v, segments).reshape(len(q), -1)
        if layer.pre_mlp_layernorm is None:
            return end(attention.linear_proj, layer.mlp, attended, x), None
        x, y = middle(attention.linear_proj, layer.pre_mlp_layernorm, attended, x)
        return x, layer.mlp(y, routing)

    return form


def _one_by_one(model: Decoder, options: Compile, around: Around) -> str:
    """ "" where the model has none of what can be compiled so."""
    there = model.fusible if len(model.sparse) < len(model.layers) else model.fusible - {"swiglu"}
    forms = _kernels(options, forgets_norms=not around.recompute.has("layernorm"))
    for layer in model.layers:
        attention = layer.self_attention
        for module in _compiled_modules(layer):
            # Norms of heads are of other shapes, each of which would be a graph of its own.
            if module not in (attention.q_layernorm, attention.k_layernorm):
                module.kernels = forms
    names = [NAMES[name] for name in NAMES if name in there]
    if not names:
        return ""
    return f"{_name(options)}: {', '.join(names)}, each by itself ({around.between} between them), for any number of tokens"


def _kernels(options: Compile, *, forgets_norms: bool) -> LayerKernels:
    """forgets_norms: nothing asks that what a norm gives to a product is computed again, which `norm_linear` could not do."""

    def rows(function: Callable[..., R], *, still: int = 0) -> Callable[..., R]:
        compiled = _over_tokens(function, options, still=still)
        return lambda x, *rest: (compiled if len(x) >= _FEWEST else function)(x, *rest)

    norm, added_norm, activation = rows(rms_norm), rows(add_norm), rows(swiglu)

    def norm_linear(x: Tensor, norm_weight: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float) -> Tensor:
        return F.linear(norm(x, norm_weight, epsilon), weight, bias)

    def add_norm_linear(
        x: Tensor, added: Tensor, norm_weight: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float
    ) -> tuple[Tensor, Tensor]:
        total, normalised = added_norm(x, added, norm_weight, epsilon)
        return total, F.linear(normalised, weight, bias)

    return LayerKernels(
        norm=norm,
        norm_linear=norm_linear if forgets_norms else PLAIN.norm_linear,
        add_norm=added_norm,
        add_norm_linear=add_norm_linear,
        swiglu=activation,
        swiglu_linear=lambda gate_up, weight: F.linear(activation(gate_up), weight),
        split_rotate=rows(split_rotate, still=2),
        split_norm_rotate=rows(split_norm_rotate, still=2),
    )


def _compiled_modules(layer: TransformerLayer) -> Iterator[NormLinear | Linear | RMSNorm | Attention]:
    """The modules of a layer's compiled parts that have forms to choose from."""
    for part in (layer.self_attention, layer.mlp if layer.pre_mlp_layernorm is None else layer.pre_mlp_layernorm):
        for module in part.modules():
            if isinstance(module, NormLinear | Linear | RMSNorm | Attention):
                yield module


def _name(options: Compile) -> str:
    return options.backend if isinstance(options.backend, str) else "a backend of a test"
