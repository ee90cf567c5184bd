"""The model of a run: a folder's config.json with the user's model parameters over it, or these parameters alone."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_swift.args import model_rules
from megatron_swift.args.commands import TrainArguments
from megatron_swift.args.model_params import layer_freq
from megatron_swift.checkpoint.companions import CONFIG
from megatron_swift.commands.chat_template import asked_template, user_families
from megatron_swift.data.tokenizer import Tokenizer
from megatron_swift.models.config import ModelConfig, MoEConfig, read_json, read_rope
from megatron_swift.models.families import NATIVE, Described, describe, family_of
from megatron_swift.utils.errors import CheckpointError, UsageError
from megatron_swift.utils.log import get_logger

MODEL_FIELDS = {
    **{name: name for name in ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads")},
    **{name: name for name in ("num_query_groups", "kv_channels", "max_position_embeddings", "norm_epsilon")},
    **{name: name for name in ("position_embedding_type", "rotary_percent", "normalization", "swiglu")},
    "qk_layernorm": "qk_layernorm",
    "rotary_base": "rotary_base",
    "add_qkv_bias": "qkv_bias",
    "padded_vocab_size": "vocab_size",
}
MOE_FIELDS = {
    "num_experts": "num_experts",
    "moe_ffn_hidden_size": "ffn_hidden_size",
    "moe_shared_expert_intermediate_size": "shared_size",
    "moe_router_topk": "topk",
    "moe_router_pre_softmax": "pre_softmax",
}
VOCABULARY_MULTIPLE = 128  # Megatron's make_vocab_size_divisible_by
# Other spellings of what a config.json says, which must not stay beside a new one.
_RESPELT = ("rope_parameters", "dtype", "rope_scaling", "rope_type")


@dataclass(frozen=True)
class RunModel:
    """described : the folder's model, with its template.  config: the model to train, with the user's parameters.

    written : the config.json of the run, where the folder's is not that of this model.
    scratch : whether its weights are drawn anew.
    """

    described: Described
    config: ModelConfig
    written: dict[str, Any] | None
    scratch: bool


def settle_model(args: TrainArguments, folder: Path, load: Path | None, tokenizer: Tokenizer, *, gpus: int) -> RunModel:
    """Which model is trained. gpus: for the default dtype of a model that no config.json describes.

    Raises UsageError and CheckpointError where it cannot be told or built.
    """
    model_rules.check_flags(args)
    scratch = load is None and not args.no_initialization

    def understood(hf: dict[str, Any] | None) -> Described:
        return describe(
            folder,
            model_type=args.model_type,
            template=asked_template(args),
            chat_template=tokenizer.chat_template,
            extra=user_families(args),
            hf=hf,
        )

    if (folder / CONFIG).is_file():
        described = understood(None)
        config = override(described.config, args, pretrained=load is None and not scratch)
        written = None
        if config != described.config and described.family.write_config is not None:
            family, config, new = family_of(config, described.family)
            old = read_json(folder / CONFIG) if family is described.family else {}
            written = {**{key: old[key] for key in old if key not in _RESPELT}, **_special_tokens(new, old, tokenizer)}
            _say_architecture(written, config)
    else:
        model_rules.check_sizes(args, folder=str(folder))
        _, config, written = family_of(from_flags(args, tokenizer.vocab_size, gpus=gpus))
        written = _special_tokens(written, {}, tokenizer)
        described = understood(written)
        _say_architecture(written, config)
    if load is None and not scratch and not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
        raise CheckpointError(
            f"{folder} holds no weights", do="give a model's folder, or --no_initialization false to train from scratch"
        )
    _check(args, config)
    if "init_method_std" in args.given and not scratch:
        get_logger().warning("--init_method_std has no effect: no weights are drawn")
    return RunModel(described, config, written, scratch)


def _say_architecture(written: dict[str, Any], config: ModelConfig) -> None:
    (name,) = written["architectures"]
    if name != NATIVE.architectures[0]:
        get_logger().info("the model is a %s: with --to_hf, transformers reads it as one", name)
        return
    traits = [
        config.normalization,
        "SwiGLU" if config.swiglu else "GELU",
        f"positions {config.position_embedding_type}",
    ]
    traits += ["biases"] if config.linear_bias else []
    traits += [f"{config.rotary_percent:g} of each head rotated"] if config.rotary_percent < 1 else []
    traits += ["q/k norms"] if config.qk_layernorm else []
    traits += ["experts"] if config.moe is not None else []
    get_logger().warning(
        "transformers has no architecture with just these: %s. Megatron checkpoints are as ever; a folder made with --to_hf "
        "is read by this product (swift infer, megatron sft and pt, swift export) and not by transformers",
        ", ".join(traits),
    )


def _special_tokens(new: dict[str, Any], old: dict[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
    """`new` with the ids of the folder's config.json, or the tokenizer's."""
    mine = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return {**new, **{key: old.get(key, value) for key, value in mine.items()}}


def override(config: ModelConfig, args: TrainArguments, *, pretrained: bool) -> ModelConfig:
    """The user's model parameters over config.json's. pretrained: the weights are that folder's."""
    changes = _changes(args)
    heads, hidden = (changes.get(name, getattr(config, name)) for name in ("num_attention_heads", "hidden_size"))
    usual = config.kv_channels == config.hidden_size // config.num_attention_heads
    if (heads, hidden) != (config.num_attention_heads, config.hidden_size) and usual:
        changes.setdefault("kv_channels", hidden // heads)
    if args.group_query_attention is False:
        changes["num_query_groups"] = heads
    if args.rope_scaling is not None:
        base, scaling = read_rope({"rope_scaling": args.rope_scaling, "rope_theta": config.rotary_base})
        changes |= {"rope_scaling": scaling}
        changes.setdefault("rotary_base", base)
    for name, value in changes.items():
        if getattr(config, name) != value:
            get_logger().warning(
                "model parameter %s: %r instead of config.json's %r", name, value, getattr(config, name)
            )
    model = config.replace(**changes)
    return model.replace(moe=_override_experts(config, model, args, pretrained=pretrained))


def _changes(args: TrainArguments) -> dict[str, Any]:
    """ModelConfig's fields that the user gives."""
    changes = {ours: value for name, ours in MODEL_FIELDS.items() if (value := getattr(args, name)) is not None}
    if "rotary_base" in changes:
        changes["rotary_base"] = float(changes["rotary_base"])
    if args.untie_embeddings_and_output_weights is not None:
        changes["tied_embeddings"] = not args.untie_embeddings_and_output_weights
    if args.disable_bias_linear is not None:
        changes["linear_bias"] = not args.disable_bias_linear
        if changes["linear_bias"]:
            changes["qkv_bias"] = True
    return changes


def from_flags(args: TrainArguments, num_tokens: int, *, gpus: int) -> ModelConfig:
    """The model that the parameters describe alone, with Megatron-SWIFT's defaults. num_tokens: the tokenizer's."""
    hidden, heads = args.hidden_size, args.num_attention_heads
    assert hidden is not None and heads is not None  # model_rules.check_sizes saw to it
    changes = _changes(args)
    gated = changes.get("swiglu", True)
    defaults = {
        "ffn_hidden_size": max(8 * hidden // 3 // 64, 1) * 64 if gated else 4 * hidden,
        "num_query_groups": heads,
        "kv_channels": hidden // heads,
        "vocab_size": -(-num_tokens // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE,
        "max_position_embeddings": args.max_length,
        "norm_epsilon": 1e-5,
        "rotary_base": 10000.0,
        "tied_embeddings": False,
        "qkv_bias": True,
        "qk_layernorm": False,
        "dtype": args.torch_dtype or ("bfloat16" if gpus else "float32"),
    }
    scaling = read_rope({"rope_scaling": args.rope_scaling})[1] if args.rope_scaling else None
    model = ModelConfig(**{**defaults, "rope_scaling": scaling, **changes})
    if args.num_experts is None:
        return _dense_only(model, args)
    moe = _new_experts(model, args)
    # Where no layer is dense this width says nothing; as in Megatron-SWIFT it is then an expert's.
    inner = moe.ffn_hidden_size if all(moe.sparse_layers) else model.ffn_hidden_size
    return model.replace(moe=moe, ffn_hidden_size=inner)


def _dense_only(model: ModelConfig, args: TrainArguments) -> ModelConfig:
    for name in ("moe_ffn_hidden_size", "moe_shared_expert_intermediate_size", "moe_router_topk", "moe_layer_freq"):
        if getattr(args, name) is not None:
            raise UsageError(f"--{name} needs --num_experts", do=f"give --num_experts, or leave --{name} out")
    return model


def _new_experts(model: ModelConfig, args: TrainArguments) -> MoEConfig:
    """The experts that the parameters describe, with Megatron-SWIFT's defaults."""
    assert args.num_experts is not None
    return MoEConfig(
        num_experts=args.num_experts,
        topk=args.moe_router_topk or 2,
        ffn_hidden_size=args.moe_ffn_hidden_size or model.ffn_hidden_size,
        shared_size=args.moe_shared_expert_intermediate_size or 0,
        pre_softmax=bool(args.moe_router_pre_softmax),
        sparse_layers=_sparse_layers(args.moe_layer_freq or "1", model.num_layers),
    )


def _override_experts(
    config: ModelConfig, model: ModelConfig, args: TrainArguments, *, pretrained: bool
) -> MoEConfig | None:
    """config: as the folder has it; model: with the user's sizes."""
    moe = config.moe
    if moe is None:
        if args.num_experts is None:
            return None
        if pretrained:
            raise UsageError(
                f"--num_experts {args.num_experts}: the model has no experts",
                why="its config.json describes a dense model",
                do="leave --num_experts out",
            )
        return _new_experts(model, args)
    changes = {ours: value for name, ours in MOE_FIELDS.items() if (value := getattr(args, name)) is not None}
    if args.moe_layer_freq is not None:
        changes["sparse_layers"] = _sparse_layers(args.moe_layer_freq, model.num_layers)
    elif model.num_layers != config.num_layers:
        if not all(moe.sparse_layers):
            raise UsageError(
                f"--num_layers {model.num_layers} does not say which of them have experts", do="give --moe_layer_freq"
            )
        changes["sparse_layers"] = (True,) * model.num_layers
    for name, value in changes.items():
        if getattr(moe, name) != value:
            get_logger().warning("experts' %s: %r instead of config.json's %r", name, value, getattr(moe, name))
    return dataclasses.replace(moe, **changes)


def _sparse_layers(text: str, num_layers: int) -> tuple[bool, ...]:
    freq = layer_freq(text)
    if isinstance(freq, int):
        return tuple(i % freq == 0 for i in range(num_layers))
    if len(freq) != num_layers or not any(freq):
        raise UsageError(
            f"--moe_layer_freq {text}: {len(freq)} entries for {num_layers} layers"
            if any(freq)
            else f"--moe_layer_freq {text}: no layer has experts",
            do="give one 0 or 1 for each layer, at least one 1",
        )
    return tuple(map(bool, freq))


def _check(args: TrainArguments, config: ModelConfig) -> None:
    described = model_rules.Described(
        num_attention_heads=config.num_attention_heads,
        num_query_groups=config.num_query_groups,
        hidden_size=config.hidden_size,
        kv_channels=config.kv_channels,
        rotary_dim=config.rotary_dim if config.position_embedding_type == "rope" else None,
        linear_bias=config.linear_bias,
        experts=config.moe is not None,
    )
    model_rules.check_model(args, described)
