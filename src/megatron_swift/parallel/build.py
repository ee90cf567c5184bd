"""A model for a mesh: built, with its kernels and parallelism put in, in one order."""

from __future__ import annotations

import torch

from megatron_swift.kernels.cross_entropy import ChunkedLoss, choose_chunked, linear_cross_entropy, plain_softmax
from megatron_swift.kernels.fp8 import Fp8Linears, choose_fp8
from megatron_swift.kernels.grouped_linear import choose_grouped
from megatron_swift.kernels.later import AT_ONCE, Later, SecondStream
from megatron_swift.kernels.layers import choose_layer_kernels
from megatron_swift.kernels.router import choose_gate
from megatron_swift.kernels.te_attention import choose_core
from megatron_swift.models.config import ModelConfig
from megatron_swift.models.decoder import Decoder, build_decoder
from megatron_swift.parallel import compiled
from megatron_swift.parallel import data as data_parallel
from megatron_swift.parallel import expert as expert_parallel
from megatron_swift.parallel import recompute as recomputation
from megatron_swift.parallel import tensor as tensor_parallel
from megatron_swift.parallel.compiled import Around
from megatron_swift.parallel.context import context_core, own_kernels
from megatron_swift.parallel.data import Sharding
from megatron_swift.parallel.dropout import drop_attention
from megatron_swift.parallel.engine import Engine, EngineOptions
from megatron_swift.parallel.mesh import Axis, Mesh, part_of
from megatron_swift.parallel.pipeline import Links, Pipeline
from megatron_swift.parallel.recompute import CORE, recomputed_core
from megatron_swift.parallel.routers import RouterTotals
from megatron_swift.parallel.shards import Shards
from megatron_swift.parallel.stages import head_cost, split_layers
from megatron_swift.parallel.tensor_overlap import require_symmetric_memory, symmetric_memory

TIED = "embedding.word_embeddings.weight"


def build_engine(cfg: ModelConfig, mesh: Mesh, options: EngineOptions) -> Engine:
    """Spread a model over the mesh. The parameters are uninitialised: load weights into `engine.shards`, then `push()`.

    THE ordered list: stages -> layers -> kernels -> attention -> context -> tensor -> experts -> recomputation -> compilation -> data parallelism
    -> shards -> pipeline.
    """
    exact, device = torch.promote_types(options.compute_dtype, torch.float32), mesh.device
    sharded = mesh.shard.size > 1 and options.sharding is not Sharding.NO_SHARD
    experts_sharded = mesh.edp.size > 1 and options.sharding is not Sharding.NO_SHARD
    local = expert_parallel.local_config(tensor_parallel.local_config(cfg, mesh.tp.size), mesh)
    stages = _stages(cfg, mesh, options)
    kernels: dict[str, str] = {}
    chunks = []
    if options.tp_comm_overlap:
        require_symmetric_memory(mesh.tp, device)
    later = _choose_later(options, device, sharded=sharded)
    fp8 = _choose_fp8(cfg, options, device, later, sharded=sharded)
    for number in range(options.chunks_per_rank):
        stage = number * mesh.pp.size + mesh.pp.rank
        model = build_decoder(
            local,
            # With FSDP the parameters are the masters; without, they are what the matrix products use.
            dtype=exact if sharded else options.compute_dtype,
            device=torch.device("meta") if sharded else device,
            layers=stages[stage],
            first=stage == 0,
            last=stage == len(stages) - 1,
        )
        _install_layer_kernels(model, mesh, options, kernels, later, fp8)
        _install_attention(model, mesh, options, kernels)
        _install_tensor_parallel(model, cfg, mesh, options, kernels)
        _install_experts(model, local, mesh, options, kernels)
        recomputation.install(model, options.recompute)
        _install_compiled(model, mesh, options, kernels)
        if sharded or experts_sharded:
            over = (mesh.shard if sharded else Axis(), mesh.edp if experts_sharded else Axis())
            data_parallel.shard(
                model, *over, device=device, compute_dtype=options.compute_dtype, sharding=options.sharding
            )
        if sharded:
            model.to_empty(device=device)
        chunks.append(model)
    dense_replicas, expert_replicas = Axis() if sharded else mesh.shard, Axis() if experts_sharded else mesh.edp
    shards = _make_shards(chunks, cfg, mesh, options, later, dense_replicas, expert_replicas)
    pipeline = None
    if mesh.pp.size > 1:
        links = Links(mesh.pp, device, ring=options.chunks_per_rank > 1)
        pipeline = Pipeline(mesh.pp, links, options.chunks_per_rank)
    kernels |= _describe(mesh, options, stages, chunks[0])
    return Engine(
        chunks,
        mesh,
        shards,
        options,
        hidden_size=cfg.hidden_size,
        pipeline=pipeline,
        kernels=kernels,
        routers=RouterTotals(cfg, mesh) if cfg.moe is not None else None,
        fp8=fp8,
    )


