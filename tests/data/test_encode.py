import json
import pickle
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizer import SPECIAL, write_tokenizer

from megatron_swift.data.encode import OverLength, encode, encode_many
from megatron_swift.data.loss_scale import NAMES
from megatron_swift.data.template import Template
from megatron_swift.data.templates import TEMPLATES, get_template
from megatron_swift.data.tokenizer import Tokenizer
from megatron_swift.data.types import IGNORE, Conversation, Message
from megatron_swift.utils.errors import DataError

CHATML, LLAMA3, GENERATION = TEMPLATES["chatml"], TEMPLATES["llama3"], TEMPLATES["generation"]
ROUNDS = [
    Message("system", "S"),
    *[Message(r, t) for r, t in zip(["user", "assistant"] * 3, ["a", "XY", "b", "ZW", "c", "PQ"], strict=True)],
]


@pytest.fixture(scope="module")
def bos_tokenizer(tmp_path_factory):
    return Tokenizer.load(write_tokenizer(tmp_path_factory.mktemp("tok"), bos="<s>", eos="</s>", adds_bos=True))


def trained(sample, tokenizer):
    return tokenizer.decode(sample.labels[sample.labels != IGNORE].tolist())


def test_exact_tokens_and_labels(tokenizer):
    start, end, user = (tokenizer.token_id(text) for text in ("<|im_start|>", "<|im_end|>", "user"))
    line, a, xy = tokenizer.token_id("Ċ"), tokenizer.token_id("a"), tokenizer.token_id("XY")
    assistant = [tokenizer.token_id(letter) for letter in "assistant"]
    prompt = [start, user, line, a, end, line, start, *assistant, line]
    sample = encode(CHATML, tokenizer, [Message("user", "a"), Message("assistant", "XY")])
    assert sample.ids.tolist() == [*prompt, xy, end, line]
    assert sample.labels.tolist() == [*[IGNORE] * len(prompt), xy, end, line]
    assert (sample.ids.dtype, sample.labels.dtype) == (np.int32, np.int32)


@pytest.mark.parametrize(
    ("loss_scale", "expected"),
    [
        ("default", "XY<|im_end|>\nZW<|im_end|>\nPQ<|im_end|>\n"),
        ("last_round", "PQ<|im_end|>\n"),
        ("all", None),
    ],
)
def test_loss_scale_of_behaviour_12_5(tokenizer, loss_scale, expected):
    sample = encode(CHATML, tokenizer, ROUNDS, loss_scale=loss_scale)
    assert trained(sample, tokenizer) == (expected or tokenizer.decode(sample.ids.tolist()))
    assert np.array_equal(sample.ids, encode(CHATML, tokenizer, ROUNDS).ids)


def test_llama_trains_every_end_but_not_the_next_opening(tokenizer):
    assert trained(encode(TEMPLATES["llama"], tokenizer, ROUNDS), tokenizer) == "XY</s>ZW</s>PQ</s>"
    assert trained(encode(LLAMA3, tokenizer, ROUNDS), tokenizer) == "XY<|eot_id|>ZW<|eot_id|>PQ<|eot_id|>"


def test_message_train_overrides_loss_scale(tokenizer):
    def with_train(*values):
        flags = iter(values)
        return [replace(m, train=next(flags)) if m.role == "assistant" else m for m in ROUNDS]

    one = encode(CHATML, tokenizer, with_train(None, False, None))
    assert trained(one, tokenizer) == "XY<|im_end|>\nPQ<|im_end|>\n"
    two = encode(CHATML, tokenizer, with_train(True, None, None), loss_scale="last_round")
    assert trained(two, tokenizer) == "XY<|im_end|>\nPQ<|im_end|>\n"
    three = encode(CHATML, tokenizer, with_train(None, None, False), loss_scale="all")
    assert "PQ" not in trained(three, tokenizer)
    assert trained(three, tokenizer).endswith("assistant\n")
    with pytest.raises(DataError, match="no trained token"):
        encode(CHATML, tokenizer, with_train(False, False, False))


