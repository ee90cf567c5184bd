"""Parameters of the training loop: batches, learning rate, regularisation, evaluation, precision."""

# ruff: noqa: RUF009  (`param` makes a field, as dataclasses.field does)
from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from megatron_swift.args.spec import Arguments, param

_ON_GPUS = "Where the Triton kernels run, on GPUs"


@dataclass(frozen=True, kw_only=True)
class TrainingParams(Arguments):
    group: ClassVar[str] = "Training"

    micro_batch_size: int = param(
        1, "Samples (or packs) that one data-parallel rank puts into one forward pass.", at_least=1
    )
    global_batch_size: int = param(
        16,
        "Samples (or packs) per optimizer step: micro_batch_size x data-parallel size x accumulation steps.",
        at_least=1,
    )
    recompute_granularity: Literal["none", "selective", "full"] = param(
        "selective",
        "What the backward pass computes again instead of storing: nothing, parts of every layer (recompute_modules), "
        "or whole layers.",
    )
    recompute_modules: list[Literal["core_attn", "layernorm", "mlp", "moe_act"]] = param(
        ["core_attn"],
        "With recompute_granularity selective, what is computed again: core_attn = the attention weights (fused kernels "
        "never store them), layernorm = what norms give to matrix products, with its gathering over sequence-parallel "
        "ranks, mlp = dense MLPs whole, moe_act = the activations of experts. Beyond ms-swift v3.4.0.",
    )
    recompute_method: Literal["uniform", "block"] | None = param(
        None,
        "With recompute_granularity full: uniform = chunks of recompute_num_layers layers, block = the first "
        "recompute_num_layers layers of each pipeline stage.",
    )
    recompute_num_layers: int | None = param(
        None,
        "With recompute_granularity full: layers per chunk (uniform) or per pipeline stage (block).",
        at_least=1,
    )
    deterministic_mode: bool = param(
        False, "Use only operations whose result is the same bit for bit in every run; slower. Excludes fused variants."
    )
    train_iters: int | None = param(
        None, "Optimizer steps to train for; the data is repeated as needed. Give this or max_epochs.", at_least=1
    )
    max_epochs: int | None = param(
        None,
        "Passes over the training data, turned into train_iters once the data is counted. Give this or train_iters.",
        at_least=1,
        aliases=("num_train_epochs",),
    )
    log_interval: int = param(
        5, "Print and log a training line every so many steps.", at_least=1, aliases=("logging_steps",)
    )
    tensorboard_dir: str | None = param(
        None, "Directory of the TensorBoard files. Default: `runs` in the run's directory."
    )
    no_masked_softmax_fusion: bool = param(
        False,
        "Do not fuse scale, mask and softmax of the attention.",
        no_effect="attention_backend unfused does that",
    )
    no_bias_dropout_fusion: bool = param(
        False, "Do not fuse bias and dropout.", no_effect="dropout is an operation of its own"
    )
    no_bias_swiglu_fusion: bool = param(
        False, f"{_ON_GPUS}: compute SwiGLU, that of experts too, with torch's own operators instead."
    )
    no_rope_fusion: bool = param(False, f"{_ON_GPUS}: compute the rotary embedding with torch's own operators instead.")
    torch_compile: Literal["auto", "true", "false"] = param(
        "auto",
        "Compile what lies around the core attention of each layer with torch.compile, once for any lengths: true = in place of the Triton "
        "kernels, or an error, auto = on GPUs for models whose norm or activation has no Triton kernel, false = never. Needs a C compiler "
        "(CPUs: g++) and Python's headers; what is compiled is kept below TORCHINDUCTOR_CACHE_DIR for the next run. "
        "Beyond ms-swift v3.4.0.",
    )
    no_gradient_accumulation_fusion: bool = param(
        False,
        "Do not fuse gradient accumulation into the weight-gradient product.",
        no_effect="torch adds gradients up itself",
    )
    cross_entropy_loss_fusion: bool = param(
        False,
        "Compute the loss in chunks of tokens, so that their logits are never held all at once; saves memory. "
        "Always done where the Triton kernels run, on GPUs.",
    )
    calculate_per_token_loss: bool = param(
        True,
        "Every label token of the global batch weighs the same, however the batch is cut into micro-batches.",
        fixed="the loss is defined per token over the global batch",
    )
    use_flash_attn: bool = param(False, "Require the flash-attention kernel; the same as attention_backend flash.")
    attention_backend: Literal["auto", "flash", "cudnn", "fused", "unfused", "local"] = param(
        "auto",
        "Attention kernel: auto = the fastest that fits, flash and fused = that PyTorch kernel or an error, cudnn = cuDNN "
        "for ragged rows, too (Hopper, nvidia-cudnn-frontend), or an error, "
        "unfused and local = plain matrix products (slow, exact reference).",
    )
    optimizer: Literal["adam", "sgd"] = param(
        "adam", "adam = AdamW (decoupled weight decay), sgd = momentum SGD with weight decay added to the gradient."
    )
    dataloader_type: Literal["single", "cyclic", "external"] = param(
        "cyclic",
        "single = one pass in order, cyclic = shuffled anew in each pass, external = it feeds itself, as streaming does.",
    )
    manual_gc: bool = param(
        False, "Switch Python's automatic garbage collection off and collect at fixed steps on all ranks."
    )
    manual_gc_interval: int = param(
        0,
        "With manual_gc: collect every so many steps; 0 = only at the start and around evaluations.",
        at_least=0,
        aliases=("manual_gc_steps",),
    )
    seed: int = param(42, "Seed of Python, NumPy and PyTorch on every rank.", at_least=1)
    num_workers: int = param(
        4,
        "Data-loading processes per rank; 0 = load in the training process.",
        at_least=0,
        aliases=("dataloader_num_workers",),
    )
    seq_length: int | None = param(
        None,
        "Sequence length in tokens assumed by throughput figures and length checks. Default: max_length. "
        "Use max_length to limit the data.",
        at_least=1,
    )
    use_cpu_initialization: bool = param(
        False, "Initialise weights on the CPU.", no_effect="they always are, so that no device changes them"
    )
    no_create_attention_mask_in_dataloader: bool = param(
        True,
        "Do not build a mask tensor in the data loader.",
        no_effect="segment lengths describe the mask, a tensor is never built",
    )


