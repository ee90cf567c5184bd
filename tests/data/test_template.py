import datetime
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny_tokenizer import write_tokenizer

from megatron_swift.data.encode import encode, encode_prompt, stop_ids, stop_strings
from megatron_swift.data.template import split_places
from megatron_swift.data.templates import TEMPLATES, get_template, load_template
from megatron_swift.data.tokenizer import Tokenizer
from megatron_swift.data.types import IGNORE, Message
from megatron_swift.utils.errors import DataError, UsageError

# Written from the specification by a script of its own, not by this package: trained spans stand in ⟦ ⟧.
GOLDEN = json.loads((Path(__file__).parent / "golden_templates.json").read_text(encoding="utf-8"))
DATE = datetime.date.fromisoformat(GOLDEN["date"])


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer.load(write_tokenizer(tmp_path_factory.mktemp("tok"), bos="<s>", eos="</s>", adds_bos=True))


def talk(*turns):
    return [Message(role, text) for role, text in zip(["user", "assistant"] * len(turns), turns, strict=False)]


def marked(sample, tokenizer):
    """The sample's text with ⟦ ⟧ around trained spans, span by span."""
    trained = sample.labels != IGNORE
    assert np.array_equal(sample.labels[trained], sample.ids[trained])
    text, begin = "", 0
    for end in range(1, len(trained) + 1):
        if end == len(trained) or trained[end] != trained[begin]:
            span = tokenizer.decode(sample.ids[begin:end].tolist())
            text += f"⟦{span}⟧" if trained[begin] else span
            begin = end
    return text


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda c: f"{c['template']}-{c['rounds']}-{c['system']!r}")
def test_golden_text_and_mask(case, tokenizer):
    rounds = zip(GOLDEN["queries"], GOLDEN["replies"], strict=True)
    messages = talk(*[text for pair in list(rounds)[: case["rounds"]] for text in pair])
    template = get_template(case["template"], date=DATE)
    as_argument = encode(template, tokenizer, messages, system=case["system"])
    assert marked(as_argument, tokenizer) == case["text"]
    if case["system"] is not None:
        own = encode(template, tokenizer, [Message("system", case["system"]), *messages], system="other")
        assert np.array_equal(own.ids, as_argument.ids)


def test_golden_covers_every_template():
    assert {case["template"] for case in GOLDEN["cases"]} == set(TEMPLATES)


def test_unknown_name_suggests():
    with pytest.raises(UsageError, match="no template named 'qwen25'") as caught:
        get_template("qwen25")
    assert "qwen2_5" in caught.value.do


def test_date_is_todays_by_default_and_configurable():
    assert "{date}" not in get_template("llama3_2").prefix
    assert "Today Date: 05 Mar 2025\n" in get_template("llama3_2", date=DATE).prefix
    before = datetime.date.today()
    text = get_template("llama3_2").prefix
    assert text in [get_template("llama3_2", date=day).prefix for day in (before, datetime.date.today())]


def test_separator_must_begin_with_suffix():
    with pytest.raises(AssertionError):
        replace(TEMPLATES["chatml"], suffix="<other>")


def test_split_places_keeps_other_braces():
    assert split_places("a{x}{query}b{eos}") == ("a{x}", "{query}", "b", "{eos}")


def prompt(name, tokenizer, messages, **options):
    return tokenizer.decode(encode_prompt(get_template(name, date=DATE), tokenizer, messages, **options))


def test_prompt_reduces_thinking_in_history_only_for_thinking_templates(tokenizer):
    messages = talk("a", "<think>\nx</think>y\n</think>\n\nZW\n", "b")
    head, tail = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n", "<|im_start|>user\nb<|im_end|>\n"
    opened = "<|im_start|>assistant\n"
    assert prompt("qwen3", tokenizer, messages) == f"{head}ZW\n<|im_end|>\n{tail}{opened}"
    assert prompt("qwq", tokenizer, messages) == f"{head}ZW\n<|im_end|>\n{tail}{opened}<think>\n"
    assert prompt("chatml", tokenizer, messages) == f"{head}{messages[1].content}<|im_end|>\n{tail}{opened}"
    assert prompt("deepseek_r1", tokenizer, messages, system="S") == (
        "<｜begin▁of▁sentence｜>S<｜User｜>a<｜Assistant｜>\n\nZW\n<｜end▁of▁sentence｜><｜User｜>b<｜Assistant｜><think>\n"
    )


def test_response_prefix_argument_replaces_the_templates(tokenizer):
    assert prompt("qwq", tokenizer, talk("a"), response_prefix="").endswith("<|im_start|>assistant\n")
    assert prompt("qwen3", tokenizer, talk("a"), response_prefix="Sure").endswith("<|im_start|>assistant\nSure")