def test_consecutive_replies_are_one_reply_and_keep_their_own_train(tokenizer):
    messages = [Message("user", "a"), Message("assistant", "X"), Message("assistant", "Y")]
    assert tokenizer.token_id("XY") in encode(CHATML, tokenizer, messages).ids  # joined before tokenising
    messages[1] = Message("assistant", "X", train=False)
    assert trained(encode(CHATML, tokenizer, messages), tokenizer) == "Y<|im_end|>\n"


def test_leading_reply_gets_an_empty_question(tokenizer):
    lone = encode(CHATML, tokenizer, [Message("assistant", "XY")])
    assert np.array_equal(lone.ids, encode(CHATML, tokenizer, [Message("user", ""), Message("assistant", "XY")]).ids)


def test_system_priority(tokenizer):
    template, turns = TEMPLATES["qwen"], ROUNDS[1:]

    def text(messages, **options):
        return tokenizer.decode(encode(template, tokenizer, messages, **options).ids.tolist())

    assert text(ROUNDS, system="other").startswith("<|im_start|>system\nS<|im_end|>\n")
    assert text(turns, system="other").startswith("<|im_start|>system\nother<|im_end|>\n")
    assert text(turns).startswith("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n")
    assert text(turns, system="").startswith("<|im_start|>user\n")
    assert text([Message("system", ""), *turns], system="other").startswith("<|im_start|>user\n")


def test_text_rows_for_pretraining(bos_tokenizer, tokenizer):
    row = [Message("assistant", "XY ZW")]
    sample = encode(GENERATION, bos_tokenizer, row, loss_scale="all")
    assert bos_tokenizer.decode(sample.ids.tolist()) == "<s>XY ZW</s>"
    assert np.array_equal(sample.ids, sample.labels)
    assert tokenizer.decode(encode(GENERATION, tokenizer, row).ids.tolist()) == "XY ZW<|im_end|>"
    with pytest.raises(DataError, match="no place for a system prompt"):
        encode(GENERATION, tokenizer, row, system="S")


def test_special_tokens_in_the_users_text_do_not_move_the_mask(tokenizer):
    query = "XY<|im_end|>\n<|im_start|>assistant\nZW<|im_end|>\n"
    sample = encode(CHATML, tokenizer, [Message("user", query), Message("assistant", "XY")])
    assert trained(sample, tokenizer) == "XY<|im_end|>\n"


def test_truncation_kinds(tokenizer):
    whole = encode(CHATML, tokenizer, ROUNDS)
    n = len(whole.ids)
    assert len(encode(CHATML, tokenizer, ROUNDS, max_length=n).ids) == n
    left = encode(CHATML, tokenizer, ROUNDS, max_length=n - 7, truncation="left")
    right = encode(CHATML, tokenizer, ROUNDS, max_length=n - 7, truncation="right")
    assert np.array_equal(left.ids, whole.ids[7:])
    assert np.array_equal(left.labels, whole.labels[7:])
    assert np.array_equal(right.ids, whole.ids[: n - 7])
    assert np.array_equal(right.labels, whole.labels[: n - 7])
    with pytest.raises(OverLength, match=f"{n} tokens, more than max_length {n - 1}") as caught:
        encode(CHATML, tokenizer, ROUNDS, max_length=n - 1)
    assert isinstance(pickle.loads(pickle.dumps(caught.value)), OverLength)
    with pytest.raises(DataError, match="more than max_length") as caught:
        encode(CHATML, tokenizer, ROUNDS, max_length=n - 1, truncation="raise")
    assert not isinstance(caught.value, OverLength)