def _choose_later(options: EngineOptions, device: torch.device, *, sharded: bool) -> Later:
    """How weights' gradients are formed. FSDP reads them at once; and where the parameter is its own master, autograd adds them up itself."""
    apart = options.compute_dtype in (torch.bfloat16, torch.float16) and not sharded
    return SecondStream(device) if options.second_stream and apart and device.type == "cuda" else AT_ONCE


def _choose_fp8(
    cfg: ModelConfig, options: EngineOptions, device: torch.device, later: Later, *, sharded: bool
) -> Fp8Linears | None:
    stay = not (sharded and options.sharding is Sharding.OPTIM_GRADS_PARAMS)
    return choose_fp8(
        options.fp8,
        device=device,
        dtype=options.compute_dtype,
        keep_weights=stay,
        recomputed=options.recompute.repeats_mlps(sparse=cfg.moe is not None),
        later=later,
    )


def _stages(cfg: ModelConfig, mesh: Mesh, options: EngineOptions) -> list[range]:
    return split_layers(
        cfg.num_layers,
        mesh.pp.size * options.chunks_per_rank,
        last_cost=head_cost(cfg),
        first=options.first_layers,
        last=options.last_layers,
    )


def _install_layer_kernels(
    model: Decoder,
    mesh: Mesh,
    options: EngineOptions,
    kernels: dict[str, str],
    later: Later,
    fp8: Fp8Linears | None,
) -> None:
    chosen, kernels["layers"] = choose_layer_kernels(
        options.unfused,
        device=mesh.device,
        dtype=options.compute_dtype,
        recomputed=options.recompute.repeats_mlps(sparse=model.cfg.moe is not None),
        used=model.fusible,
        later=later,
    )
    model.set_kernels(chosen)
    if fp8 is not None:
        model.change_linears(fp8.kernels)
        kernels["fp8"] = fp8.sentence


def _install_attention(model: Decoder, mesh: Mesh, options: EngineOptions, kernels: dict[str, str]) -> None:
    choice = choose_core(
        options.transformer_engine,
        options.attention_backend,
        device=mesh.device,
        dtype=options.compute_dtype,
        heads=model.cfg.num_attention_heads,
        groups=model.cfg.num_query_groups,
        head_dim=model.cfg.kv_channels,
        softmax_in_fp32=options.softmax_in_fp32,
        without=own_kernels(options.context_kind, mesh.cp),
    )
    core = choice.core
    kernels["attention"] = choice.reason
    if mesh.cp.size > 1:
        core = context_core(options.context_kind, mesh.cp, core)
        kernels["context"] = f"{mesh.cp.size} ranks, zig-zag chunks, {options.context_kind}"
    elif options.recompute.has(CORE) and choice.keeps_weights:
        core = recomputed_core(core)
        kernels["attention"] += ", computed again in the backward pass"
    model.set_attention(core)
    model.set_hidden_dropout(options.dropout.hidden)
    if options.dropout.attention:
        again = options.recompute.has(CORE)
        kernels["attention"] = drop_attention(
            model, mesh, options.dropout, core, softmax_in_fp32=options.softmax_in_fp32, again=again
        )


def _install_tensor_parallel(
    model: Decoder, cfg: ModelConfig, mesh: Mesh, options: EngineOptions, kernels: dict[str, str]
) -> None:
    form, reason = choose_chunked(mesh.device, options.compute_dtype)
    if options.chunked_cross_entropy or form.softmax is not plain_softmax:  # the fused form is the fastest, too
        model.loss_function, kernels["cross-entropy"] = form.loss(None), reason
    else:
        form = ChunkedLoss(None)
        model.loss_function, kernels["cross-entropy"] = linear_cross_entropy, "whole logits of the trained tokens"
    if mesh.tp.size > 1:
        assert mesh.tp.group is not None
        tensor_parallel.install(
            model,
            cfg,
            mesh.tp,
            sequence_parallel=options.sequence_parallel,
            loss=form,
            products=symmetric_memory(mesh.tp.group) if options.tp_comm_overlap else None,
        )


