"""An interrupted run, resumed, is the uninterrupted one, bit for bit."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from runs import contents, differences, go, write_rows

from megatron_swift.args.commands import ExportArguments, parse
from megatron_swift.checkpoint.publish import TRACKER, iteration_folder, published
from megatron_swift.commands import export
from megatron_swift.testing import make_tiny_model
from megatron_swift.utils.errors import CheckpointError, DataError, UsageError
from megatron_swift.utils.log import set_up_logging

LENGTH = "12"  # two passes over 24 rows, 4 a step


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    for dtype in ("float32", "bfloat16", "float16"):
        make_tiny_model(folder / dtype, dtype=dtype)
    write_rows(folder / "rows.jsonl")
    return folder


@pytest.fixture
def sft(place, tmp_path):
    """go() on the tiny model and rows; a run per call, below tmp_path."""

    def start(*flags, model="float32", save=tmp_path / "out", rows=place / "rows.jsonl", **kwargs):
        source = () if "--load" in flags else ("--model", str(place / model))
        data = ("--dataset", str(rows), "--save", str(save))
        return go(*source, *data, *flags, **kwargs)

    return start


MATRIX = [
    (1, "bfloat16", ("--packing", "true", "--num_workers", "2")),
    (1, "float16", ()),
    (2, "float32", ("--num_workers", "2", "--packing", "true")),
    pytest.param(
        2, "bfloat16", ("--cross_entropy_loss_fusion", "true", "--micro_batch_size", "1"), marks=pytest.mark.slow
    ),
    (2, "bfloat16", ("--tensor_model_parallel_size", "2", "--sequence_parallel", "true")),
    pytest.param(2, "float32", ("--pipeline_model_parallel_size", "2"), marks=pytest.mark.slow),
    (2, "float32", ("--context_parallel_size", "2", "--packing", "true")),
    (1, "float32", ("--optimizer", "sgd", "--lr", "1e-3", "--dataloader_type", "single", "--global_batch_size", "2")),
]


@pytest.mark.parametrize(("ranks", "dtype", "flags"), MATRIX, ids=lambda value: str(value).replace(" ", ""))
def test_resume_is_bitwise(sft, ranks, dtype, flags):
    """12 iterations at once = 3 + 4 + 5, resumed twice: losses, weights, moments, masters, scale, random numbers."""
    flags = (*flags, "--lr_warmup_iters", "2", "--lr_decay_iters", LENGTH)
    whole = sft("--train_iters", LENGTH, *flags, model=dtype, ranks=ranks)
    steps, load = [], ()
    for end in ("3", "7", LENGTH):
        part = sft("--train_iters", end, *flags, *load, model=dtype, ranks=ranks)
        load = ("--load", str(part.run_dir))
        steps += part.steps
    assert steps == whole.steps and len(steps) == 12
    if dtype != "float16":  # whose first steps overflow
        assert len(set(whole.values(0))) == 12
    assert differences(contents(whole.run_dir, 12), contents(part.run_dir, 12)) == []


def test_what_a_checkpoint_holds(sft):
    run = sft("--train_iters", "4", "--save_interval", "2", model="bfloat16")
    found = contents(run.run_dir, 4)
    weights = {name for name in found if name.startswith(("decoder.", "embedding."))}
    assert {found[name].dtype for name in weights} == {torch.bfloat16}
    for kind in ("fp32_param", "exp_avg", "exp_avg_sq"):
        for name in weights:
            state = found[f"optimizer.state.{kind}.{name}"]
            assert state.dtype == torch.float32 and state.shape == found[name].shape and state.any()
    for name in weights:
        assert torch.equal(found[name], found[f"optimizer.state.fp32_param.{name}"].bfloat16())
    state = found["state.json"]
    assert (state["iteration"], state["consumed_samples"], state["optimizer_steps"]) == (4, 16, 4)
    assert published(run.run_dir) == [2, 4] and (run.run_dir / TRACKER).read_text() == "4"


def test_the_test_sees_a_difference(sft):
    """A resumed run with another seed or learning rate does differ."""
    whole = sft("--train_iters", "6")
    part = sft("--train_iters", "3", "--lr_decay_iters", "6")
    rest = sft("--train_iters", "6", "--load", str(part.run_dir), "--lr", "2e-2")
    assert whole.steps[:3] == part.steps and whole.steps[3:] != rest.steps
    found = differences(contents(whole.run_dir, 6), contents(rest.run_dir, 6))
    assert "embedding.word_embeddings.weight" in found and "rng_00000.json" not in found


def test_two_ranks_go_on_as_one_and_back(sft):
    """Same rows in the same order, same state; the sums of a step differ in their last bits."""
    whole = sft("--train_iters", "8")
    two = sft("--train_iters", "4", "--lr_decay_iters", "8", ranks=2)
    one = sft("--train_iters", "6", "--lr_decay_iters", "8", "--load", str(two.run_dir))
    rest = sft("--train_iters", "8", "--load", str(one.run_dir), "--no_load_rng", "true", ranks=2)
    for place, tolerance in ((0, 2e-5), (3, 0)):
        steps = [value for part in (two, one, rest) for value in part.values(place)]
        assert steps == pytest.approx(whole.values(place), rel=tolerance, abs=0)


# What is left out of a checkpoint, or of loading


@pytest.fixture(scope="module")
def runs(place, tmp_path_factory):
    """Four checkpoints at iteration 3: full, without optimizer, without random numbers, without both."""
    out = tmp_path_factory.mktemp("runs")
    flags = ("--dataset", str(place / "rows.jsonl"), "--train_iters", "3", "--lr_decay_iters", "9")
    made = {}
    for name, less in {
        "full": (),
        "no_optim": ("--no_save_optim", "true"),
        "no_rng": ("--no_save_rng", "true"),
        "bare": ("--no_save_optim", "true", "--no_save_rng", "true"),
    }.items():
        made[name] = go("--model", str(place / "bfloat16"), *flags, "--save", str(out / name), *less).run_dir
    argv = ["--model", str(place / "bfloat16"), "--to_mcore", "true", "--output_dir", str(out / "converted")]
    export.run(parse(ExportArguments, argv))
    return made | {"converted": out / "converted"}


@pytest.mark.parametrize(
    ("run", "flags", "start"),
    [
        ("full", (), 3),
        ("full", ("--no_load_optim", "true"), 3),
        ("full", ("--no_load_rng", "true"), 3),
        ("full", ("--finetune", "true"), 0),
        ("no_optim", ("--no_load_optim", "true"), 3),
        ("no_rng", ("--no_load_rng", "true"), 3),
        ("bare", ("--no_load_optim", "true", "--no_load_rng", "true"), 3),
        ("bare", ("--finetune", "true"), 0),
        ("converted", ("--finetune", "true"), 0),
        ("converted", ("--no_load_optim", "true", "--no_load_rng", "true"), 0),
    ],
)
def test_parts_that_are_declined(sft, runs, run, flags, start):
    result = sft("--train_iters", "5", "--lr_decay_iters", "9", "--load", str(runs[run]), *flags)
    assert len(result.steps) == 5 - start
    state = contents(result.run_dir, 5)["state.json"]
    fresh = start == 0 or "--no_load_optim" in flags
    assert state["optimizer_steps"] == (5 - start if fresh else 5)
    assert state["consumed_samples"] == 20
    assert result.values(3)[0] == pytest.approx(0.5e-2 * (1 + torch.cos(torch.tensor(torch.pi * start / 9)).item()))


def test_masters_and_moments_matter(sft, runs):
    """Without the optimizer, training goes on from rounded weights and empty moments: other numbers."""
    flags = ("--train_iters", "6", "--lr_decay_iters", "9")
    full = sft(*flags, "--load", str(runs["full"]))
    new = sft(*flags, "--load", str(runs["full"]), "--no_load_optim", "true")
    rounded = sft(*flags, "--load", str(runs["bare"]), "--no_load_optim", "true", "--no_load_rng", "true")
    assert full.steps[0] == new.steps[0] and full.steps[1] != new.steps[1]
    assert rounded.steps[2] != new.steps[2]


@pytest.mark.parametrize(
    ("run", "flags", "words"),
    [
        ("no_optim", (), ["no optimizer state", "--no_load_optim true", "--finetune true"]),
        ("bare", (), ["no optimizer state"]),
        ("bare", ("--no_load_optim", "true"), ["no random state", "--no_load_rng true"]),
        ("no_rng", (), ["no random state", "--no_load_rng true"]),
        ("full", ("--optimizer", "sgd"), ["the state of optimizer adam, not of sgd", "--no_load_optim true"]),
        ("converted", (), ["weights only, no training state", "--finetune true"]),
        ("converted", ("--no_load_optim", "true"), ["weights only, no training state", "--finetune true"]),
    ],
)
def test_what_is_missing_is_named(sft, runs, run, flags, words):
    with pytest.raises(CheckpointError) as error:
        sft("--train_iters", "5", "--load", str(runs[run]), *flags)
    for word in words:
        assert word in error.value.block()


def test_more_ranks_than_random_states(sft, runs):
    """The second rank takes the first one's."""
    result = sft("--train_iters", "5", "--load", str(runs["full"]), ranks=2)
    found = contents(result.run_dir, 5)
    assert len(result.steps) == 2 and found["rng_00001.json"] == contents(runs["full"], 3)["rng_00000.json"]


