"""Time of a router's forward and backward pass on a GPU, plain and fused, with the losses attached:

    python benchmarks/router.py [--tokens 16384] [--experts 60] [--topk 4]

Device time and kernels launched are the profiler's, host time is that until the last launch has returned.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch.profiler import ProfilerActivity, profile

from megatron_swift.kernels.fused.router import fused_gate
from megatron_swift.kernels.router import Gate, plain_gate
from megatron_swift.models.config import MoEConfig
from megatron_swift.models.moe import Router
from megatron_swift.models.routing import RouterOptions, Routing


def make(gate: Gate, *, tokens: int, experts: int, topk: int) -> tuple[Router, Routing, torch.Tensor]:
    """A router in training, its row and its input in bfloat16."""
    cfg = MoEConfig(
        num_experts=experts, topk=topk, ffn_hidden_size=4, shared_size=0, pre_softmax=True, sparse_layers=(True,)
    )
    router = Router(cfg, 2048, 0).cuda()
    torch.nn.init.normal_(router.weight, std=0.02)
    router.requires_grad_()
    router.options, router.gate = RouterOptions(balancing="aux_loss", aux_coeff=0.001, z_coeff=0.001), gate
    index = torch.arange(tokens, device="cuda")
    scale = torch.tensor(1.0, device="cuda")
    routing = Routing(None, index, index * 0, torch.tensor([tokens], device="cuda"), tokens, scale)
    return router, routing, torch.randn(tokens, 2048, device="cuda", dtype=torch.bfloat16, requires_grad=True)


def step(router: Router, routing: Routing, x: torch.Tensor) -> None:
    """Forward and backward."""
    router(x, routing).probs.sum().backward()


def main() -> None:
    """Print one line for each form."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("tokens", 16384), ("experts", 60), ("topk", 4)):
        parser.add_argument(f"--{name}", type=int, default=default)
    sizes = vars(parser.parse_args())
    for name, gate in (("plain", plain_gate), ("fused", fused_gate)):
        parts = make(gate, **sizes)
        for _ in range(5):
            step(*parts)
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(20):
            step(*parts)
        host = (time.perf_counter() - start) / 20
        torch.cuda.synchronize()
        whole = (time.perf_counter() - start) / 20
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            step(*parts)
            torch.cuda.synchronize()
        events = [e for e in seen.key_averages() if e.self_device_time_total]
        device, launches = sum(e.self_device_time_total for e in events), sum(e.count for e in events)
        print(
            f"{name}: {device:.0f} us on the device in {launches} launches; {1e6 * host:.0f} us of host, {1e6 * whole:.0f} us in all"
        )


if __name__ == "__main__":
    main()
