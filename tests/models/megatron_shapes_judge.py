"""Run by Megatron-Core's own Python (tests/models/test_megatron_shapes.py): load a checkpoint strictly into a GPTModel, and say its logits.

    python megatron_shapes_judge.py ORACLE MODEL.json ITER_FOLDER TOKENS.pt OUT.pt

MODEL.json is our ModelConfig as a JSON object. Nothing of megatron_swift is imported. Megatron's fused kernels are off: that of GELU
approximates it.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from typing import Any

sys.path.insert(0, sys.argv[1])
import mcore_cpu_shim  # before torch and megatron
import torch
import torch.distributed as dist
import torch.nn.functional as F


def transformer_config(model: dict[str, Any]) -> Any:
    from megatron.core.transformer.transformer_config import TransformerConfig

    moe = model["moe"]
    experts = {}
    if moe is not None:
        experts = {
            "num_moe_experts": moe["num_experts"],
            "moe_router_topk": moe["topk"],
            "moe_ffn_hidden_size": moe["ffn_hidden_size"],
            "moe_shared_expert_intermediate_size": moe["shared_size"] or None,
            "moe_shared_expert_gate": bool(moe["shared_size"]),
            "moe_router_pre_softmax": moe["pre_softmax"],
            "moe_router_load_balancing_type": "none",
            "moe_token_dispatcher_type": "alltoall",
        }
        if not all(moe["sparse_layers"]):
            experts["moe_layer_freq"] = [int(sparse) for sparse in moe["sparse_layers"]]
    names = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels")
    return TransformerConfig(
        **{name: model[name] for name in (*names, "normalization", "qk_layernorm")},
        layernorm_epsilon=model["norm_epsilon"],
        gated_linear_unit=model["swiglu"],
        activation_func=F.silu if model["swiglu"] else F.gelu,
        add_bias_linear=model["linear_bias"],
        add_qkv_bias=model["qkv_bias"],
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        use_cpu_initialization=True,
        params_dtype=torch.float32,
        **experts,
    )


def layer_specs(model: dict[str, Any]) -> Any:
    """Megatron's local layers, saved under the names that its Transformer-Engine layers have."""
    from megatron.core.models.gpt import gpt_layer_specs
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    moe = model["moe"]

    def one(sparse: bool) -> Any:
        spec = gpt_layer_specs.get_gpt_layer_local_spec(
            num_experts=moe["num_experts"] if sparse else None,
            qk_layernorm=model["qk_layernorm"],
            normalization=model["normalization"],
        )
        renamed = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
        if not sparse:
            renamed["pre_mlp_layernorm."] = "mlp.linear_fc1.layer_norm_"
        spec.submodules.sharded_state_dict_keys_map = renamed
        return spec

    if moe is None or all(moe["sparse_layers"]):  # layers of one kind lie stacked
        return one(moe is not None)
    norm = one(False).submodules.input_layernorm
    return TransformerBlockSubmodules(layer_specs=[one(sparse) for sparse in moe["sparse_layers"]], layer_norm=norm)


def load_strictly(gpt: Any, folder: str) -> None:
    """AssertionError unless the checkpoint holds the model's tensors and no others."""
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.dist_checkpointing.validation import StrictHandling

    metadata = dist_checkpointing.load_content_metadata(folder) or {}
    metadata["dp_cp_group"] = parallel_state.get_data_parallel_group(with_context_parallel=True)
    wanted = gpt.sharded_state_dict(metadata=metadata)
    state, missing, unexpected = dist_checkpointing.load({"model": wanted}, folder, strict=StrictHandling.RETURN_ALL)
    wrong = [key for key in (*missing, *unexpected) if "_extra_state" not in key]
    assert not wrong, f"in one of model and checkpoint only: {wrong}"
    left = gpt.load_state_dict(state["model"], strict=False)
    assert not [key for key in (*left.missing_keys, *left.unexpected_keys) if not key.endswith("_extra_state")], left


def main(model_file: str, folder: str, tokens_file: str, out: str) -> None:
    with open(model_file, encoding="utf-8") as file:
        model = json.load(file)
    with tempfile.TemporaryDirectory() as place:
        dist.init_process_group("gloo", init_method=f"file://{os.path.join(place, 'store')}", rank=0, world_size=1)
        mcore_cpu_shim.patch_megatron()
        from megatron.core import parallel_state, tensor_parallel
        from megatron.core.models.gpt import GPTModel

        parallel_state.initialize_model_parallel()
        tensor_parallel.model_parallel_cuda_manual_seed(1)
        gpt = GPTModel(
            config=transformer_config(model),
            transformer_layer_spec=layer_specs(model),
            vocab_size=model["vocab_size"],
            max_sequence_length=model["max_position_embeddings"],
            share_embeddings_and_output_weights=model["tied_embeddings"],
            position_embedding_type=model["position_embedding_type"],
            rotary_percent=model["rotary_percent"],
            rotary_base=int(model["rotary_base"]),
        ).eval()
        with torch.no_grad():
            for parameter in gpt.parameters():
                parameter.fill_(float("nan"))  # whatever is not loaded shows
            load_strictly(gpt, folder)
            tokens = torch.load(tokens_file)[None]
            size = tokens.shape[1]
            mask = torch.ones(size, size).triu(1).bool()[None, None]
            logits = gpt(input_ids=tokens, position_ids=torch.arange(size)[None], attention_mask=mask)
        torch.save(logits[0].float(), out)
        dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[2:])
