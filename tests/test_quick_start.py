"""The original document's quick start, letter by letter, on a tiny model: convert, train on two ranks, convert back, talk."""

from __future__ import annotations

import json
import re
import shlex

import pytest
from safetensors.torch import load_file

from megatron_swift.checkpoint.publish import published
from megatron_swift.testing import make_tiny_model
from scripts import call

EXPORT = """
swift export \
    --model Qwen/Qwen2.5-7B-Instruct \
    --to_mcore true \
    --torch_dtype bfloat16 \
    --output_dir Qwen2.5-7B-Instruct-mcore
"""
TRAIN = """
megatron sft \
    --load Qwen2.5-7B-Instruct-mcore \
    --dataset 'AI-ModelScope/alpaca-gpt4-data-zh#500' \
              'AI-ModelScope/alpaca-gpt4-data-en#500' \
              'swift/self-cognition#500' \
    --tensor_model_parallel_size 2 \
    --micro_batch_size 4 \
    --global_batch_size 16 \
    --recompute_granularity selective \
    --train_iters 100 \
    --eval_iters 5 \
    --finetune true \
    --cross_entropy_loss_fusion true \
    --lr 1e-5 \
    --lr_warmup_iters 10 \
    --min_lr 1e-6 \
    --save megatron_output/Qwen2.5-7B-Instruct \
    --save_interval 100 \
    --max_length 2048 \
    --system 'You are a helpful assistant.' \
    --num_workers 4 \
    --no_save_optim true \
    --no_save_rng true \
    --dataset_num_proc 4 \
    --model_author swift \
    --model_name swift-robot
"""
BACK = """
swift export \
    --mcore_model megatron_output/Qwen2.5-7B-Instruct/vx-xxx \
    --to_hf true \
    --torch_dtype bfloat16 \
    --output_dir megatron_output/Qwen2.5-7B-Instruct/vx-xxx-hf
"""
INFER = """
swift infer \
    --model megatron_output/Qwen2.5-7B-Instruct/vx-xxx-hf \
    --stream true \
    --temperature 0 \
    --max_new_tokens 2048
"""
# What a tiny model needs less of; a flag that is given again wins.
FEWER = ("--train_iters", "12", "--save_interval", "6", "--num_workers", "1", "--log_interval", "3", "--lr", "1e-3")
# Spec section 6.4; what comes after "nan iterations" is ours.
LINE = re.compile(
    r"^ \[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\] iteration +\d+/ +12 \| consumed samples: +\d+ \| elapsed time per iteration \(ms\): \d+\.\d \| "
    r"throughput per GPU \(TFLOP/s/GPU\): \d+\.\d+ \| learning rate: \d\.\d{6}E-\d\d \| global batch size: +16 \| "
    r"lm loss: \d\.\d{6}E\+00 \| loss scale: 1\.0 \| grad norm: \d+\.\d{3} \| number of skipped iterations: +0 \| "
    r"number of nan iterations: +0 \| .*\|$",
    re.MULTILINE,
)