def asked_kernel(args: TrainingParams) -> tuple[str, str]:
    """The attention kernel that is asked for, by attention_backend's names, and the flag that asks for it."""
    if args.use_flash_attn:
        return "flash", "--use_flash_attn true"
    return args.attention_backend, f"--attention_backend {args.attention_backend}"


@dataclass(frozen=True, kw_only=True)
class LearningRateParams(Arguments):
    group: ClassVar[str] = "Learning rate"

    lr: float = param(1e-5, "Peak learning rate, reached at the end of the warm-up.", above=0)
    lr_decay_style: Literal["cosine", "linear", "constant"] = param("cosine", "Shape of the decay after the warm-up.")
    lr_decay_iters: int | None = param(
        None, "Step at which min_lr is reached, counted from the start. Default: train_iters.", at_least=1
    )
    lr_warmup_iters: int = param(
        0, "Steps of linear warm-up from 0 (the first step then trains with rate 0).", at_least=0
    )
    min_lr: float = param(0.0, "Learning rate at the end of the decay and ever after; at most lr.", at_least=0)


@dataclass(frozen=True, kw_only=True)
class RegularisationParams(Arguments):
    group: ClassVar[str] = "Regularisation"

    weight_decay: float = param(0.1, "Weight decay of all weights but biases and norms.", at_least=0)
    clip_grad: float = param(1.0, "Scale the gradient down to this global L2 norm; 0 = no clipping.", at_least=0)
    adam_beta1: float = param(0.9, "Decay of Adam's mean of gradients.", at_least=0, below=1)
    adam_beta2: float = param(0.95, "Decay of Adam's mean of squared gradients.", at_least=0, below=1)
    adam_eps: float = param(1e-8, "Added to the root of Adam's second moment.", above=0)
    sgd_momentum: float = param(0.9, "Momentum of the sgd optimizer.", at_least=0, below=1)


@dataclass(frozen=True, kw_only=True)
class EvaluationParams(Arguments):
    group: ClassVar[str] = "Evaluation"

    eval_iters: int = param(
        100,
        "Global batches per evaluation; the validation data is repeated as needed. -1 = each validation row once, "
        "0 = never evaluate.",
        at_least=-1,
    )
    eval_interval: int | None = param(
        None, "Evaluate every so many steps. Default: save_interval.", at_least=1, aliases=("eval_steps",)
    )


@dataclass(frozen=True, kw_only=True)
class MixedPrecisionParams(Arguments):
    group: ClassVar[str] = "Mixed precision"

    fp16: bool | None = param(
        None, "Compute in float16 with a dynamic loss scale. Default: true where torch_dtype is float16."
    )
    bf16: bool | None = param(
        None, "Compute in bfloat16 with float32 master weights. Default: true where torch_dtype is bfloat16."
    )
    apply_query_key_layer_scaling: bool | None = param(
        None,
        "Divide attention scores by the layer number and undo it in the softmax. Default: the value of fp16.",
        no_effect="it cancels mathematically, and attention scores are kept in float32",
    )
    attention_softmax_in_fp32: bool = param(
        True,
        "Compute the attention softmax in float32. Only the unfused attention_backend can do otherwise: the fused kernels "
        "always do.",
    )
    fp8_format: Literal["hybrid", "e4m3"] | None = param(
        None,
        "Compute the linear layers of attention, dense MLPs and shared experts in 8-bit floating point: hybrid = gradients in e5m2 and all "
        "else in e4m3, e4m3 = everything. Needs bfloat16 and, on GPUs, compute capability 8.9. Beyond ms-swift v3.4.0.",
    )
    fp8_recipe: Literal["tensorwise", "rowwise", "blockwise"] = param(
        "tensorwise",
        "With fp8_format, what shares a scale: a whole matrix, each of its rows, or blocks (128 values of a row; 128 x 128 of a weight, "
        "as DeepSeek-V3; e4m3, Hopper). Always the present values' scale. Beyond ms-swift v3.4.0.",
    )


@dataclass(frozen=True, kw_only=True)
class ExtraTrainingParams(Arguments):
    group: ClassVar[str] = "Extra training"

    add_version: bool = param(
        True, "Write into a new directory `v<number>-<time>` below save, so that no run overwrites another."
    )
    packing: bool = param(
        False, "Join short samples into packs of up to max_length tokens; attention stays within a sample."
    )
    lazy_tokenize: bool = param(
        False,
        "Tokenise rows when they are needed, from an index of the files; not with packing, which must know all lengths. false = all "
        "rows before training, so that a bad row shows at once.",
    )
    dataloader_persistent_workers: bool = param(True, "Keep the data-loading processes alive between passes.")
    dataloader_prefetch_factor: int = param(10, "Batches that each data-loading process prepares ahead.", at_least=1)