@pytest.mark.parametrize("iters", ["3", "2"])
def test_nothing_left_to_train(sft, runs, iters):
    with pytest.raises(UsageError, match=f"stands at iteration 3 already, --train_iters is {iters}"):
        sft("--train_iters", iters, "--load", str(runs["full"]))


def test_other_settings_are_shown(sft, runs, capfd):
    set_up_logging()
    flags = ("--load", str(runs["full"]), "--train_iters", "9")
    with pytest.raises(UsageError, match="--global_batch_size 8 does not divide the 12 samples") as error:
        sft(*flags, "--global_batch_size", "8")
    assert "--global_batch_size 4" in error.value.do
    capfd.readouterr()
    result = sft(*flags, "--global_batch_size", "6", "--lr", "2e-2")
    assert len(result.steps) == 6 and contents(result.run_dir, 9)["state.json"]["consumed_samples"] == 12 + 6 * 6
    said = [line.split() for line in capfd.readouterr().err.splitlines()]
    assert ["global_batch_size", "4", "6"] in [words[:3] for words in said]
    assert ["lr", "0.01", "0.02"] in [words[:3] for words in said]


def test_other_data_are_refused_unless_asked_for(sft, runs, tmp_path):
    """--reset_data begins with their first row, once: the next resume, of the same command, goes on."""
    rows = write_rows(tmp_path / "other.jsonl", 9)
    flags = ("--lr_decay_iters", "9")
    with pytest.raises(DataError, match="the training data are not those of") as error:
        sft(*flags, "--train_iters", "9", "--load", str(runs["full"]), rows=rows)
    assert "--reset_data true" in error.value.do and error.value.exit_code == 3
    flags += ("--reset_data", "true")
    first = sft(*flags, "--train_iters", "5", "--load", str(runs["full"]), rows=rows)
    again = sft(*flags, "--train_iters", "6", "--load", str(first.run_dir), rows=rows)
    assert contents(first.run_dir, 5)["state.json"]["consumed_samples"] == 8
    assert contents(again.run_dir, 6)["state.json"]["consumed_samples"] == 12