def run(text: str, *more: str, cwd, stdin: str = "", version: str = "", **env: str):
    return call(*shlex.split(text.replace("vx-xxx", version)), *more, cwd=cwd, stdin=stdin, **env)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The folder that the user works in: the hub's names are folders here, as a user without a network would have them."""
    folder = tmp_path_factory.mktemp("quick_start")
    make_tiny_model(folder / "Qwen" / "Qwen2.5-7B-Instruct", dtype="bfloat16", max_position_embeddings=4096)
    for language, word in (("zh", "一"), ("en", "one")):
        data = folder / "AI-ModelScope" / f"alpaca-gpt4-data-{language}"
        data.mkdir(parents=True)
        rows = [{"instruction": f"say {i}", "input": "", "output": f"{i} is {word}"} for i in range(20)]
        (data / "train.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def converted(place):
    said = run(
        EXPORT, cwd=place, CUDA_VISIBLE_DEVICES="0", NPROC_PER_NODE="2"
    )  # export is one process whatever is asked for
    assert said.code == 0, said.err
    assert said.err == "" and said.out.startswith("wrote Qwen2.5-7B-Instruct-mcore in ")
    return place / "Qwen2.5-7B-Instruct-mcore"


@pytest.fixture(scope="module")
def trained(place, converted):
    """(run folder, what the command said)."""
    said = run(TRAIN, *FEWER, cwd=place, NPROC_PER_NODE="2", CUDA_VISIBLE_DEVICES="0,1")
    assert said.code == 0, said.err
    (folder,) = (place / "megatron_output" / "Qwen2.5-7B-Instruct").iterdir()
    return folder, said


def test_console(trained):
    folder, said = trained
    assert len(LINE.findall(said.out)) == 5  # iterations 1, 3, 6, 9, 12; by one rank
    for text in (
        "micro 4 x data parallel 1 x accumulation 4 = global 16",
        "validation loss at iteration 6 | lm loss value: ",
        "validation loss at iteration 12 on validation set | lm loss value: ",
        f"done: {folder}",
        "You are a helpful assistant.",
    ):
        assert said.out.count(text) == 1, text
    assert "error" not in said.err and "Traceback" not in said.err


def test_run_folder(trained):
    """Section 6.1, and the model's companions."""
    folder, _ = trained
    assert re.fullmatch(r"v0-\d{8}-\d{6}", folder.name)
    assert {path.name for path in folder.iterdir()} == {
        *(".writer", "args.json", "data_report.json", "huggingface", "images", "iter_0000006", "iter_0000012"),
        *("latest_checkpointed_iteration.txt", "logging.jsonl", "runs", "val_dataset.jsonl"),
    }
    assert published(folder) == [6, 12] and (folder / "latest_checkpointed_iteration.txt").read_text() == "12"
    names = {path.name for path in (folder / "iter_0000012").iterdir()}
    assert {".metadata", "metadata.json", "manifest.json", "__0_0.distcp"} <= names
    assert not [name for name in names if name.startswith("rng_")]  # --no_save_rng
    args = json.loads((folder / "args.json").read_text())
    assert (args["train_iters"], args["tensor_model_parallel_size"], args["torch_dtype"]) == (12, 2, "bfloat16")
    assert args["system"] == "You are a helpful assistant." and args["template"] == "qwen2_5"


def test_logging_jsonl(trained):
    rows = [json.loads(line) for line in (trained[0] / "logging.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "lm loss" in row]
    assert [row["global_step/max_steps"] for row in steps] == [f"{n}/12" for n in (1, 3, 6, 9, 12)]
    assert [row["consumed_samples"] for row in steps] == [16 * n for n in (1, 3, 6, 9, 12)]
    assert {"grad_norm", "learning_rate"} <= steps[0].keys()
    assert [row["iteration"] for row in rows if "eval_lm loss" in row] == [6, 12]
    assert steps[-1]["lm loss"] < steps[0]["lm loss"]


def test_tensorboard_and_pictures(trained):
    """Section 6.2."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(trained[0] / "runs"))
    events.Reload()
    both = {
        "learning-rate",
        "batch-size",
        "lm loss",
        "loss-scale",
        "grad-norm",
        "lm loss validation",
        "lm loss validation ppl",
    }
    expected = both | {f"{name} vs samples" for name in both} | {"iteration-time", "throughput"}
    assert expected <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("lm loss")] == list(range(1, 13))
    pictures = {path.stem for path in (trained[0] / "images").glob("*.png")}
    assert {"lm_loss", "learning_rate", "grad_norm", "lm_loss_validation"} <= pictures


def test_back_and_inference(place, trained):
    version = trained[0].name
    said = run(BACK, cwd=place, version=version, CUDA_VISIBLE_DEVICES="0")
    assert said.code == 0, said.err
    out = place / "megatron_output" / "Qwen2.5-7B-Instruct" / f"{version}-hf"
    before, after = (load_file(f / "model.safetensors") for f in (place / "Qwen" / "Qwen2.5-7B-Instruct", out))
    assert {k: (v.shape, v.dtype) for k, v in before.items()} == {k: (v.shape, v.dtype) for k, v in after.items()}
    assert any((before[name] != after[name]).any() for name in before)
    said = run(
        INFER,
        "--max_new_tokens",
        "12",
        cwd=place,
        version=version,
        stdin="who are you?\nexit\n",
        CUDA_VISIBLE_DEVICES="0",
    )
    assert said.code == 0, said.err
    assert said.out.startswith("<<< ") and said.out.count("<<<") == 2
    assert "You are a helpful assistant." in said.err  # the system prompt of the training, through args.json


def test_one_process_is_not_enough(place, converted):
    said = run(TRAIN, cwd=place, CUDA_VISIBLE_DEVICES="0")
    assert said.code == 2 and len(said.blocks) == 1
    assert "1 processes cannot be split by tensor_model_parallel_size 2" in said.blocks[0]
