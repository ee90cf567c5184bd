"""The commands as dataclasses, and `parse`: from a command line to typed, checked, frozen arguments."""

# ruff: noqa: RUF009  (`param` makes a field, as dataclasses.field does)
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from megatron_swift.args.config_file import ENV_KEY, read_config
from megatron_swift.args.data_params import (
    DataParams,
    DataShowParams,
    IndexedParams,
    LossScale,
    PreprocessParams,
    TemplateParams,
    Truncation,
)
from megatron_swift.args.flags import read_flags, spellings, suggestion
from megatron_swift.args.infer_params import ExportParams, InferParams
from megatron_swift.args.model_params import ModelShapeParams, ModelSourceParams, MoeParams
from megatron_swift.args.run_params import CheckpointParams, DistributedParams, LoggingParams
from megatron_swift.args.spec import Arguments, params_of, show, with_default
from megatron_swift.args.training_params import (
    EvaluationParams,
    ExtraTrainingParams,
    LearningRateParams,
    MixedPrecisionParams,
    RegularisationParams,
    TrainingParams,
)
from megatron_swift.utils.errors import UsageError
from megatron_swift.utils.log import get_logger

A = TypeVar("A", bound=Arguments)


@dataclass(frozen=True, kw_only=True)
class TrainArguments(
    ModelSourceParams,
    DataParams,
    TemplateParams,
    TrainingParams,
    LearningRateParams,
    RegularisationParams,
    CheckpointParams,
    DistributedParams,
    LoggingParams,
    EvaluationParams,
    MixedPrecisionParams,
    ExtraTrainingParams,
    ModelShapeParams,
    MoeParams,
):
    """What `megatron sft` and `megatron pt` share."""


@dataclass(frozen=True, kw_only=True)
class SftArguments(TrainArguments):
    prog: ClassVar[str] = "megatron sft"
    summary: ClassVar[str] = "Fine-tune all weights of a model on conversations."
    example: ClassVar[str] = (
        "NPROC_PER_NODE=2 megatron sft --load Qwen2.5-7B-Instruct-mcore --dataset train.jsonl --finetune true "
        "--train_iters 100 --lr 1e-5 --max_length 2048 --save megatron_output/demo"
    )


@dataclass(frozen=True, kw_only=True)
class PtArguments(TrainArguments, IndexedParams):
    prog: ClassVar[str] = "megatron pt"
    summary: ClassVar[str] = "Pre-train a model on plain text, from scratch or further."
    example: ClassVar[str] = (
        "NPROC_PER_NODE=2 megatron pt --load Qwen2.5-7B-mcore --dataset texts.jsonl --finetune true "
        "--train_iters 1000 --lr 1e-5 --max_length 4096 --save megatron_output/demo"
    )

    use_chat_template: bool = with_default(
        TemplateParams,
        "use_chat_template",
        False,
        "Wrap rows in the chat template. false = plain text with an end token.",
    )
    loss_scale: LossScale = with_default(
        TemplateParams, "loss_scale", "all", "Which tokens are trained: all = every token, default = answers only."
    )
    truncation_strategy: Truncation | None = with_default(
        TemplateParams,
        "truncation_strategy",
        "split",
        "What happens to documents longer than max_length: split into several, dropped (delete), cut on the left or right, or an error.",
    )
    packing: bool = with_default(
        ExtraTrainingParams,
        "packing",
        True,
        "Join short documents into packs of up to max_length tokens; attention stays within a document.",
    )


@dataclass(frozen=True, kw_only=True)
class PreprocessArguments(TrainArguments, PreprocessParams):
    prog: ClassVar[str] = "megatron preprocess"
    summary: ClassVar[str] = (
        "Prepare the rows of a training run, which then finds them, or write them as Megatron's indexed data."
    )
    example: ClassVar[str] = (
        "megatron preprocess --model Qwen/Qwen2.5-7B-Instruct --dataset train.jsonl --max_length 2048 --packing true "
        "--dataset_num_proc 8"
    )


