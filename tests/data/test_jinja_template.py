"""A model's own chat template: what is trained is found by rendering, or the template is refused."""

from __future__ import annotations

import datetime
import json
import pickle
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizer import SPECIAL, write_tokenizer

from megatron_swift.data.encode import encode, encode_many, encode_prompt, stop_ids, stop_strings
from megatron_swift.data.templates import get_template, load_template
from megatron_swift.data.tokenizer import Tokenizer
from megatron_swift.data.types import IGNORE, Conversation, Message
from megatron_swift.utils.errors import DataError, UsageError

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TURNS = [Message(r, t) for r, t in (("user", "a"), ("assistant", "XY"), ("user", "b"), ("assistant", "ZW"))]


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    def tokenizer(source, **options):
        folder = write_tokenizer(tmp_path_factory.mktemp("tok"), **options)
        if source is not None:
            (folder / "chat_template.jinja").write_text(source, encoding="utf-8")
        return Tokenizer.load(folder)

    return tokenizer


@pytest.fixture(scope="module")
def chatml(make):
    return make(CHATML)


def trained(sample, tokenizer):
    return tokenizer.decode(sample.labels[sample.labels != IGNORE].tolist())


TEXTS = st.lists(
    st.one_of(st.sampled_from([*SPECIAL, "{{", "{%", "XY", "\n\n", " "]), st.text(max_size=4)), max_size=4
).map("".join)


@settings(max_examples=100, deadline=None)
@given(
    pairs=st.lists(st.tuples(TEXTS, TEXTS.filter(bool)), min_size=1, max_size=3),
    loss_scale=st.sampled_from(["default", "last_round", "all", "hermes", "react"]),
    system=st.sampled_from([None, "", "S"]),
)
def test_it_gives_what_our_template_of_the_same_text_gives(chatml, pairs, loss_scale, system):
    messages = [Message(r, t) for pair in pairs for r, t in zip(("user", "assistant"), pair, strict=True)]
    jinja, ours = load_template("jinja", chatml), get_template("chatml")
    mine = encode(jinja, chatml, messages, loss_scale=loss_scale, system=system)
    other = encode(ours, chatml, messages, loss_scale=loss_scale, system=system)
    assert chatml.decode(mine.ids.tolist()) == chatml.decode(other.ids.tolist())
    assert trained(mine, chatml) == trained(other, chatml)
    if loss_scale in ("default", "hermes", "react"):
        assert mine.ids.tolist() == other.ids.tolist()
    prompt = encode_prompt(jinja, chatml, messages[:-1], system=system)
    assert chatml.decode(prompt) == chatml.decode(encode_prompt(ours, chatml, messages[:-1], system=system))


def test_a_messages_own_loss(chatml):
    template = load_template("jinja", chatml)
    turns = [TURNS[0], Message("assistant", "XY", train=False), *TURNS[2:]]
    assert trained(encode(template, chatml, turns), chatml) == "ZW<|im_end|>\n"
    turns[1] = Message("assistant", "XY", loss_scale=0.5)
    sample = encode(template, chatml, turns, loss_scale="last_round")
    assert trained(sample, chatml) == "XY<|im_end|>\nZW<|im_end|>\n"
    assert sorted(set(sample.weights.tolist())) == [0.0, 0.5, 1.0]
    with pytest.raises(DataError, match="their loss differs"):
        encode(template, chatml, [TURNS[0], Message("assistant", "X"), Message("assistant", "Y", train=False)])


def test_calls_and_responses_in_the_form_templates_expect(make):
    source = (
        "{{ tools|tojson }}{% for m in messages %}|{{ m.role }}:{{ m.content }}"
        "{% if m.tool_calls %}{{ m.tool_calls|tojson }}{% endif %}{% endfor %}{% if add_generation_prompt %}|assistant:{% endif %}"
    )
    tokenizer = make(source)
    tool = {"type": "function", "function": {"name": "f"}}
    row = [
        TURNS[0],
        Message("assistant", "so"),
        Message("tool_call", '{"name": "f", "arguments": {"x": 1}}'),
        Message("tool_response", "r"),
        TURNS[3],
    ]
    sample = encode(load_template("jinja", tokenizer), tokenizer, Conversation(row, (json.dumps(tool),)))
    calls = [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]
    assert tokenizer.decode(sample.ids.tolist()) == (
        f"{json.dumps([tool])}|user:a|assistant:so{json.dumps(calls)}|tool:r|assistant:ZW"
    )
    assert trained(sample, tokenizer) == f"so{json.dumps(calls)}ZW"


