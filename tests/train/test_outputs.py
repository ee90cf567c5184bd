"""The console line, logging.jsonl and the progress bar."""

from __future__ import annotations

import json
import math
import os
import pty
import re
import subprocess
import sys

import pytest

from megatron_swift.models.config import ModelConfig
from megatron_swift.parallel.engine import Counts
from megatron_swift.train import outputs as module
from megatron_swift.train.outputs import OutputOptions, Outputs, ProgressBar, format_seconds
from megatron_swift.train.step import StepReport
from megatron_swift.train.trackers import TrackerOptions
from megatron_swift.utils.errors import StorageError

CFG = ModelConfig(
    num_layers=2,
    hidden_size=8,
    ffn_hidden_size=6,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=2,
    vocab_size=11,
    max_position_embeddings=64,
    norm_epsilon=1e-6,
    rotary_base=10000.0,
    rope_scaling=None,
    tied_embeddings=False,
    qkv_bias=True,
    qk_layernorm=False,
    dtype="float32",
)
# Spec section 6.4; what comes after "nan iterations" is ours.
LINE = re.compile(
    r"^ \[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\] iteration {8}5/ {5}100 \| consumed samples: {11}80 \| "
    r"elapsed time per iteration \(ms\): \d+\.\d \| throughput per GPU \(TFLOP/s/GPU\): \d+\.\d{3} \| "
    r"learning rate: 5\.000000E-06 \| global batch size: {4}16 \| lm loss: 1\.234567E\+00 \| loss scale: 1\.0 \| "
    r"grad norm: 3\.210 \| (?:params norm: 7\.500 \| )?number of skipped iterations: {3}0 \| number of nan iterations: {3}0 \|"
    r" tokens/s: \d+ \| memory \(GiB\): \d+\.\d\d \| eta: \d:\d\d:\d\d \|$"
)
KEYS = ["lm loss", "grad_norm", "learning_rate", "consumed_samples", "global_step/max_steps", "loss_scale"]
KEYS += ["skipped_iterations", "seconds_per_iteration", "tokens_per_second", "tflops_per_gpu", "memory_gib"]
KEYS += ["remaining_seconds"]


def report(loss=1.234567, *, norm=3.21, trained=50, skipped=False):
    return StepReport(loss, norm, Counts(trained, 100, 1000), 1.0, skipped)


@pytest.fixture
def make(tmp_path):
    def outputs(**changes):
        trackers = TrackerOptions(kinds=(), folder=tmp_path / "runs")
        options = {"run_dir": tmp_path, "train_iters": 100, "global_batch_size": 16, "world_size": 1}
        return Outputs(OutputOptions(**options | {"trackers": trackers} | changes), CFG)

    return outputs


def rows(tmp_path):
    return [
        json.loads(line, parse_constant=pytest.fail) for line in (tmp_path / "logging.jsonl").read_text().splitlines()
    ]


def steps(out, reports, first=1, norm=None):
    for number, one in enumerate(reports, first):
        out.step(number, number * 16, one, lr=number * 1e-6, params_norm=norm)


@pytest.mark.parametrize("norm", [None, 7.5])
def test_console_line_and_jsonl(make, tmp_path, capsys, norm):
    out = make()
    steps(out, [report()] * 7, norm=norm)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[0].split()[-2:] for line in lines] == [["1/", "100"], ["5/", "100"]]
    assert LINE.match(lines[1]), lines[1]
    first, second = rows(tmp_path)
    assert list(second) == [*KEYS[:3], *(["params_norm"] if norm else []), *KEYS[3:]]
    assert second["global_step/max_steps"] == "5/100" and second["consumed_samples"] == 80
    assert second["lm loss"] == 1.234567 and second["learning_rate"] == 5e-6 and second["grad_norm"] == 3.21
    assert first["global_step/max_steps"] == "1/100"


def test_loss_of_an_interval_is_per_token(make, tmp_path, capsys):
    out = make(log_interval=2)
    steps(out, [report(1.0), report(1.0), report(2.0, trained=10), report(5.0, trained=30)])
    line = capsys.readouterr().out.splitlines()[-1]
    assert "lm loss: 4.250000E+00" in line and rows(tmp_path)[-1]["lm loss"] == 5.0


def test_nan_is_null(make, tmp_path, capsys):
    out = make(log_interval=2)
    steps(
        out,
        [
            report(),
            report(),
            report(math.nan, norm=math.nan, skipped=True),
            report(math.inf, norm=math.inf, skipped=True),
        ],
    )
    out.evaluation(4, 64, math.nan, where="iteration 4")
    *_, line, rule, said, _ = capsys.readouterr().out.splitlines()
    assert "lm loss: NAN" in line and "skipped iterations:   2 | number of nan iterations:   2 |" in line
    assert "lm loss value: NAN | lm loss PPL: NAN" in said and set(rule) == {"-"}
    assert [(row.get("lm loss"), row.get("grad_norm")) for row in rows(tmp_path)[-2:]] == [(None, None)] * 2
    assert rows(tmp_path)[-1] == {"eval_lm loss": None, "eval_ppl": None, "iteration": 4}


