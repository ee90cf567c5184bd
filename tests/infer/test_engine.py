"""Generation against transformers', batches against single prompts, and the limits of a prompt."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from load_decoders import GREEDY, load

from megatron_swift.data.encode import OverLength
from megatron_swift.data.templates import get_template
from megatron_swift.data.tokenizer import Tokenizer
from megatron_swift.data.types import Message
from megatron_swift.infer.engine import Engine, EngineOptions
from megatron_swift.infer.sampling import Sampling
from megatron_swift.testing import make_tiny_model
from megatron_swift.utils.errors import DataError

SMOLLM2 = Path("/tmp/smollm2")
QUESTIONS = ["Who are you?", "What is the point of it all, and can they say when?", "好"]
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


def ask(engine: Engine, texts=QUESTIONS) -> list:
    return [engine.begin([Message("user", text)], number=number) for number, text in enumerate(texts)]


def same_as_transformers(folder: Path, penalty: float, tokens: int) -> None:
    transformers = pytest.importorskip("transformers")
    options = EngineOptions(sampling=Sampling(repetition_penalty=penalty), max_new_tokens=tokens)
    engine = Engine(load(folder), Tokenizer.load(folder), get_template("chatml"), options)
    answers = ask(engine)
    engine.run(answers)
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for answer in answers:
        prompt = torch.tensor([answer.prompt])
        out = reference.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            repetition_penalty=penalty,
            max_new_tokens=tokens,
            eos_token_id=sorted(engine.stops.ids),
            pad_token_id=0,
        )[0, prompt.shape[1] :].tolist()
        assert answer.num_tokens == len(out)
        assert answer.ids == [token for token in out if token not in engine.stops.ids]


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
@pytest.mark.parametrize(("tied", "config", "penalty"), [(True, {}, 1.3), (False, {"rope_scaling": LLAMA3_ROPE}, 1.0)])
def test_greedy_equals_transformers(tmp_path, family, tied, config, penalty):
    same_as_transformers(make_tiny_model(tmp_path, family=family, tied=tied, **config), penalty, 30)


@pytest.mark.slow
@pytest.mark.skipif(not SMOLLM2.is_dir(), reason=f"{SMOLLM2} is absent")
def test_greedy_equals_transformers_on_smollm2():
    same_as_transformers(SMOLLM2, 1.1, 24)


@pytest.mark.parametrize(
    "sampling", [GREEDY, Sampling(temperature=1.5, top_k=40, top_p=0.95), Sampling(1.0, 0, 1.0, repetition_penalty=1.5)]
)
def test_batch_equals_one_by_one(make_engine, sampling):
    engine = make_engine(sampling=sampling, max_new_tokens=40, stop_words=("t",))
    together, alone = ask(engine), ask(engine)
    engine.run(together)
    for answer in alone:
        engine.run([answer])
    assert [answer.ids for answer in together] == [answer.ids for answer in alone]
    assert len({answer.num_tokens for answer in together}) > 1 or sampling is GREEDY  # some ended early


def test_seed(make_engine):
    texts = []
    for seed in (1, 1, 2):
        answers = ask(make_engine(sampling=Sampling(temperature=1.0), seed=seed, max_new_tokens=12), ["a", "a"])
        for answer in answers:
            "".join(make_engine(sampling=Sampling(temperature=1.0), seed=seed).stream(answer))
        texts.append([answer.ids for answer in answers])
    assert texts[0] == texts[1] != texts[2]
    assert texts[0][0] != texts[0][1]  # two answers to one question differ


def test_streamed_pieces_are_the_answer(make_engine):
    engine = make_engine(max_new_tokens=30, response_prefix="So: ")
    streamed, whole = ask(engine, ["Hello"])[0], ask(engine, ["Hello"])[0]
    pieces = list(engine.stream(streamed))
    engine.run([whole])
    assert "".join(pieces) == streamed.text == whole.text
    assert streamed.text.startswith("So: ") and streamed.finish == "length"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_types(tiny, tokenizer, dtype):
    engine = Engine(
        load(tiny, dtype), tokenizer, get_template("chatml"), EngineOptions(sampling=GREEDY, max_new_tokens=8)
    )
    answers = ask(engine)
    engine.run(answers)
    assert [answer.num_tokens for answer in answers] == [8, 8, 8]


def test_limits(make_engine, caplog):
    prompt = len(ask(make_engine(), ["Hi"])[0].prompt)
    assert ask(make_engine(), ["Hi"])[0].limit == 512 - prompt
    with caplog.at_level(logging.WARNING, "megatron_swift"):
        answers = ask(make_engine(max_new_tokens=600), ["Hi", "Hi"])
    assert [answer.limit for answer in answers] == [512 - prompt] * 2
    assert [record.getMessage()[:16] for record in caplog.records] == ["--max_new_tokens"]


def test_answers_up_to_the_last_position(make_engine):
    answer = ask(make_engine(), ["Hi " * 160])[0]
    assert 0 < answer.limit < 40
    make_engine().run([answer])
    assert answer.finish and answer.num_tokens <= answer.limit


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({}, DataError, "512 positions"),
        ({"max_length": 100}, DataError, "--max_length 100"),
        ({"max_length": 100, "truncation": "raise"}, DataError, "--max_length 100"),
        ({"max_length": 100, "truncation": "delete"}, OverLength, "--max_length 100"),
    ],
)
def test_long_prompts(make_engine, options, error, words):
    with pytest.raises(error, match=words):
        ask(make_engine(**options), ["x " * 600])


def test_cut_prompts(make_engine):
    whole = make_engine()
    ids = ask(whole, ["Who is it?"])[0].prompt
    for truncation, expected in (("left", ids[-9:]), ("right", ids[:9])):
        assert ask(make_engine(max_length=9, truncation=truncation), ["Who is it?"])[0].prompt == expected


def test_text_continuation(make_engine, tokenizer):
    answer = make_engine("generation", max_new_tokens=5).begin([Message("user", "Once upon")], number=0)
    assert answer.prompt == tokenizer.encode("Once upon")
