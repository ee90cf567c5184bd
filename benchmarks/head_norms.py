"""Time of cutting, normalising and rotating the heads of queries and keys on a GPU, forward and backward:

    python benchmarks/head_norms.py [--tokens 16384]

"one kernel" is the product's; "norm fused" is what it was before, with torch's own rotation; "no norms" is the kernel of models without norms of
heads, whose traffic is the least there can be. GB/s count each byte that has to be read or written once, gradients of weights aside.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor
from triton.testing import do_bench

from megatron_swift.kernels import layers

EPSILON = 1e-6
# groups, query heads of a group, width: the 1.5B shape, Qwen3-0.6B, Qwen3-8B, Qwen3-32B, the last on one of 8 ranks, other widths
SHAPES = [(2, 6, 128), (8, 2, 128), (8, 4, 128), (8, 8, 128), (1, 8, 128), (8, 4, 64), (16, 1, 96), (4, 2, 256)]


def times(function: Callable[..., tuple[Tensor, ...]], tensors: list[Tensor]) -> tuple[float, float]:
    """Milliseconds of the forward pass with its graph, and of the backward pass: medians."""
    outputs = function(*tensors)
    grads = [torch.randn_like(out) for out in outputs]
    used = [t for t in tensors if t.requires_grad]
    forward = do_bench(lambda: function(*tensors), return_mode="median")
    backward = do_bench(lambda: torch.autograd.grad(outputs, used, grads, retain_graph=True), return_mode="median")
    return forward, backward


def main() -> None:
    """Print one line for each shape and form."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16384)
    tokens = parser.parse_args().tokens
    one, before = (layers._triton_kernels(off, recomputed=False) for off in ((), ("rope",)))
    options = {"device": "cuda", "dtype": torch.bfloat16}
    for groups, heads, dim in SHAPES:
        qkv = torch.randn(tokens, groups, heads + 2, dim, **options).requires_grad_()
        weights = [torch.rand(dim, **options).requires_grad_() for _ in range(2)]
        angles = torch.randn(tokens, 1, dim // 2, device="cuda").repeat(1, 1, 2)
        turn = [angles.cos().bfloat16(), angles.sin().bfloat16()]
        forms: dict[str, tuple[Callable[..., tuple[Tensor, ...]], list[Tensor]]] = {
            "one kernel": (
                lambda x, q, k, *turn: one.split_norm_rotate(x, q, k, EPSILON, *turn),
                [qkv, *weights, *turn],
            ),
            "norm fused": (
                lambda x, q, k, *turn: before.split_norm_rotate(x, q, k, EPSILON, *turn),
                [qkv, *weights, *turn],
            ),
            "no norms": (one.split_rotate, [qkv, *turn]),
        }
        rows, beside = 2 * qkv.numel(), 2 * 2 * turn[0].numel()
        for name, (function, tensors) in forms.items():
            forward, backward = times(function, tensors)
            # Forward: rows in and out. Backward: gradients in and out; the norms need their queries and keys, too.
            kept = rows * (heads + 1) / (heads + 2) if name != "no norms" else 0
            rates = (2 * rows + beside) / forward / 1e6, (2 * rows + kept + beside) / backward / 1e6
            print(
                f"{groups} groups of {heads} heads of {dim}, {name}: forward {forward:.3f} ms, {rates[0]:.0f} GB/s; "
                f"backward {backward:.3f} ms, {rates[1]:.0f} GB/s",
                flush=True,
            )


if __name__ == "__main__":
    main()
