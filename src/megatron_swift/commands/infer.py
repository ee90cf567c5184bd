"""`swift infer`: talk to a model, or let it answer a data set."""

from __future__ import annotations

import datetime
import io
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_swift.args.commands import InferArguments
from megatron_swift.args.inherit import inherit
from megatron_swift.args.rules import TRACKER, check_infer
from megatron_swift.commands.chat_template import asked_template, chosen_template, user_families
from megatron_swift.commands.setup import system_text, world_size
from megatron_swift.data.registry import Identity
from megatron_swift.data.sources import make_lookup
from megatron_swift.data.tokenizer import Tokenizer
from megatron_swift.infer.results import ResultFile, default_path
from megatron_swift.models.config import read_json
from megatron_swift.models.families import Described, describe
from megatron_swift.utils.errors import CheckpointError, DataError, OutOfMemoryError, UsageError
from megatron_swift.utils.hub import local_model
from megatron_swift.utils.log import get_logger

if TYPE_CHECKING:  # torch is imported late, so that --help and a wrong flag are answered at once
    import torch

    from megatron_swift.infer.engine import Engine
    from megatron_swift.infer.questions import Question

# Settings of DataParams and TemplateParams that say nothing here, for a warning when they are given.
NO_EFFECT = (
    *("split_dataset_ratio", "dataset_num_proc", "dataset_shuffle", "load_from_cache_file", "loss_scale"),
    *("interleave_prob", "stopping_strategy", "streaming", "shuffle_buffer_size"),
)


def run(args: InferArguments) -> None:
    """Do what the arguments say: answers on stdout and in the result file, everything else in the log.

    Raises the SwiftError of whatever is wrong; KeyboardInterrupt passes while a data set is answered.
    """
    args = _complete(args, os.environ)
    assert args.model is not None  # check_infer saw to it
    folder = local_model(args.model, use_hf=args.use_hf, revision=args.model_revision, token=args.hub_token)
    _refuse_megatron(folder, args.model)
    tokenizer = Tokenizer.load(folder)
    described = describe(
        folder,
        model_type=args.model_type,
        template=asked_template(args),
        chat_template=tokenizer.chat_template,
        extra=user_families(args),
    )
    questions = _questions(args)
    path = Path(args.result_path).expanduser() if args.result_path else None
    results = ResultFile(path or default_path(args.model, folder, now=datetime.datetime.now()))
    import torch

    try:
        engine = _load(args, folder, tokenizer, described)
        with results:
            _talk(args, engine, results) if questions is None else _answer(args, engine, questions, results)
    except torch.OutOfMemoryError as error:
        raise OutOfMemoryError(
            "the device ran out of memory",
            why=str(error).split("\n")[0],
            do="lower --max_batch_size or --max_new_tokens",
        ) from error


def _complete(args: InferArguments, env: Mapping[str, str]) -> InferArguments:
    inherited = inherit(args)
    inherited.announce()
    args = inherited.args
    processes = world_size(env)
    check_infer(args, world_size=processes)
    if processes > 1:
        raise UsageError(
            f"swift infer on {processes} processes is not supported yet", do="unset NPROC_PER_NODE and NNODES"
        )
    if args.metric == "rouge":
        raise UsageError("--metric rouge is not supported yet", do="use --metric acc")
    for name in NO_EFFECT:
        if name in args.given:
            get_logger().warning("--%s has no effect in swift infer", name)
    return args


def _refuse_megatron(folder: Path, model: str) -> None:
    if (folder / TRACKER).is_file() or (not (folder / "config.json").is_file() and any(folder.glob("iter_*"))):
        raise UsageError(
            f"--model {model} is a Megatron checkpoint; swift infer reads Hugging Face folders",
            do=f"convert it: swift export --mcore_model {model} --to_hf true --output_dir {model.rstrip('/')}-hf",
        )
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} holds no config.json", do="give the folder of a Hugging Face model")


