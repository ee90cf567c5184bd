"""Parameters of a training run around the loop: checkpoints, processes, logs."""

# ruff: noqa: RUF009  (`param` makes a field, as dataclasses.field does)
from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import ClassVar, Literal

from megatron_swift.args.spec import Arguments, param

LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")


def logging_level_number(text: str | None) -> int | None:
    """Python's number of a logging_level (`debug`, `20`); None for None and for a text that is no level."""
    if text is None:
        return None
    if text.isdecimal():
        return int(text)
    return logging.getLevelNamesMapping()[text.upper()] if text.upper() in LOG_LEVELS else None


def _is_level(text: str) -> str:
    return "" if logging_level_number(text) is not None else "a number or one of " + ", ".join(LOG_LEVELS)


@dataclass(frozen=True, kw_only=True)
class CheckpointParams(Arguments):
    group: ClassVar[str] = "Checkpoint"

    save: str | None = param(
        None,
        "Directory of checkpoints and logs; the same on all machines. Default: `megatron_output/<model name>`.",
        aliases=("output_dir",),
    )
    save_interval: int = param(
        500,
        "Save a checkpoint every so many steps; one is always saved at the end.",
        at_least=1,
        aliases=("save_steps",),
    )
    save_total_limit: int | None = param(
        None, "Keep only this many latest checkpoints of the run. Default: keep all.", at_least=1
    )
    async_save: bool = param(
        False,
        "Write checkpoints beside the training, which waits only until the state is copied to host memory (a second time "
        "its size per rank). One is written at a time.",
    )
    save_safetensors: bool = param(False, "Also leave a Hugging Face folder `hf` in each checkpoint.")
    no_save_optim: bool = param(
        False, "Leave the optimizer and schedule out of checkpoints: smaller, but not resumable."
    )
    no_save_rng: bool = param(False, "Leave random-number states out of checkpoints.")
    load: str | None = param(
        None,
        "Directory of the checkpoint to start from (it holds latest_checkpointed_iteration.txt). auto = the newest one below save, "
        "or model where there is none yet: a job that is started again with the same command goes on.",
        aliases=("mcore_model",),
    )
    reset_data: bool = param(
        False,
        "Where the training data are not those of the checkpoint in load, go on with their first row instead of refusing.",
    )
    no_load_optim: bool = param(False, "Do not load the optimizer and schedule.")
    no_load_rng: bool = param(False, "Do not load random-number states.")
    finetune: bool = param(
        False, "Load the weights only and start at step 0, with a new optimizer, schedule and random state."
    )
    ckpt_format: Literal["torch", "torch_dist", "zarr"] = param(
        "torch_dist",
        "Format of checkpoints to write: torch_dist = sharded files, which all ranks write; torch = the whole model in one file, which the "
        "first rank writes. Both load under any parallel layout; zarr is read, but not written. What is loaded may have any of the three.",
    )
    no_initialization: bool = param(
        True,
        "Do not draw initial weights: they come from load or model. false = train from scratch where load names no checkpoint; model then "
        "needs a tokenizer only, and a config.json or parameters that describe it.",
    )
    auto_detect_ckpt_format: bool = param(
        True, "Find out the format of the checkpoint in load.", no_effect="the format is always found out"
    )
    exit_on_missing_checkpoint: bool = param(
        True, "Stop where load holds no checkpoint. false = start from the weights of model instead."
    )


