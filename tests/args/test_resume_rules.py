"""What `--load auto` means, and which differences between a checkpoint's run and the command are said, refused or neither."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megatron_swift.args.commands import SftArguments, parse
from megatron_swift.args.resume_rules import (
    CONSEQUENCES,
    changes,
    find_auto,
    other_data,
    refusal,
    runs_below,
    settings_of,
    table,
)
from megatron_swift.args.rules import TRACKER
from megatron_swift.utils.errors import CheckpointError, DataError, UsageError

MODEL = {
    "num_layers": 2,
    "hidden_size": 64,
    "rotary_base": 1e4,
    "max_position_embeddings": 512,
    "rope_scaling": None,
    "moe": {"topk": 2, "aux_loss_coeff": 0.01, "sparse_layers": (True, False), "names": {"module": "mlp"}},
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
FOLDER = Path("/runs/v0/iter_0000003")


def auto(save=None, *flags):
    return parse(SftArguments, ["--load", "auto", *(("--save", str(save)) if save else ()), *flags], warn=False)


def run_at(folder):
    """A folder that looks like a run's."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / TRACKER).write_text("3")
    return folder


# --load auto


def test_auto_needs_save():
    with pytest.raises(UsageError, match="--load auto looks below --save, which is not given") as error:
        find_auto(auto())
    assert error.value.do == "give --save" and error.value.exit_code == 2


def test_auto_is_refused_with_finetune(tmp_path):
    run_at(tmp_path / "v0-20260101-000000")
    with pytest.raises(UsageError, match="--load auto with --finetune true"):
        find_auto(auto(tmp_path, "--finetune", "true"))


@pytest.mark.parametrize("there", [False, True])
def test_auto_starts_anew_where_there_is_nothing(tmp_path, there):
    """Also where runs died before their first checkpoint."""
    save = tmp_path / "out"
    if there:
        (save / "v0-20260101-000000").mkdir(parents=True)
    args, older = find_auto(auto(save))
    assert args.load is None and older == () and args.save == str(save)


def test_other_loads_are_left_alone(tmp_path):
    run_at(tmp_path / "v0-20260101-000000")
    for flags in (["--load", "elsewhere", "--save", str(tmp_path)], ["--save", str(tmp_path)]):
        args = parse(SftArguments, flags, warn=False)
        assert find_auto(args) == (args, None)


@pytest.mark.parametrize("add_version", [True, False])
def test_which_run_is_the_newest(tmp_path, add_version):
    """By number, not by name or time; --save itself is the newest only for a run that writes there."""
    made = [run_at(tmp_path / f"v{n}-20260101-000000") for n in (10, 9, 0)]
    (tmp_path / "v11-20260101-000000").mkdir()  # died before its first checkpoint
    run_at(tmp_path / "other")
    run_at(tmp_path)
    os.utime(made[2], (2e9, 2e9))
    args, older = find_auto(auto(tmp_path, "--add_version", str(add_version).lower()))
    expected = [*made, tmp_path] if add_version else [tmp_path, *made]
    assert [Path(args.load), *older] == expected == runs_below(tmp_path, add_version=add_version)


def test_without_versions_an_older_run_is_still_found(tmp_path):
    """--add_version false, given for the first time to a job that has runs below --save."""
    run = run_at(tmp_path / "v3-20260101-000000")
    args, older = find_auto(auto(tmp_path, "--add_version", "false"))
    assert Path(args.load) == run and older == ()