def _questions(args: InferArguments) -> list[Question] | None:
    """The rows to answer, None for a conversation. They are read before the model is: their errors come at once."""
    datasets = (*args.val_dataset,) or (*args.dataset,)
    if not datasets:
        return None
    if args.dataset and args.val_dataset:
        get_logger().warning("--dataset is not used: --val_dataset is given")
    from megatron_swift.infer.questions import QuestionOptions, read_questions

    questions = read_questions(
        QuestionOptions(
            datasets=datasets,
            lookup=make_lookup(
                use_hf=args.use_hf,
                hub_token=args.hub_token,
                download_mode=args.download_mode,
                custom_dataset_info=args.custom_dataset_info,
                custom_register_path=[*args.custom_register_path, *args.external_plugins],
            ),
            columns=args.columns or {},
            identity=Identity(tuple(args.model_name), tuple(args.model_author)),
            strict=args.strict,
            shuffle=args.val_dataset_shuffle,
            data_seed=args.data_seed if args.data_seed is not None else args.seed,
            limit=args.val_dataset_sample,
        )
    )
    if args.metric == "acc" and all(question.labels is None for question in questions):
        raise DataError("--metric acc needs rows with a reply to compare with, and no row has one")
    return questions


def _load(args: InferArguments, folder: Path, tokenizer: Tokenizer, described: Described) -> Engine:
    import torch

    from megatron_swift.checkpoint.huggingface import HuggingFaceWeights
    from megatron_swift.checkpoint.load import load_decoder
    from megatron_swift.checkpoint.weights import TORCH_DTYPES
    from megatron_swift.infer.engine import Engine, EngineOptions
    from megatron_swift.infer.sampling import Sampling
    from megatron_swift.kernels.attention import choose_attention

    config = described.config
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype, why = _choose_dtype(args, config.dtype, device)
    generation = folder / "generation_config.json"
    sampling = Sampling.settle(
        read_json(generation) if generation.is_file() else {},
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        repetition_penalty=args.repetition_penalty,
    )
    for name in ("top_k", "top_p"):
        if sampling.greedy and name in args.given:
            get_logger().warning("--%s has no effect: the likeliest token is always taken; give --temperature", name)
    model = load_decoder(HuggingFaceWeights(folder, config), config, dtype=TORCH_DTYPES[dtype], device=device)
    attention = choose_attention("auto", device=device, dtype=TORCH_DTYPES[dtype], head_dim=config.kv_channels)
    model.set_attention(attention.core)
    template = chosen_template(args, described.template, tokenizer)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    get_logger().info(
        "model %s: %s, %.4g M parameters, %d positions; template %s (%s)",
        *(
            folder,
            described.model_type,
            parameters / 1e6,
            config.max_position_embeddings,
            template.name,
            described.reason,
        ),
    )
    get_logger().info("computed in %s on %s%s; %s", dtype, _device_name(device), why, sampling.describe())
    options = EngineOptions(
        sampling=sampling,
        seed=args.seed,
        max_new_tokens=args.max_new_tokens,
        stop_words=tuple(args.stop_words),
        system=system_text(args.system),
        response_prefix=None if args.response_prefix is None else args.response_prefix.replace("\\n", "\n"),
        max_length=args.max_length,
        truncation=args.truncation_strategy,
    )
    return Engine(model, tokenizer, template, options)


def _choose_dtype(args: InferArguments, stored: str, device: torch.device) -> tuple[str, str]:
    """The type to compute in, and a remark where it is not the stored one. A CPU is slow and coarse in 16 bits."""
    if args.torch_dtype is not None and (device.type != "cpu" or "torch_dtype" in args.given):
        return args.torch_dtype, "" if args.torch_dtype == stored else f" (the weights are {stored})"
    if device.type == "cpu" and stored != "float32":
        return "float32", f" (the weights are {stored}; --torch_dtype {stored} computes in it)"
    return stored, ""


def _device_name(device: torch.device) -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"


def _talk(args: InferArguments, engine: Engine, results: ResultFile) -> None:
    from megatron_swift.infer.chat import Chat

    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(
            errors="surrogateescape"
        )  # bytes that are no text reach the chat, which refuses that one input
    get_logger().info("answers are also written to %s", results.path)
    Chat(engine, source=sys.stdin, out=sys.stdout, results=results, stream=args.stream).run()


def _answer(args: InferArguments, engine: Engine, questions: list[Question], results: ResultFile) -> None:
    from megatron_swift.infer.batch import answer_all

    get_logger().info("%d rows to answer; answers are written to %s", len(questions), results.path)
    totals = answer_all(
        engine,
        questions,
        batch_size=args.max_batch_size,
        stream=args.stream,
        out=sys.stdout,
        results=results,
    )
    print(totals.line(accuracy=args.metric == "acc"), flush=True)
