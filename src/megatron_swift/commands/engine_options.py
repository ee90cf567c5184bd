"""From arguments to the engine's options: how to compute, and how to spread the model over the ranks."""

from __future__ import annotations

import torch

from megatron_swift.args.moe_rules import capacity_factor
from megatron_swift.args.rules import virtual_stages
from megatron_swift.args.training_params import asked_kernel
from megatron_swift.args.transformer_engine import wish
from megatron_swift.checkpoint.weights import TORCH_DTYPES
from megatron_swift.commands.setup import RunSetup
from megatron_swift.kernels.fp8 import Fp8Options
from megatron_swift.models.routing import RouterOptions
from megatron_swift.parallel.compiled import Compile
from megatron_swift.parallel.data import Sharding
from megatron_swift.parallel.dropout import Dropout
from megatron_swift.parallel.engine import EngineOptions
from megatron_swift.parallel.mesh import Sizes
from megatron_swift.parallel.recompute import Recompute

_ROUTER_DTYPES = {"fp32": torch.float32, "fp64": torch.float64, "none": None}


def sizes(setup: RunSetup) -> Sizes:
    """How many ranks share what."""
    args = setup.args
    return Sizes(
        args.tensor_model_parallel_size,
        args.pipeline_model_parallel_size,
        args.context_parallel_size,
        ep=args.expert_model_parallel_size if setup.model.moe is not None else None,
        etp=args.expert_tensor_parallel_size,
    )


def engine_options(setup: RunSetup) -> EngineOptions:
    """The arguments that say how to compute and how to spread the model."""
    args = setup.args
    strategy = args.data_parallel_sharding_strategy or ("optim" if args.use_distributed_optimizer else "no_shard")
    return EngineOptions(
        compute_dtype=TORCH_DTYPES[setup.dtype],
        attention_backend=asked_kernel(args)[0],
        transformer_engine=wish(args),
        softmax_in_fp32=args.attention_softmax_in_fp32,
        chunked_cross_entropy=args.cross_entropy_loss_fusion,
        unfused=tuple(
            name for name, off in (("rope", args.no_rope_fusion), ("swiglu", args.no_bias_swiglu_fusion)) if off
        ),
        fp8=Fp8Options(format=args.fp8_format, recipe=args.fp8_recipe) if args.fp8_format is not None else None,
        sequence_parallel=args.sequence_parallel and args.tensor_model_parallel_size > 1,
        tp_comm_overlap=args.tp_comm_overlap,
        sharding=Sharding(strategy),
        context_kind=args.cp_comm_type,
        recompute=Recompute(
            args.recompute_granularity,
            args.recompute_method,
            args.recompute_num_layers,
            tuple(args.recompute_modules),
        ),
        chunks_per_rank=virtual_stages(args, num_layers=setup.model.num_layers),
        first_layers=args.decoder_first_pipeline_num_layers,
        last_layers=args.decoder_last_pipeline_num_layers,
        compile=Compile(args.torch_compile),
        dropout=Dropout(args.attention_dropout or 0.0, args.hidden_dropout, seed=args.seed),
        router=_router(setup),
        dispatcher=args.moe_token_dispatcher_type.removesuffix("_seq"),
        grouped_experts=args.moe_grouped_gemm,
        overlap_shared_expert=args.moe_shared_expert_overlap,
    )


def _router(setup: RunSetup) -> RouterOptions:
    args, moe = setup.args, setup.model.moe
    if moe is None:
        return RouterOptions()
    coeff = args.moe_aux_loss_coeff if args.moe_aux_loss_coeff is not None else moe.aux_loss_coeff
    return RouterOptions(
        balancing=args.moe_router_load_balancing_type,
        aux_coeff=coeff,
        z_coeff=args.moe_z_loss_coeff or 0.0,
        capacity_factor=capacity_factor(args),
        drop_policy=args.moe_token_drop_policy,
        pad_to_capacity=args.moe_pad_expert_input_to_capacity,
        dtype=_ROUTER_DTYPES[args.moe_router_dtype],
    )
