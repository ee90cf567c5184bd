"""Rules of mixtures of experts: which sizes fit the model and each other. Each raises UsageError."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_swift.args.commands import TrainArguments
from megatron_swift.args.model_params import MoeParams
from megatron_swift.args.spec import params_of
from megatron_swift.utils.errors import UsageError
from megatron_swift.utils.log import get_logger


@dataclass(frozen=True, kw_only=True)
class Experts:
    """What the rules need of a model's experts.

    shared_size : inner width of the shared one, 0 without.
    everywhere  : no layer is dense.
    """

    number: int
    topk: int
    ffn_hidden_size: int
    shared_size: int
    pre_softmax: bool
    everywhere: bool = True


def check_experts(args: TrainArguments, experts: Experts | None, *, world_size: int) -> None:
    """Raise UsageError for what cannot be done with these experts; warn about what changes nothing."""
    if experts is None:
        _dense(args)
        return
    _model(args, experts)
    _sizes(args, experts, world_size)
    _dispatcher(args)
    _balancing(args)
    _capacity(args)
    if experts.everywhere and "mlp" in args.recompute_modules:
        get_logger().warning("--recompute_modules mlp changes nothing: no layer of the model is dense")
    if args.moe_shared_expert_overlap and not experts.shared_size:
        get_logger().warning("--moe_shared_expert_overlap changes nothing: the model has no shared expert")


def expert_tensor_size(args: TrainArguments) -> int:
    """Ranks that share an expert's matrices."""
    return args.expert_tensor_parallel_size or args.tensor_model_parallel_size


def _dense(args: TrainArguments) -> None:
    for name in ("expert_model_parallel_size", "expert_tensor_parallel_size"):
        value = getattr(args, name)
        if value is not None and value > 1:
            raise UsageError(
                f"--{name} {value}: the model has no experts",
                why="its config.json describes a dense model",
                do=f"leave --{name} out",
            )
    unused = sorted(args.given & params_of(MoeParams).keys())
    if unused:
        flags = ", ".join(f"--{name}" for name in unused)
        get_logger().warning("%s: no effect, the model has no experts", flags)
    if "moe_act" in args.recompute_modules:
        get_logger().warning("--recompute_modules moe_act changes nothing: the model has no experts")


def _model(args: TrainArguments, experts: Experts) -> None:
    if experts.topk > experts.number:
        raise UsageError(
            f"moe_router_topk {experts.topk} is more than the {experts.number} experts",
            do=f"use --moe_router_topk {experts.number} or less",
        )
    sinkhorn = args.moe_router_load_balancing_type == "sinkhorn"
    if experts.topk == 1 and not experts.pre_softmax and not sinkhorn:
        raise UsageError(
            "moe_router_topk 1 needs --moe_router_pre_softmax true",
            why="a softmax over the one chosen expert is always 1, so the router would learn nothing",
            do="add --moe_router_pre_softmax true",
        )


def _sizes(args: TrainArguments, experts: Experts, world_size: int) -> None:
    tp, pp, ep, etp = (
        args.tensor_model_parallel_size,
        args.pipeline_model_parallel_size,
        args.expert_model_parallel_size,
        expert_tensor_size(args),
    )
    if tp > 1 and not args.sequence_parallel:
        raise UsageError(
            f"--tensor_model_parallel_size {tp} with experts needs --sequence_parallel true",
            why="without it all tensor-parallel ranks would send the same tokens to the experts",
            do="add --sequence_parallel true",
        )
    legal = [n for n in range(1, experts.number + 1) if experts.number % n == 0 and world_size % (n * etp * pp) == 0]
    listed = ", ".join(map(str, legal))
    if experts.number % ep:
        raise UsageError(
            f"--expert_model_parallel_size {ep} does not divide the model's {experts.number} experts",
            do=f"use one of {listed}" if legal else "",
        )
    if world_size % (ep * etp * pp):
        flag = f"expert_tensor_parallel_size {etp}" + (
            "" if args.expert_tensor_parallel_size else " (as tensor parallel)"
        )
        raise UsageError(
            f"{world_size} processes cannot be split by expert_model_parallel_size {ep} x {flag} x "
            f"pipeline_model_parallel_size {pp} = {ep * etp * pp}",
            do=f"use an --expert_model_parallel_size of {listed}"
            if legal
            else "use a smaller --expert_tensor_parallel_size",
        )
    if experts.ffn_hidden_size % etp:
        whole = ", ".join(str(n) for n in range(1, etp) if experts.ffn_hidden_size % n == 0 and world_size % n == 0)
        raise UsageError(
            f"expert_tensor_parallel_size {etp} does not divide moe_ffn_hidden_size {experts.ffn_hidden_size}",
            do=f"use an --expert_tensor_parallel_size of {whole}",
        )


def _dispatcher(args: TrainArguments) -> None:
    etp = expert_tensor_size(args)
    if args.moe_token_dispatcher_type == "alltoall_seq" and etp != args.tensor_model_parallel_size:
        raise UsageError(
            f"--moe_token_dispatcher_type alltoall_seq needs expert_tensor_parallel_size {etp} to be "
            f"tensor_model_parallel_size {args.tensor_model_parallel_size}",
            do="use --moe_token_dispatcher_type alltoall",
        )
    if args.moe_shared_expert_overlap and args.moe_token_dispatcher_type != "alltoall":
        raise UsageError(
            f"--moe_shared_expert_overlap true excludes --moe_token_dispatcher_type {args.moe_token_dispatcher_type}",
            do="use --moe_token_dispatcher_type alltoall",
        )


def _balancing(args: TrainArguments) -> None:
    kind = args.moe_router_load_balancing_type
    if not kind.endswith("aux_loss") and args.moe_aux_loss_coeff and "moe_aux_loss_coeff" in args.given:
        raise UsageError(
            f"--moe_aux_loss_coeff {args.moe_aux_loss_coeff:g} has no place with --moe_router_load_balancing_type {kind}",
            why="that kind adds no loss",
            do="leave --moe_aux_loss_coeff out, or use aux_loss, seq_aux_loss or global_aux_loss",
        )


def _capacity(args: TrainArguments) -> None:
    factor = capacity_factor(args)
    named = [n for n in ("moe_token_drop_policy", "moe_pad_expert_input_to_capacity") if n in args.given]
    if factor is None:
        if args.moe_pad_expert_input_to_capacity:
            raise UsageError(
                "--moe_pad_expert_input_to_capacity true needs --moe_expert_capacity_factor",
                do="give one, such as --moe_expert_capacity_factor 1.5",
            )
        if named:
            get_logger().warning("--%s: no effect without --moe_expert_capacity_factor", named[0])
        return
    kind = args.moe_router_load_balancing_type
    if kind == "sinkhorn":
        raise UsageError(
            "--moe_expert_capacity_factor excludes --moe_router_load_balancing_type sinkhorn",
            why="Sinkhorn assignment is balanced by itself",
            do="leave one of the two out",
        )
    if args.moe_pad_expert_input_to_capacity and args.moe_token_dispatcher_type == "allgather":
        raise UsageError(
            "--moe_pad_expert_input_to_capacity true excludes --moe_token_dispatcher_type allgather",
            do="use --moe_token_dispatcher_type alltoall",
        )


def capacity_factor(args: TrainArguments) -> float | None:
    """--moe_expert_capacity_factor; a negative one means none, as in Megatron-SWIFT."""
    factor = args.moe_expert_capacity_factor
    return factor if factor is not None and factor > 0 else None