def _install_experts(
    model: Decoder, cfg: ModelConfig, mesh: Mesh, options: EngineOptions, kernels: dict[str, str]
) -> None:
    """cfg: of this rank's modules."""
    if cfg.moe is None:
        return
    assert options.sequence_parallel or mesh.tp.size == 1, "tensor-parallel ranks would route the same tokens"
    sizes = (cfg.hidden_size, cfg.moe.ffn_hidden_size)
    product, kernels["experts"] = choose_grouped(
        options.grouped_experts, dtype=options.compute_dtype, device=mesh.device, sizes=sizes
    )
    dtypes = (options.router.dtype, options.compute_dtype)
    gate, said = choose_gate(mesh.device, dtypes, num_experts=cfg.moe.num_experts)
    kernels["experts"] += f"; {said}"
    expert_parallel.install(
        model,
        mesh,
        dispatcher=options.dispatcher,
        router=options.router,
        gate=gate,
        product=product,
        fused="swiglu" not in options.unfused,
        overlap=options.overlap_shared_expert,
    )


def _install_compiled(model: Decoder, mesh: Mesh, options: EngineOptions, kernels: dict[str, str]) -> None:
    compiled.install(
        model,
        options.compile,
        Around(
            tensor_parallel=mesh.tp.size > 1,
            fp8=options.fp8 is not None,
            hidden_dropout=options.dropout.hidden,
            recompute=options.recompute,
        ),
        device=mesh.device,
        dtype=options.compute_dtype,
        kernels=kernels,
    )


def _make_shards(
    chunks: list[Decoder],
    cfg: ModelConfig,
    mesh: Mesh,
    options: EngineOptions,
    later: Later,
    dense: Axis,
    experts: Axis,
) -> Shards:
    """dense, experts: the ranks that hold the same parameters whole, and must sum their gradients."""
    whole = build_decoder(cfg, dtype=torch.float32, device=torch.device("meta"))
    shapes = {name: tuple(parameter.shape) for name, parameter in whole.named_parameters()}

    def place(name: str) -> tensor_parallel.Placement:
        if expert_parallel.is_expert(name):
            return expert_parallel.placement(name, shapes[name], cfg, mesh)
        return tensor_parallel.placement(name, shapes[name], cfg, mesh.tp, sequence_parallel=options.sequence_parallel)

    shared = cfg.tied_embeddings and mesh.pp.size > 1
    shards = Shards(
        chunks,
        mesh,
        master_dtype=torch.promote_types(options.compute_dtype, torch.float32),
        shapes=shapes,
        place=place,
        replicas=lambda name: experts if expert_parallel.is_expert(name) else dense,
        tied=TIED if shared else None,
        kv_replicas=part_of(mesh.tp, max(mesh.tp.size // cfg.num_query_groups, 1)),
        ends=mesh.ends if shared else Axis(),
        later=later,
    )
    with torch.no_grad():
        for shard in shards:
            shard.master.zero_()  # rows of padding stay zero
    return shards


def _describe(mesh: Mesh, options: EngineOptions, stages: list[range], model: Decoder) -> dict[str, str]:
    """Lines for the banner."""
    lines = {}
    if mesh.tp.size > 1:
        lines["tensor"] = f"{mesh.tp.size} ranks" + (", sequence parallel" if options.sequence_parallel else "")
        if options.tp_comm_overlap:
            lines["tensor"] += ", communication beside the matrix products of the layers (symmetric memory)"
    if mesh.pp.size > 1:
        virtual = f", {options.chunks_per_rank} virtual stages each" if options.chunks_per_rank > 1 else ""
        lines["pipeline"] = f"{mesh.pp.size} ranks{virtual}, layers per stage {[len(s) for s in stages]}"
    if mesh.experts.size > 1:
        lines["expert"] = f"{mesh.ep.size} ranks, each expert over {mesh.etp.size}, {options.dispatcher} dispatch"
    if again := recomputation.describe(options.recompute, model):
        lines["recompute"] = again
    if mesh.shard.size > 1:
        how = (
            "replicas, gradients all-reduced"
            if options.sharding is Sharding.NO_SHARD
            else f"FSDP2, {options.sharding.value} sharded"
        )
        lines["data parallel"] = f"{how} over {mesh.shard.size} ranks, gradients summed ({mesh.backend})"
    else:
        lines["data parallel"] = "none" if mesh.world_size > 1 else "none (one process)"
    return lines