def test_auto_is_relative_to_where_it_is_called(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = run_at(tmp_path / "out" / "v0-20260101-000000")
    assert find_auto(auto("out"))[0].load == str(run)


# What differs


def settings(*flags, model=MODEL, ranks=1, dtype="bfloat16"):
    args = parse(SftArguments, list(flags), warn=False)
    return settings_of(args, template="qwen", dtype=dtype, train_iters=9, ranks=ranks, model=model)


def found(before, now, data=("a", "a")):
    return changes(before, now, data=data)


def test_the_same_command_changes_nothing():
    assert found(settings(), settings()) == [] and table([]).split() == ["checkpoint", "now", "consequence"]
    assert settings().keys() == {*CONSEQUENCES, "model"}


def test_what_follows_from_other_settings_is_recorded_as_it_came_out():
    """lr_decay_iters and data_seed have values that other parameters give them."""
    assert (settings()["lr_decay_iters"], settings("--lr_decay_iters", "5")["lr_decay_iters"]) == (9, 5)
    assert settings("--seed", "7")["data_seed"] == 7 and settings("--seed", "7", "--data_seed", "8")["data_seed"] == 8


@pytest.mark.parametrize(
    ("flags", "name", "word"),
    [
        (("--lr", "3e-4"), "lr", "learning rate"),
        (("--micro_batch_size", "7"), "micro_batch_size", "sums in another order"),
        (("--global_batch_size", "7"), "global_batch_size", "steps of another size"),
        (("--dataloader_type", "single"), "dataloader_type", "another order"),
        (("--clip_grad", "0.5"), "clip_grad", "updates go on"),
        (("--fp8_format", "hybrid"), "fp8_format", "another precision"),
        (("--fp8_recipe", "rowwise"), "fp8_recipe", "another precision"),
        (("--tensor_model_parallel_size", "2"), "tensor_model_parallel_size", "sums in another order"),
    ],
)
def test_settings_are_said_and_let_through(flags, name, word):
    (change,) = found(settings(), settings(*flags))
    assert change.name == name and word in change.consequence
    assert refusal([change], folder=FOLDER, reset_data=False) is None and not other_data([change])
    line = next(line for line in table([change]).splitlines() if line.startswith(name))
    assert line.split()[1:3] == [
        f"{value:g}" if isinstance(value, float) else str(value) for value in (change.before, change.now)
    ]


def test_precision_and_ranks_are_said():
    assert [c.name for c in found(settings(), settings(dtype="float16", ranks=4))] == ["dtype", "ranks"]


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"hidden_size": 128}, "hidden_size"),
        ({"rotary_base": 1e6}, "rotary_base"),
        ({"moe": MODEL["moe"] | {"topk": 1}}, "moe.topk"),
        ({"moe": MODEL["moe"] | {"sparse_layers": (True, True)}}, "moe.sparse_layers"),
    ],
)
def test_another_model_is_refused(change, name):
    changed = found(settings(), settings(model=MODEL | change))
    error = refusal(changed, folder=FOLDER, reset_data=True)
    assert isinstance(error, CheckpointError) and f"it differs in {name}" in error.what and str(FOLDER) in error.what


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"max_position_embeddings": 1024}, "max_position_embeddings"),
        ({"moe": MODEL["moe"] | {"aux_loss_coeff": 0.0}}, "moe.aux_loss_coeff"),
        ({"moe": MODEL["moe"] | {"names": {"module": "block_sparse_moe"}}}, "moe.names.module"),
    ],
)
def test_what_changes_no_weight_and_no_function_is_no_other_model(change, name):
    changed = found(settings(), settings(model=MODEL | change))
    assert [c.name for c in changed] == [f"model {name}"]
    assert refusal(changed, folder=FOLDER, reset_data=False) is None


@pytest.mark.parametrize(
    ("scaling", "refused"),
    [(YARN, False), ({**YARN, "factor": None}, True), ({**YARN, "original_max_position_embeddings": None}, True)],
)
def test_positions_that_the_rotation_is_computed_from(scaling, refused):
    """YaRN takes max_position_embeddings for what its own settings do not say."""
    before, now = (settings(model=MODEL | {"rope_scaling": scaling, "max_position_embeddings": n}) for n in (512, 1024))
    assert (refusal(found(before, now), folder=FOLDER, reset_data=False) is not None) == refused


def test_other_rows_are_refused_with_their_cause():
    changed = found(settings(), settings("--max_length", "77"), data=("a", "b"))
    error = refusal(changed, folder=FOLDER, reset_data=False)
    assert isinstance(error, DataError) and error.why == "max_length changed" and error.exit_code == 3
    assert refusal(changed, folder=FOLDER, reset_data=True) is None and other_data(changed)
    unnamed = refusal(found(settings(), settings(), data=("a", "b")), folder=FOLDER, reset_data=False)
    assert "a file, or a parameter that makes rows" in unnamed.why


def test_a_setting_that_makes_the_same_rows_is_no_other_data():
    changed = found(settings(), settings("--max_length", "77"))
    assert [c.name for c in changed] == ["max_length"] and refusal(changed, folder=FOLDER, reset_data=False) is None


def test_what_an_older_version_did_not_record_is_not_compared():
    before = settings()
    del before["lr"], before["model"]["hidden_size"]
    assert found(before, settings("--lr", "3e-4", model=MODEL | {"hidden_size": 128}), data=("", "b")) == []
    assert found({}, settings()) == []


def test_the_table_has_columns():
    head, data, rate = table(found(settings(), settings("--lr", "3e-4"), data=("a" * 40, "b"))).splitlines()
    assert head.index("checkpoint") == data.index("a" * 25 + "...") == rate.index("1e-05")
    assert head.index("now") == data.index("b ") == rate.index("0.0003")