def test_load_auto_goes_on(sft, place):
    """One command: starts anew, then goes on with the newest run, bit for bit; damage makes it fall back to an older run."""
    flags = ("--load", "auto", "--model", str(place / "float32"), "--lr_decay_iters", "9")
    first = sft(*flags, "--train_iters", "3")
    second = sft(*flags, "--train_iters", "6")
    iteration_folder(second.run_dir, 6).joinpath("state.json").write_text("{")
    third = sft(*flags, "--train_iters", "9")
    whole = go(
        "--model",
        str(place / "float32"),
        "--dataset",
        str(place / "rows.jsonl"),
        "--save",
        str(first.run_dir.parent / "whole"),
        "--train_iters",
        "9",
        "--lr_decay_iters",
        "9",
    )
    assert first.steps + second.steps == whole.steps[:6]
    assert third.steps == whole.steps[3:]
    assert differences(contents(whole.run_dir, 9), contents(third.run_dir, 9)) == []


@pytest.mark.parametrize("file", ["__0_0.distcp", "state.json", "rng_00000.json", ".metadata"])
def test_damage_is_found_by_all_ranks(sft, runs, tmp_path, file):
    run = shutil.copytree(runs["full"], tmp_path / "copy")
    path = iteration_folder(run, 3) / file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{file} is damaged"):
        sft("--train_iters", "5", "--load", str(run), "--no_load_rng", "true", ranks=2)


# Rotation and exported weights


def test_save_total_limit(sft):
    run = sft("--train_iters", "7", "--save_interval", "2", "--save_total_limit", "2", ranks=2)
    assert published(run.run_dir) == [6, 7]


def files_of(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "args.json"}


LAYOUTS = [(1, ()), (2, ()), (2, ("--tensor_model_parallel_size", "2")), (2, ("--pipeline_model_parallel_size", "2"))]


@pytest.mark.parametrize(("ranks", "layout"), LAYOUTS, ids=str)
def test_exported_weights_are_the_same_everywhere(sft, place, ranks, layout, tmp_path):
    """The folder `hf` of a run, in any layout, is byte for byte what export makes of its checkpoint."""
    flags = ("--train_iters", "2", "--save_safetensors", "true", "--lr", "1e-3", *layout)
    run = sft(*flags, model="bfloat16", ranks=ranks)
    out = tmp_path / "hf"
    export.run(parse(ExportArguments, ["--mcore_model", str(run.run_dir), "--to_hf", "true", "--output_dir", str(out)]))
    made = files_of(iteration_folder(run.run_dir, 2) / "hf")
    assert made == files_of(out) and made.pop("model.safetensors")
    assert made == {name: (place / "bfloat16" / name).read_bytes() for name in made}  # tokenizer, config and so on
    stored = json.loads((out / "args.json").read_text())
    assert stored["torch_dtype"] == "bfloat16" and stored["template"] == "chatml"


def test_same_save_folder_again(sft, tmp_path):
    """--add_version false: resuming into the folder itself goes on in it."""
    run = tmp_path / "out"
    flags = ("--add_version", "false", "--save_interval", "2", "--lr_decay_iters", "6")
    sft("--train_iters", "4", *flags)
    again = sft("--train_iters", "6", *flags, "--load", str(run))
    assert again.run_dir == run and published(run) == [2, 4, 6]
    lines = [json.loads(line) for line in (run / "logging.jsonl").read_text().splitlines()]
    assert [line["global_step/max_steps"] for line in lines] == ["1/4", "2/4", "3/4", "4/4", "5/6", "6/6"]
