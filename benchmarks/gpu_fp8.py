"""FP8 on one GPU, kernel by kernel: what quantising costs, how fast torch's scaled products are, how exact both are.

    python benchmarks/gpu_fp8.py [--quick] [--out FILE]

The sizes are those of a Llama-3-8B layer at 8192 tokens. Kernels are set against bytes / 3 TB/s, products against 2 x N x M x K. Each part that
fails prints its exception, and the next one runs: a call on a rented machine should not be lost to the first fault. About a minute.
"""

from __future__ import annotations

import argparse
import functools
import json
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_swift.kernels.fp8_values import Recipe, Side, padded_block_product, plain_quantise, product, quantise
from megatron_swift.kernels.fused import fp8 as fused

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
RATE = 3.0e12
TOKENS = 8192
# name -> (rows of the weight, columns)
LINEARS = {"qkv": (6144, 4096), "proj": (4096, 4096), "fc1": (28672, 4096), "fc2": (4096, 14336)}
TILES = [(128, 64, 4), (64, 64, 4), (128, 128, 8), (64, 128, 4), (128, 64, 8), (256, 64, 8), (128, 32, 4)]
TABLE: list[dict[str, Any]] = []


def milliseconds(function: Callable[[], Any], *, repeats: int = 10) -> float:
    """The median time of a call on the device."""
    for _ in range(3):
        function()
    torch.cuda.synchronize()
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, end in pairs:
        start.record()
        function()
        end.record()
    torch.cuda.synchronize()
    return sorted(start.elapsed_time(end) for start, end in pairs)[repeats // 2]


def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
    """Normal values in bfloat16."""
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16) * scale