@pytest.mark.parametrize(
    ("source", "turns", "why"),
    [
        (
            CHATML.replace("m.content", "(m.content if loop.last or m.role == 'user' else 'dropped')"),
            TURNS,
            "writes a reply differently once more",
        ),
        (
            CHATML.replace("assistant\\n' }}{% endif", "assistant\\nSure: ' }}{% endif"),
            TURNS,
            "what it writes to open a reply",
        ),
        (CHATML.replace("{% if add_generation_prompt %}", "{% if true %}"), TURNS, "opens a further reply"),
        ("{{ messages.__class__ }}", TURNS, "__class__"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", TURNS, "steps"),
        ("{{ raise_exception('roles must alternate') }}", TURNS, "roles must alternate"),
        ("{{ messages[9].content + 1 }}", TURNS, "has no element 9|undefined"),
        ("{% if %}", TURNS, "Expected an expression"),
    ],
)
def test_a_template_that_cannot_be_used_says_why(make, source, turns, why):
    tokenizer = make(source)
    template = load_template("jinja", tokenizer)
    with pytest.raises(DataError, match="chat template cannot") as caught:
        encode(template, tokenizer, turns)
    assert re.search(why, caught.value.why)
    assert "--template_backend swift" in caught.value.do
    assert isinstance(encode_many(template, tokenizer, [turns])[0], DataError)


@pytest.mark.parametrize(
    ("roles", "what"),
    [
        ("", "no message"),
        ("s", "no message"),
        ("u", "ends with a question"),
        ("uua", "second question"),
        ("usa", "system message"),
        ("ra", "follows no call"),
        ("ux", "unknown role"),
    ],
)
def test_bad_conversations(chatml, roles, what):
    turn = {"s": "system", "u": "user", "a": "assistant", "r": "tool_response", "x": "robot"}
    with pytest.raises(DataError, match=what):
        encode(load_template("jinja", chatml), chatml, [Message(turn[letter], "t") for letter in roles])


def test_a_model_without_a_template(make):
    with pytest.raises(UsageError, match="no chat template of its own"):
        load_template("jinja", make(None))
    with pytest.raises(UsageError, match="--agent_template hermes does not go with"):
        load_template("jinja", make(CHATML), agent_template="hermes")


def test_the_day_is_part_of_it_only_where_it_asks(make):
    day = datetime.date(2025, 3, 5)
    plain, dated = make(CHATML), make("{{ strftime_now('%d %b') }}{{ date_string }}" + CHATML)
    assert load_template("jinja", plain).day is None
    assert load_template("jinja", dated).day == datetime.date.today()
    text = dated.decode(encode_prompt(load_template("jinja", dated, date=day), dated, TURNS[:1]))
    assert text.startswith("05 Mar05 Mar 2025<|im_start|>")


def test_it_is_sent_to_other_processes_and_stops_at_the_end_of_sequence(chatml):
    template = load_template("jinja", chatml, enable_thinking=False)
    assert pickle.loads(pickle.dumps(template)) == template
    assert ("enable_thinking", False) in template.values
    assert stop_ids(template, chatml) == [chatml.token_id("<|im_end|>")]
    assert stop_strings(template, chatml) == []


def test_bos_stands_in_the_templates_own_text(make):
    tokenizer = make("{{ bos_token }}" + CHATML, bos="<s>", adds_bos=True)
    ids = encode(load_template("jinja", tokenizer), tokenizer, TURNS).ids.tolist()
    assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id