@dataclass(frozen=True, kw_only=True)
class ExportArguments(ModelSourceParams, TemplateParams, ExportParams):
    prog: ClassVar[str] = "swift export"
    summary: ClassVar[str] = "Convert weights between Hugging Face folders and Megatron checkpoints."
    example: ClassVar[str] = (
        "swift export --model Qwen/Qwen2.5-7B-Instruct --to_mcore true --output_dir Qwen2.5-7B-Instruct-mcore"
    )


@dataclass(frozen=True, kw_only=True)
class InferArguments(ModelSourceParams, DataParams, TemplateParams, InferParams):
    prog: ClassVar[str] = "swift infer"
    summary: ClassVar[str] = "Talk to a model, or let it answer a data set (with dataset or val_dataset)."
    example: ClassVar[str] = (
        "swift infer --model megatron_output/demo/v0-20250430-120000-hf --stream true --temperature 0"
    )


@dataclass(frozen=True, kw_only=True)
class DataShowArguments(ModelSourceParams, DataParams, TemplateParams, DataShowParams):
    prog: ClassVar[str] = "megatron data show"
    summary: ClassVar[str] = (
        "Show what training would see of a data set: samples, trained tokens, lengths, rows left out."
    )
    example: ClassVar[str] = "megatron data show --dataset train.jsonl --model Qwen/Qwen2.5-7B-Instruct --num_samples 5"


COMMANDS: tuple[type[Arguments], ...] = (
    SftArguments,
    PtArguments,
    PreprocessArguments,
    ExportArguments,
    InferArguments,
    DataShowArguments,
)


def parse(command: type[A], argv: Sequence[str], *, warn: bool = True) -> A:
    """The arguments of `command`: flags over the config file over defaults. UsageError for everything that is wrong.

    `given` holds the names the user typed (by flag or file), `config_env` the file's ENV mapping, not applied here.
    warn : log what is accepted without effect; pass False in all processes of a run but one.
    """
    params = params_of(command)
    flags = read_flags(params, argv)
    values: dict[str, Any] = {}
    where: dict[str, str] = {}
    env: dict[str, str] = {}
    unknown = {flag: suggestion(flag, spellings(params)) for flag in flags.unknown}
    if flags.config is not None:
        config = read_config(params, flags.config)
        values, where, env = dict(config.values), dict(config.where), config.env
        unknown |= {f"{flags.config}: {key}": hint for key, hint in config.unknown.items()}
    values |= flags.values
    where |= flags.where
    _refuse_unknown(command, unknown, ignore=bool(values.get("ignore_args_error")), warn=warn)
    for name, value in values.items():
        params[name].verify(value, where[name])
        if warn and params[name].declared.no_effect and value != params[name].default:
            get_logger().warning("%s %s has no effect: %s", where[name], show(value), params[name].declared.no_effect)
    for name in flags.repeated if warn else ():
        last = "" if params[name].declared.secret else f", {show(values[name])},"
        get_logger().warning("%s is given more than once; the last value%s is used", where[name], last)
    return command(**values, given=frozenset(values), config_env=env)


def _refuse_unknown(command: type[Arguments], unknown: dict[str, str], *, ignore: bool, warn: bool) -> None:
    if not unknown:
        return
    names = ", ".join(unknown)
    what = f"unknown parameter{'s' if len(unknown) > 1 else ''} {names}"
    if not ignore:
        hints = [hint if len(unknown) == 1 else f"{name}: {hint}" for name, hint in unknown.items() if hint]
        raise UsageError(what, do="; ".join(hints) or "see --help for the names")
    if warn:
        get_logger().warning("%s: ignored, because ignore_args_error is true", what)


__all__ = [
    "COMMANDS",
    "ENV_KEY",
    "DataShowArguments",
    "ExportArguments",
    "InferArguments",
    "PreprocessArguments",
    "PtArguments",
    "SftArguments",
    "TrainArguments",
    "parse",
]