def test_prompt_is_the_beginning_of_the_training_sample(tokenizer):
    for name in TEMPLATES:
        template = replace(get_template(name, date=DATE), empty_think="")
        sample = encode(template, tokenizer, talk("a", "XY", "b", "ZW"))
        ids = encode_prompt(template, tokenizer, talk("a", "XY", "b"), response_prefix="")
        assert sample.ids[: len(ids)].tolist() == ids, name


def test_prompt_needs_an_open_question(tokenizer):
    with pytest.raises(DataError, match="ends with a reply"):
        encode_prompt(TEMPLATES["chatml"], tokenizer, talk("a", "b"))


def test_stop_ids_and_strings(tokenizer):
    named = tokenizer.token_id
    assert stop_ids(TEMPLATES["chatml"], tokenizer) == [named("</s>"), named("<|im_end|>"), named("<|endoftext|>")]
    assert stop_ids(TEMPLATES["llama3"], tokenizer) == [named("</s>"), named("<|eot_id|>")]
    assert stop_ids(TEMPLATES["deepseek"], tokenizer) == [named("</s>")]
    assert stop_strings(TEMPLATES["chatml"], tokenizer) == []
    unknown = replace(TEMPLATES["chatml"], stop_words=("<|end|>",))
    assert stop_strings(unknown, tokenizer) == ["<|end|>"]


def test_enable_thinking(tokenizer):
    empty = "<think>\n\n</think>\n\n"
    plain, off, on = (load_template("qwen3", tokenizer, enable_thinking=value) for value in (None, False, True))
    opened = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
    texts = {
        name: (
            tokenizer.decode(encode_prompt(template, tokenizer, talk("a"))),
            marked(encode(template, tokenizer, talk("a", "XY")), tokenizer),
        )
        for name, template in (("plain", plain), ("off", off), ("on", on))
    }
    masked, whole = f"{opened}{empty}⟦XY<|im_end|>\n⟧", f"{opened}⟦XY<|im_end|>\n⟧"
    assert texts == {"plain": (opened, masked), "off": (opened + empty, masked), "on": (opened, whole)}
    for name in ("llama3", "qwq", "chatml"):
        with pytest.raises(UsageError, match=f"the template '{name}' has no such choice") as caught:
            load_template(name, tokenizer, enable_thinking=False)
        assert "qwen3" in caught.value.do


def test_an_empty_thinking_part_only_where_the_reply_has_none(tokenizer):
    template, thought = get_template("qwen3"), "<think>\nt\n</think>\n\nZW"
    text = marked(encode(template, tokenizer, talk("a", thought, "b", "XY")), tokenizer)
    assert f"⟦{thought}<|im_end|>" in text and text.endswith("<think>\n\n</think>\n\n⟦XY<|im_end|>\n⟧")
    everything = encode(template, tokenizer, talk("a", "XY"), loss_scale="all")
    assert np.array_equal(everything.ids, everything.labels)


def test_earlier_thoughts_are_dropped_where_only_the_last_round_is_trained(tokenizer):
    thought = "<think>\nt\n</think>\n\nZW"
    for name in ("qwen3", "qwq", "deepseek_r1"):
        template = get_template(name)
        messages = talk("a", thought, "b", thought)
        prompt = encode_prompt(template, tokenizer, messages[:-1], response_prefix="")
        last = encode(template, tokenizer, messages, loss_scale="last_round")
        assert tokenizer.decode(last.ids.tolist()).startswith(tokenizer.decode(prompt))
        assert marked(last, tokenizer).endswith(f"⟦{thought}{template.suffix}⟧")
        kept = [messages[0], replace(messages[1], train=True), *messages[2:]]
        assert marked(encode(template, tokenizer, kept, loss_scale="last_round"), tokenizer).count(f"⟦{thought}") == 2
    plain = encode(TEMPLATES["chatml"], tokenizer, talk("a", thought, "b", "XY"), loss_scale="last_round")
    assert "<think>" in tokenizer.decode(plain.ids.tolist())


def test_a_template_of_the_users_own(tokenizer):
    mine = replace(TEMPLATES["chatml"], name="mine", default_system="Today is {date}.", prefix="{date}|")
    template = load_template("mine", tokenizer, date=DATE, registered={"mine": mine})
    assert template.prefix == "05 Mar 2025|"
    with pytest.raises(UsageError, match="no template named 'mien'") as caught:
        load_template("mien", tokenizer, registered={"mine": mine})
    assert "did you mean mine" in caught.value.do
    odd = replace(mine, agent_template="none")
    with pytest.raises(UsageError, match="names the agent template 'none'"):
        load_template("mine", tokenizer, registered={"mine": odd})