def test_split_cuts_a_long_row_into_several(bos_tokenizer):
    text = "XY ZW " * 20
    whole = encode(GENERATION, bos_tokenizer, [Message("assistant", text)], loss_scale="all")
    rows = [[Message("assistant", "XY")], [Message("assistant", text)]]
    short, pieces = encode_many(GENERATION, bos_tokenizer, rows, loss_scale="all", max_length=16, truncation="split")
    assert len(short) == 1 and len(pieces) == -(-len(whole.ids) // 16)
    assert np.array_equal(np.concatenate([piece.ids for piece in pieces]), whole.ids)
    assert [len(piece.ids) for piece in pieces[:-1]] == [16] * (len(pieces) - 1)
    assert all(np.array_equal(piece.ids, piece.labels) for piece in pieces)


def test_split_leaves_out_pieces_without_a_trained_token(tokenizer):
    whole = encode(CHATML, tokenizer, ROUNDS)
    (pieces,) = encode_many(CHATML, tokenizer, [ROUNDS], max_length=8, truncation="split")
    starts = [at for at in range(0, len(whole.ids), 8) if (whole.labels[at + 1 : at + 8] != IGNORE).any()]
    assert 0 < len(starts) < -(-len(whole.ids) // 8)
    for piece, at in zip(pieces, starts, strict=True):
        assert np.array_equal(piece.ids, whole.ids[at : at + 8])
        assert np.array_equal(piece.labels, whole.labels[at : at + 8])
    (none,) = encode_many(CHATML, tokenizer, [ROUNDS], max_length=1, truncation="split")
    assert isinstance(none, DataError) and "no trained token after cutting" in none.what


def test_no_trained_token_left_is_an_error(tokenizer):
    with pytest.raises(DataError, match="no trained token after cutting"):
        encode(CHATML, tokenizer, ROUNDS, max_length=5, truncation="right")
    with pytest.raises(
        DataError, match="no trained token"
    ):  # the one label left is on the first token: never predicted
        encode(CHATML, tokenizer, ROUNDS, max_length=1, truncation="left")


@pytest.mark.parametrize(
    ("roles", "what"),
    [
        ("", "no message"),
        ("s", "only a system message"),
        ("u", "ends with a question"),
        ("uau", r"ends with a question \(message 3\)"),
        ("uua", "message 2 is a second question"),
        ("ssua", "message 2 is a system message"),
        ("uasua", "message 3 is a system message"),
        ("ue", "reply of round 1 is empty"),
        ("ueua", "reply of round 1 is empty"),
        ("uxa", "unknown role 'robot'"),
        ("uta", "message 2, a tool_call, has no name or no arguments"),
        ("tua", "message 1 is a tool_call that answers no question"),
        ("ura", "message 2 is a tool_response that follows no call"),
        ("r", "message 1 is a tool_response that follows no call"),
    ],
)
def test_bad_conversations(tokenizer, roles, what):
    turn = {
        "s": Message("system", "S"),
        "u": Message("user", "q"),
        "a": Message("assistant", "r"),
        "e": Message("assistant", ""),
        "x": Message("robot", "?"),
        "t": Message("tool_call", "{}"),
        "r": Message("tool_response", "42"),
    }
    messages = [turn[letter] for letter in roles]
    with pytest.raises(DataError, match=what):
        encode(CHATML, tokenizer, messages)
    good = [turn["u"], turn["a"]]
    first, bad, last = encode_many(CHATML, tokenizer, [good, messages, good])
    assert isinstance(bad, DataError)
    assert np.array_equal(first[0].ids, last[0].ids)


def test_a_text_that_is_not_unicode_spoils_only_its_row(tokenizer):
    good = [Message("user", "a"), Message("assistant", "XY")]
    outcomes = encode_many(CHATML, tokenizer, [good, [Message("user", "\ud800"), good[1]], good])
    assert isinstance(outcomes[1], DataError)
    assert "Unicode" in outcomes[1].what
    assert np.array_equal(outcomes[0][0].ids, outcomes[2][0].ids)


def test_missing_eos_is_said(tmp_path):
    folder = write_tokenizer(tmp_path, eos="")
    with pytest.raises(DataError, match="no end-of-sequence token"):
        encode(GENERATION, Tokenizer.load(folder), [Message("assistant", "XY")])


TEXTS = st.lists(
    st.one_of(st.sampled_from([*SPECIAL, "{query}", "{system}", "XY", "\n\n", " "]), st.text(max_size=5)), max_size=4
).map("".join)
TURNS = st.tuples(
    st.sampled_from(["system", "user", "user", "assistant", "assistant", "tool_call", "robot"]),
    TEXTS,
    st.sampled_from([None, None, True, False]),
).map(lambda turn: Message(*turn))
PAIRS = st.lists(st.tuples(TEXTS, TEXTS.filter(bool)), min_size=1, max_size=3).map(
    lambda pairs: [Message(r, t) for pair in pairs for r, t in zip(("user", "assistant"), pair, strict=True)]
)


@settings(max_examples=150, deadline=None)
@given(
    conversations=st.lists(st.one_of(PAIRS, st.lists(TURNS, max_size=5)), max_size=6),
    name=st.sampled_from(sorted(TEMPLATES)),
    loss_scale=st.sampled_from(NAMES),
    truncation=st.sampled_from(["delete", "left", "right", "raise"]),
    max_length=st.one_of(st.none(), st.integers(1, 120)),
)
def test_batch_equals_single(bos_tokenizer, conversations, name, loss_scale, truncation, max_length):
    options = {"max_length": max_length, "truncation": truncation, "loss_scale": loss_scale}
    template = get_template(name)
    outcomes = encode_many(template, bos_tokenizer, conversations, **options)
    assert len(outcomes) == len(conversations)
    for messages, outcome in zip(conversations, outcomes, strict=True):
        if isinstance(outcome, DataError):
            with pytest.raises(type(outcome)) as caught:
                encode(template, bos_tokenizer, messages, **options)
            assert caught.value.block() == outcome.block()
        else:
            single = encode(template, bos_tokenizer, messages, **options)
            (outcome,) = outcome
            assert np.array_equal(outcome.ids, single.ids)
            assert np.array_equal(outcome.labels, single.labels)
            assert (outcome.weights is None) == (single.weights is None)
            assert outcome.weights is None or np.array_equal(outcome.weights, single.weights)
            assert outcome.ids.dtype == outcome.labels.dtype == np.int32


def expected_text(template: Template, messages) -> str:
    """The conversation by plain concatenation, for templates without id places."""
    text, rounds = template.prefix, len(messages) // 2
    for number in range(rounds):
        before, after = template.prompt.split("{query}")
        reply = messages[2 * number + 1].content
        text += before + messages[2 * number].content + after
        text += reply if reply.startswith("<think>") else template.empty_think + reply
        text += template.separator if number < rounds - 1 else template.suffix
    return text


@settings(max_examples=150, deadline=None)
@given(messages=PAIRS, name=st.sampled_from(["chatml", "qwen3", "llama3", "deepseek_r1"]))
def test_decoding_gives_the_text_back(tokenizer, messages, name):
    template = TEMPLATES[name]
    sample = encode(template, tokenizer, messages)
    assert tokenizer.decode(sample.ids.tolist()) == expected_text(template, messages)
    replies = "".join(message.content + template.suffix for message in messages[1::2])
    assert trained(sample, tokenizer) == replies


CALLS = st.dictionaries(st.sampled_from(["a", "b"]), st.one_of(st.integers(), st.text(max_size=4)), max_size=2)
TOOL_STEPS = st.lists(st.tuples(CALLS, st.lists(TEXTS, min_size=1, max_size=2)), max_size=2)
QUESTIONS = st.lists(st.tuples(TEXTS, TOOL_STEPS, TEXTS.filter(bool)), min_size=1, max_size=3)


@settings(max_examples=150, deadline=None)
@given(questions=QUESTIONS, agent=st.sampled_from(["hermes", "llama3"]), system=st.sampled_from([None, "", "S"]))
def test_any_legal_conversation_trains_exactly_its_replies_and_calls(tokenizer, questions, agent, system):
    template = replace(LLAMA3 if agent == "llama3" else CHATML, agent_template=agent)
    messages, replies = [] if system is None else [Message("system", system)], []
    for question, steps, answer in questions:
        messages.append(Message("user", question))
        for arguments, responses in steps:
            call = {"name": "f", "arguments": arguments}
            messages.append(Message("tool_call", json.dumps(call)))
            messages += [Message("tool_response", response) for response in responses]
            if agent == "hermes":
                replies.append(f"<tool_call>\n{json.dumps(call, ensure_ascii=False)}\n</tool_call>")
            else:
                replies.append(json.dumps({"name": "f", "parameters": arguments}, ensure_ascii=False))
        messages.append(Message("assistant", answer))
        replies.append(answer)
    sample = encode(template, tokenizer, Conversation(messages, ('{"name": "f"}',)))
    assert trained(sample, tokenizer) == "".join(reply + template.suffix for reply in replies)
    text = tokenizer.decode(sample.ids.tolist())
    at = 0
    for message in messages:  # every text is there, in order
        if message.role in ("user", "tool_response", "assistant"):
            at = text.index(message.content, at) + len(message.content)
