"""Training on streamed rows: an interrupted run, resumed, is the uninterrupted one; other ranks see the same rows."""

from __future__ import annotations

import json

import pytest
from runs import contents, differences, go, write_rows

from megatron_swift.checkpoint.publish import iteration_folder
from megatron_swift.testing import make_tiny_model
from megatron_swift.utils.errors import CheckpointError, DataError, UsageError

STREAM = ("--streaming", "true", "--shuffle_buffer_size", "5", "--packing", "true")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stream")
    make_tiny_model(folder / "model", dtype="float32")
    write_rows(folder / "rows.jsonl", 200)
    write_rows(folder / "val.jsonl", 10)
    return folder


@pytest.fixture
def sft(place, tmp_path):
    def start(*flags, rows=place / "rows.jsonl", **kwargs):
        source = () if "--load" in flags else ("--model", str(place / "model"))
        return go(*source, "--dataset", str(rows), "--save", str(tmp_path / "out"), *STREAM, *flags, **kwargs)

    return start


def test_resume_is_bitwise_and_ranks_do_not_matter(sft, place):
    flags = ("--lr_decay_iters", "8", "--val_dataset", str(place / "val.jsonl"), "--eval_iters", "-1")
    whole = sft("--train_iters", "8", *flags)
    first = sft("--train_iters", "3", *flags, "--num_workers", "2")
    second = sft("--train_iters", "8", *flags, "--load", str(first.run_dir), "--num_workers", "1")
    assert first.steps + second.steps == whole.steps
    assert differences(contents(whole.run_dir, 8), contents(second.run_dir, 8)) == []
    others = sft("--train_iters", "8", *flags, "--load", str(first.run_dir), "--micro_batch_size", "1", ranks=2)
    assert others.values(0) == pytest.approx(second.values(0), rel=1e-5)
    third = sft("--train_iters", "6", *flags, "--micro_batch_size", "1", ranks=2)
    places = sorted(path.name for path in iteration_folder(third.run_dir, 6).glob("stream_*"))
    assert places == ["stream_00000.json", "stream_00001.json"]
    last = sft("--train_iters", "8", *flags, "--load", str(third.run_dir))  # one rank reads what two wrote
    assert last.values(0) == pytest.approx(whole.values(0)[6:], rel=1e-5)
    report = json.loads((whole.run_dir / "data_report.json").read_text())
    assert report["streaming"]["lanes"] == 4
    assert report["validation"]["train"]["samples"] == 10


def test_other_data_and_a_lost_place(sft, place, tmp_path):
    run = sft("--train_iters", "2")
    with pytest.raises(DataError, match="training data"):
        sft("--train_iters", "4", "--load", str(run.run_dir), rows=place / "val.jsonl")
    anew = sft("--train_iters", "4", "--load", str(run.run_dir), "--reset_data", "true", rows=place / "val.jsonl")
    assert len(anew.steps) == 2
    found = sft("--train_iters", "4", "--load", str(run.run_dir))
    assert len(found.steps) == 2
    plain = go(
        *("--model", str(place / "model"), "--dataset", str(place / "rows.jsonl"), "--save", str(tmp_path / "plain")),
        *("--train_iters", "2", "--packing", "true"),
    )
    with pytest.raises(DataError, match="training data"):
        sft("--train_iters", "4", "--load", str(plain.run_dir))


def test_a_bad_row_far_down(sft, place, tmp_path):
    path = tmp_path / "bad.jsonl"
    lines = (place / "rows.jsonl").read_text().splitlines()
    path.write_text("\n".join([*lines[:150], "{", *lines[150:]]))
    with pytest.raises(DataError) as caught:
        sft("--train_iters", "40", rows=path)
    assert f"{path}:151: bad JSON" in caught.value.what


def test_lazy_is_the_eager_run_and_resumes_bitwise(place, tmp_path):
    flags = ("--dataset", str(place / "rows.jsonl"), "--save", str(tmp_path / "out"), "--lr_decay_iters", "6")
    flags += ("--split_dataset_ratio", "0.1")
    model = ("--model", str(place / "model"))
    eager = go(*model, *flags, "--train_iters", "6")
    whole = go(*model, *flags, "--train_iters", "6", "--lazy_tokenize", "true", "--num_workers", "2")
    assert whole.steps == eager.steps
    first = go(*model, *flags, "--train_iters", "2", "--lazy_tokenize", "true", ranks=2)
    second = go("--load", str(first.run_dir), *flags, "--train_iters", "6", "--lazy_tokenize", "true")
    assert second.values(0) == pytest.approx(eager.values(0)[2:], rel=1e-5)
    assert json.loads((whole.run_dir / "data_report.json").read_text()) == {
        "lazy": {"rows_read": {str(place / "rows.jsonl"): 200}, "train": 180, "validation": 20}
    }
    assert (whole.run_dir / "val_dataset.jsonl").read_text() == (eager.run_dir / "val_dataset.jsonl").read_text()


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        (
            (
                *("--train_iters", "1", "--streaming", "false", "--packing", "false"),
                *("--lazy_tokenize", "true", "--truncation_strategy", "split"),
            ),
            "--truncation_strategy split with --lazy_tokenize",
        ),
        (("--max_epochs", "1"), "--streaming needs --train_iters"),
        (("--train_iters", "1", "--split_dataset_ratio", "0.1"), "nothing can be split off"),
        (("--train_iters", "1", "--dataloader_type", "cyclic"), "a stream feeds itself"),
        (("--train_iters", "1", "--streaming", "false", "--dataloader_type", "external"), "the data must feed itself"),
    ],
)
def test_rules(sft, flags, what):
    with pytest.raises(UsageError, match=what):
        sft(*flags)


def test_places_that_are_damaged(tmp_path):
    from megatron_swift.commands.stream_places import load_places, places_file
    from megatron_swift.data.streaming import Place, Ref

    places = {lane: Place(2, 9, ((3, 1),), (Ref(0, 1, 2, 0),), 4) for lane in range(4)}
    for rank in range(2):
        name, content = places_file(rank, {lane: places[lane] for lane in (rank, rank + 2)})
        (tmp_path / name).write_bytes(content)
    assert load_places(tmp_path, lanes=4) == places
    with pytest.raises(CheckpointError, match="does not say where the stream goes on"):
        load_places(tmp_path, lanes=5)
    (tmp_path / "stream_00001.json").write_text('{"1": {"window": 1}}')
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_places(tmp_path, lanes=4)