def test_evaluation(make, tmp_path, capsys):
    out = make()
    out.evaluation(100, 1600, 2.0, where="iteration 100 on validation set")
    out.evaluation(100, 1600, 500.0, where="iteration 100 on validation set")
    rule, said, again, *_ = capsys.readouterr().out.splitlines()
    assert said == (
        " validation loss at iteration 100 on validation set | lm loss value: 2.000000E+00 | lm loss PPL: 7.389056E+00 | "
    )
    assert rule == again == "-" * (len(said) + 1)
    assert rows(tmp_path)[0] == {"eval_lm loss": 2.0, "eval_ppl": 7.3890561, "iteration": 100}
    assert rows(tmp_path)[1]["eval_ppl"] == pytest.approx(math.exp(20))


def test_switches(make):
    everything = make()
    steps(everything, [report()], norm=1.0)
    names = {"learning-rate", "batch-size", "lm loss", "loss-scale", "grad-norm", "params-norm"}
    names |= {"iteration-time", "throughput", "tokens-per-second"}
    assert set(everything.history) == names
    less = make(throughput=False, learning_rate=False, timers=False, validation_ppl=False, tracker_interval=2)
    steps(less, [report()] * 3)
    less.evaluation(3, 48, 1.0, where="")
    assert set(less.history) == {"batch-size", "lm loss", "loss-scale", "grad-norm", "lm loss validation"}
    assert [step for step, _ in less.history["lm loss"]] == [2]


def test_pauses_are_no_training_time(make, monkeypatch, tmp_path):
    clock = [0.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: clock[0])
    out = make(log_interval=2)
    for number in (1, 2, 3, 4):
        clock[0] += 1
        steps(out, [report()], first=number)
        clock[0] += 100  # an evaluation
        out.skip_time()
    assert [row["seconds_per_iteration"] for row in rows(tmp_path)] == [1.0, 1.0, 1.0]
    assert rows(tmp_path)[-1]["remaining_seconds"] == 96 and rows(tmp_path)[-1]["tokens_per_second"] == 100
    assert [value for _, value in out.history["iteration-time"]] == [1.0] * 4


def test_log_on_a_full_disk(make, tmp_path):
    (tmp_path / "logging.jsonl").symlink_to("/dev/full")
    with pytest.raises(StorageError, match=r"cannot write to .*logging\.jsonl: No space left"):
        steps(make(), [report()])


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00:00"), (3661.4, "1:01:01"), (math.nan, "?:??:??")])
def test_format_seconds(seconds, text):
    assert format_seconds(seconds) == text


# The bar


def test_bar_is_silent_where_there_is_no_terminal(capfd):
    bar = ProgressBar(10)
    bar.show(5, "half")
    bar.say("a line")
    bar.close()
    assert capfd.readouterr() == ("a line\n", "")


SHOW = """
from megatron_swift.train.outputs import ProgressBar
bar = ProgressBar(4)
for i in (1, 2, 3, 4):
    bar.show(i, "loss 1.0" + " and more" * (5 - i))
    if i % 2 == 0:
        bar.say(f"line {i}")
bar.show(4, "end")
bar.close()
print("done")
"""


def screen(text: str) -> list[str]:
    """What a terminal shows: carriage return goes to the line's start, the code for erasing empties its rest."""
    lines = []
    for raw in text.split("\n"):
        line, at = "", 0
        for token in re.findall(r"\r|\x1b\[K|[^\r\x1b]", raw):
            if token == "\r":
                at = 0
            elif token == "\x1b[K":
                line = line[:at]
            else:
                line, at = line[:at] + token + line[at + 1 :], at + 1
        lines.append(line)
    return lines


def test_bar_on_a_terminal():
    master, slave = pty.openpty()
    process = subprocess.Popen([sys.executable, "-c", SHOW], stdout=slave, stderr=slave, stdin=slave)
    os.close(slave)
    said = b""
    while True:
        try:
            block = os.read(master, 4096)
        except OSError:  # the other side is closed
            break
        if not block:
            break
        said += block
    assert process.wait() == 0
    text = said.decode().replace("\r\n", "\n")
    assert "[#######" in text and "] 1/4  loss 1.0" in text
    assert screen(text) == ["line 2", "line 4", "[" + "#" * 30 + "] 4/4  end", "done", ""]