@dataclass(frozen=True, kw_only=True)
class DistributedParams(Arguments):
    group: ClassVar[str] = "Distributed"

    distributed_backend: Literal["nccl", "gloo"] = param(
        "nccl",
        "Communication library between processes; gloo is used anyway where there is no GPU.",
        aliases=("ddp_backend",),
    )
    use_distributed_optimizer: bool = param(
        True,
        "Shard the optimizer state (float32 weights and moments) over the data-parallel and context-parallel ranks. "
        "false = a whole one on every rank, gradients all-reduced.",
    )
    data_parallel_sharding_strategy: Literal["no_shard", "optim", "optim_grads", "optim_grads_params"] | None = param(
        None,
        "What those ranks share among them: nothing, the optimizer, also gradients, also weights (ZeRO 0 to 3). "
        "Default: optim, or no_shard with use_distributed_optimizer false.",
    )
    tensor_model_parallel_size: int = param(
        1, "Ranks that share each layer's matrices. Must divide the attention heads.", at_least=1
    )
    pipeline_model_parallel_size: int = param(
        1, "Pipeline stages that the layers are split into, balanced with the cost of the output layer.", at_least=1
    )
    num_layers_per_virtual_pipeline_stage: int | None = param(
        None,
        "Layers of each virtual pipeline stage; several of them per rank shorten the pipeline's idle time.",
        at_least=1,
    )
    virtual_pipeline_model_parallel_size: int | None = param(
        None, "Virtual pipeline stages per rank. Give this or num_layers_per_virtual_pipeline_stage.", at_least=1
    )
    decoder_first_pipeline_num_layers: int | None = param(
        None, "Layers of the first pipeline stage. Default: balanced.", at_least=1
    )
    decoder_last_pipeline_num_layers: int | None = param(
        None, "Layers of the last pipeline stage. Default: balanced.", at_least=1
    )
    sequence_parallel: bool = param(
        False,
        "Split norms and residuals along the sequence over the tensor-parallel ranks; off where there is one.",
    )
    context_parallel_size: int = param(1, "Ranks that share the tokens of each sequence.", at_least=1)
    cp_comm_type: Literal["all_gather", "p2p", "a2a"] = param(
        "all_gather",
        "How context-parallel ranks see each other's keys: gathered, passed round a ring, or tokens exchanged for heads.",
    )
    tp_comm_overlap: bool = param(
        False,
        "Run the tensor-parallel communication of the layers beside their matrix products. Needs sequence_parallel and GPUs of one "
        "machine that reach each other's memory (NVLink).",
    )
    overlap_grad_reduce: bool = param(
        False,
        "Reduce gradients while the backward pass still runs.",
        no_effect="FSDP2 always does so; the whole gradients of no_shard are always reduced after the backward pass",
    )
    overlap_param_gather: bool = param(
        False,
        "Gather weights while the forward pass runs. Needs use_distributed_optimizer and overlap_grad_reduce.",
        no_effect="FSDP2 always does so, layer by layer; with no_shard there is nothing to gather",
    )
    distributed_timeout_minutes: int = param(
        60, "Give up on a communication that takes longer.", unit="minutes", at_least=1
    )


@dataclass(frozen=True, kw_only=True)
class LoggingParams(Arguments):
    group: ClassVar[str] = "Logging"

    log_params_norm: bool = param(False, "Log the L2 norm of all weights.")
    log_throughput: bool = param(
        True, "Log TFLOP/s per GPU, counted from seq_length: only right with packing, where rows are that long."
    )
    tensorboard_log_interval: int = param(1, "Write TensorBoard values every so many steps.", at_least=1)
    tensorboard_queue_size: int = param(50, "TensorBoard values held back before they are written to disk.", at_least=1)
    log_timers_to_tensorboard: bool = param(True, "Write step times to TensorBoard.")
    no_log_learning_rate_to_tensorboard: bool = param(False, "Do not write the learning rate to TensorBoard.")
    log_validation_ppl_to_tensorboard: bool = param(True, "Write the validation perplexity to TensorBoard.")
    log_memory_to_tensorboard: bool = param(True, "Write GPU memory figures to TensorBoard.")
    logging_level: str | None = param(
        None, "Level of the log: debug, info, warning, error or Python's number. Default: info.", check=_is_level
    )
    report_to: list[Literal["tensorboard", "wandb", "swanlab", "none"]] = param(
        ["tensorboard"], "Where curves are sent besides logging.jsonl; none = nowhere."
    )
    wandb_project: str | None = param(None, "Weights & Biases project. Default: megatron-swift.")
    wandb_exp_name: str | None = param(None, "Name of the run in Weights & Biases. Default: the value of save.")
    swanlab_project: str | None = param(None, "SwanLab project. Default: megatron-swift.")
    swanlab_exp_name: str | None = param(None, "Name of the run in SwanLab. Default: the value of save.")
