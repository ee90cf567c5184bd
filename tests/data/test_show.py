import numpy as np

from megatron_swift.data.encode import encode
from megatron_swift.data.show import render_sample, sample_json
from megatron_swift.data.templates import TEMPLATES
from megatron_swift.data.types import IGNORE, Message, Sample


def test_marks_what_is_trained(tokenizer):
    turns = [Message("user", "a"), Message("assistant", "你好\n😀"), Message("user", "b"), Message("assistant", "ZW")]
    sample = encode(TEMPLATES["chatml"], tokenizer, turns)
    header, _, text = render_sample(sample, tokenizer, colour=False).partition("\n")
    num_trained = int((sample.labels != IGNORE).sum())
    assert header.startswith(f"{len(sample.ids)} tokens, {num_trained} trained")
    assert text == (
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n⟦你好\n😀<|im_end|>↵⟧\n"
        "<|im_start|>user\nb<|im_end|>\n<|im_start|>assistant\n⟦ZW<|im_end|>↵⟧\n"
    )
    green = render_sample(sample, tokenizer, colour=True).partition("\n")[2]
    assert green.replace("\x1b[32m", "⟦").replace("\x1b[0m", "⟧") == text


def test_control_characters_do_not_reach_the_terminal(tokenizer):
    turns = [Message("user", "\x1b[2J\r\x9b\t"), Message("assistant", "\x07ok")]
    text = render_sample(encode(TEMPLATES["llama3"], tokenizer, turns), tokenizer, colour=False)
    assert "\\x1b[2J\\r\\x9b\t" in text
    assert "⟦\\x07ok<|eot_id|>⟧" in text
    assert "\x1b" not in text


def test_all_or_nothing_trained(tokenizer):
    ids = np.array(tokenizer.encode("XY"), np.int32)
    assert render_sample(Sample(ids, ids), tokenizer, colour=False).endswith("\n⟦XY⟧")
    assert render_sample(Sample(ids, np.full_like(ids, IGNORE)), tokenizer, colour=False).endswith("\nXY")
    empty = np.zeros(0, np.int32)
    assert render_sample(Sample(empty, empty), tokenizer, colour=False).startswith("0 tokens, 0 trained")


def test_weights_other_than_one_are_shown(tokenizer):
    text = "<think></think>so <tool_call>{}</tool_call>\n"
    turns = [
        Message("user", "a"),
        Message("assistant", text),
        Message("user", "b"),
        Message("assistant", "ZW", loss_scale=0.25),
    ]
    sample = encode(TEMPLATES["chatml"], tokenizer, turns, loss_scale="hermes")
    header, _, shown = render_sample(sample, tokenizer, colour=False).partition("\n")
    assert header.endswith("(shown ⟦so⟧, with another weight than 1 ⟦×0.5 so⟧)")
    assert "⟦<think></think>so ⟧⟦×2 <tool_call>{}</tool_call>⟧⟦\n<|im_end|>↵⟧\n" in shown
    assert shown.endswith("⟦×0.25 ZW<|im_end|>↵⟧\n")
    assert "another weight" not in render_sample(
        encode(TEMPLATES["chatml"], tokenizer, turns[:2]), tokenizer, colour=False
    )


def test_json_says_everything(tokenizer):
    turns = [Message("user", "a"), Message("assistant", "XY"), Message("user", "b"), Message("assistant", "ZW")]
    sample = encode(TEMPLATES["chatml"], tokenizer, turns)
    value = sample_json(sample, tokenizer)
    assert value["input_ids"] == sample.ids.tolist() and value["labels"] == sample.labels.tolist()
    assert value["text"] == tokenizer.decode(sample.ids.tolist())
    assert (value["num_tokens"], value["num_trained"]) == (len(sample.ids), 6)
    assert [span[2:] for span in value["trained"]] == [[1.0, "XY<|im_end|>\n"], [1.0, "ZW<|im_end|>\n"]]
    begin, end = value["trained"][1][:2]
    assert tokenizer.decode(value["input_ids"][begin:end]) == "ZW<|im_end|>\n"
    assert "loss_scale" not in value
    weighted = [*turns[:3], Message("assistant", "ZW", loss_scale=0.1)]
    value = sample_json(encode(TEMPLATES["chatml"], tokenizer, weighted), tokenizer)
    assert set(value["loss_scale"]) == {0, 1, 0.1}
    assert value["trained"][1][2:] == [0.1, "ZW<|im_end|>\n"]