def attempt(name: str, part: Callable[[], dict[str, Any]]) -> None:
    """Run a part, print and keep its row; an exception is its row as well."""
    try:
        row = {"part": name, **part()}
    except Exception as error:
        row = {
            "part": name,
            "error": f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}",
        }
        traceback.print_exc(limit=-3)
    TABLE.append(row)
    print("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)


def timed_bytes(function: Callable[[], Any], size: float) -> dict[str, Any]:
    """size: bytes read and written."""
    took = milliseconds(function)
    return {"ms": took, "at 3 TB/s": size / RATE * 1e3, "share": size / RATE * 1e3 / took}


def kernels() -> None:
    """amax, and the cast with its transposition."""
    sizes = {"x 4096": (TOKENS, 4096), "x 14336": (TOKENS, 14336), "dy 28672": (TOKENS, 28672)}
    for name, shape in sizes.items():
        x = random(*shape)
        attempt(f"amax {name}", lambda x=x: timed_bytes(lambda: fused.amax_of(x), x.numel() * 2))
        attempt(f"clone {name}", lambda x=x: timed_bytes(x.clone, x.numel() * 4))
        for tile in TILES:

            def cast(x: torch.Tensor = x, tile: tuple[int, int, int] = tile) -> dict[str, Any]:
                slots = fused.amax_of(x)
                kind = E5M2 if x.shape[1] == 28672 else E4M3
                return timed_bytes(lambda: fused.quantise(x, kind, "tensorwise", amax=slots, tile=tile), x.numel() * 4)

            attempt(f"tensorwise cast {name} tile {tile}", cast)
        for recipe, size in (("rowwise", 6), ("blockwise", 4)):

            def whole(x: torch.Tensor = x, recipe: Any = recipe, size: int = size) -> dict[str, Any]:
                return timed_bytes(lambda: quantise(x, E4M3, recipe), x.numel() * size)

            attempt(f"{recipe} whole {name}", whole)
    weight = random(28672, 4096)
    attempt(
        "blockwise weight",
        lambda: timed_bytes(lambda: quantise(weight, E4M3, "blockwise", weight=True), weight.numel() * 4),
    )
    attempt(
        "tensorwise cast rows only",
        lambda: timed_bytes(lambda: quantise(weight, E4M3, "tensorwise", columns=False), weight.numel() * 5),
    )


def operands(rows: int, columns: int, recipe: Recipe, grad: torch.dtype) -> dict[str, tuple[Side, Side]]:
    """The sides of the three products of a linear layer."""
    x = quantise(random(TOKENS, columns), E4M3, recipe)
    w = quantise(random(rows, columns, scale=0.02), E4M3, recipe, weight=True)
    g = quantise(random(TOKENS, rows), grad, recipe)
    assert x.rows and x.columns and w.rows and w.columns and g.rows and g.columns
    return {"y": (x.rows, w.rows), "dx": (g.rows, w.columns), "dw": (g.columns, x.columns)}


def products() -> None:
    """The scaled products beside bfloat16's."""
    forms: list[tuple[Recipe, torch.dtype, bool]] = [
        ("tensorwise", E5M2, True),
        ("tensorwise", E5M2, False),
        ("tensorwise", E4M3, True),
        ("rowwise", E5M2, True),
        ("rowwise", E5M2, False),
        ("blockwise", E4M3, False),
    ]
    for name, (rows, columns) in LINEARS.items():
        timed = functools.partial(rate, work=2.0 * TOKENS * rows * columns)
        x, w, g = random(TOKENS, columns), random(rows, columns), random(TOKENS, rows)
        for one, (a, b) in {"y": (x, w.t()), "dx": (g, w), "dw": (g.t(), x)}.items():
            attempt(f"bfloat16 {name} {one}", functools.partial(timed, functools.partial(torch.mm, a, b)))
        for recipe, grad, fast in forms:
            kind = "e5m2" if grad is E5M2 else "e4m3"
            try:
                pairs = operands(rows, columns, recipe, grad)
            except Exception as error:
                print(f"{recipe} {kind} {name}: {error!r}"[:300], flush=True)
                continue
            for one, (first, second) in pairs.items():
                label = f"{recipe} {kind} {'fast' if fast else 'exact'} {name} {one}"
                call = functools.partial(product, first, second, fast=fast)
                attempt(label, functools.partial(timed, call))


def sustained() -> None:
    """A layer's twelve products one after the other for half a second: alone, a product runs at clocks that a step does not see."""
    work = sum(6.0 * TOKENS * rows * columns for rows, columns in LINEARS.values())
    forms: list[tuple[Recipe | None, bool]] = [("tensorwise", True), ("tensorwise", False), (None, True)]
    for recipe, fast in forms:
        calls: list[Callable[[], torch.Tensor]] = []
        for rows, columns in LINEARS.values():
            if recipe is not None:
                pairs = operands(rows, columns, recipe, E5M2)
                calls += [functools.partial(product, a, b, fast=fast) for a, b in pairs.values()]
            else:
                x, w, g = random(TOKENS, columns), random(rows, columns), random(TOKENS, rows)
                calls += [functools.partial(torch.mm, *pair) for pair in ((x, w.t()), (g, w), (g.t(), x))]

        def layer(calls: list[Callable[[], torch.Tensor]] = calls) -> None:
            for call in calls:
                call()

        label = "bfloat16" if recipe is None else f"{recipe} {'fast' if fast else 'exact'}"
        attempt(f"sustained {label}, a layer", functools.partial(rate, layer, work=work, repeats=30))


def rate(call: Callable[[], Any], *, work: float, repeats: int = 10) -> dict[str, Any]:
    """work: floating-point operations."""
    took = milliseconds(call, repeats=repeats)
    return {"ms": took, "TFLOP/s": work / took / 1e9}


def exactness() -> None:
    """Relative errors of the three products against float64, and the kernels against torch's operators value by value."""
    n, rows, columns = 1000, 1536, 2048
    x, w, g = random(n, columns), random(rows, columns, scale=0.02), random(n, rows, scale=1e-4)
    exact = {"y": x.double() @ w.double().t(), "dx": g.double() @ w.double(), "dw": g.double().t() @ x.double()}
    for recipe, grad in (("tensorwise", E5M2), ("tensorwise", E4M3), ("rowwise", E5M2), ("blockwise", E4M3)):
        for fast in (True, False):

            def errors(recipe: Any = recipe, grad: torch.dtype = grad, fast: bool = fast) -> dict[str, Any]:
                qx, qg = quantise(x, E4M3, recipe), quantise(g, grad, recipe)
                qw = quantise(w, E4M3, recipe, weight=True)
                pairs = {"y": (qx.rows, qw.rows), "dx": (qg.rows, qw.columns), "dw": (qg.columns, qx.columns)}
                found: dict[str, Any] = {}
                for one, (a, b) in pairs.items():
                    assert a is not None and b is not None
                    mine = product(a, b, fast=fast).double()[: len(exact[one])]
                    twin = (a.whole() @ b.whole().t()).double()[: len(exact[one])]
                    found[one] = float((mine - exact[one]).norm() / exact[one].norm())
                    found[f"{one} from twin"] = float((mine - twin).norm() / twin.norm())
                return found

            label = "fast" if fast else "exact"
            attempt(f"error {recipe} {'e5m2' if grad is E5M2 else 'e4m3'} {label}", errors)

        def same(recipe: Any = recipe, grad: torch.dtype = grad) -> dict[str, Any]:
            found: dict[str, Any] = {}
            for name, value, kind, weight in (("x", x, E4M3, False), ("w", w, E4M3, True), ("g", g, grad, False)):
                mine = quantise(value, kind, recipe, weight=weight)
                twin = plain_quantise(value, kind, recipe, weight=weight)
                for part in ("rows", "columns"):
                    a, b = getattr(mine, part), getattr(twin, part)
                    found[f"{name} {part}"] = int((a.values.float() != b.values.float()).sum())
                    found[f"{name} {part} scales"] = int((a.scale != b.scale).sum())
            return found

        attempt(f"values unlike the twin's, {recipe}", same)


def padded_blocks() -> dict[str, Any]:
    """The other of torch's products of blocks, for rows of 5 blocks: its error against the numbers that the operands stand for."""
    a = quantise(random(384, 640), E4M3, "blockwise").rows
    b = quantise(random(256, 640), E4M3, "blockwise", weight=True).rows
    assert a is not None and b is not None
    exact = a.whole().double() @ b.whole().double().t()
    mine = padded_block_product(a, b, dtype=torch.bfloat16).double()
    return {"y from twin": float((mine - exact).norm() / exact.norm())}


def main() -> None:
    """Measure, print, perhaps keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the errors alone")
    parser.add_argument("--out", type=Path, help="also write the rows here, as JSON")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    print(torch.cuda.get_device_name(), torch.__version__, flush=True)
    exactness()
    attempt("error of padded blocks", padded_blocks)
    if not arguments.quick:
        products()
        sustained()
        kernels()
    if arguments.out:
        arguments.out.write_text(json.dumps(TABLE, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
