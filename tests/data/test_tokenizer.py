import builtins
import datetime
import json
import os
import pickle
from pathlib import Path

import pytest
from tiny_tokenizer import write_tokenizer

from megatron_swift.data.encode import encode, encode_prompt
from megatron_swift.data.templates import get_template
from megatron_swift.data.tokenizer import Tokenizer
from megatron_swift.data.types import Message
from megatron_swift.utils.errors import DataError

PUBLISHED = Path(os.environ.get("MEGATRON_SWIFT_TOKENIZERS", "/tmp/tokenizers"))


def edit(path, **changes):
    """Set keys of a JSON file; None removes one."""
    value = {**(json.loads(path.read_text()) if path.exists() else {}), **changes}
    path.write_text(json.dumps({key: item for key, item in value.items() if item is not None}))


@pytest.fixture
def folder(tmp_path):
    return write_tokenizer(tmp_path / "model", bos="<s>")


def test_special_tokens_in_text_are_recognised_and_nothing_is_added(tmp_path):
    tokenizer = Tokenizer.load(write_tokenizer(tmp_path, bos="<s>", adds_bos=True))
    ids = tokenizer.encode("XY<|im_end|>")
    assert ids == [tokenizer.token_id("XY"), tokenizer.token_id("<|im_end|>")]
    assert tokenizer.adds_bos
    assert tokenizer.encode_batch(["XY<|im_end|>", "", "a"]) == [ids, [], tokenizer.encode("a")]
    assert tokenizer.decode(ids) == "XY<|im_end|>"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "XY"
    assert tokenizer.token_id("no such token") is None


def test_named_tokens(folder):
    tokenizer = Tokenizer.load(folder)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "<|im_end|>")  # a string and a dict with "content"
    assert tokenizer.bos_token_id == tokenizer.token_id("<s>")
    assert tokenizer.eos_token_id == tokenizer.token_id("<|im_end|>")
    assert tokenizer.pad_token_id == tokenizer.token_id("<|endoftext|>")
    assert not tokenizer.adds_bos
    assert tokenizer.vocab_size == 256 + 7 + 13
    assert tokenizer.chat_template is None
    edit(folder / "tokenizer_config.json", pad_token=None, add_bos_token=True)
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    assert tokenizer.adds_bos


def test_eos_from_the_other_files(folder):
    edit(folder / "tokenizer_config.json", eos_token=None)
    assert Tokenizer.load(folder).eos_token_id is None
    edit(folder / "config.json", eos_token_id=5)
    assert Tokenizer.load(folder).eos_token_id == 5
    edit(folder / "generation_config.json", eos_token_id=[7, 8])
    assert Tokenizer.load(folder).eos_token_id == 7
    assert Tokenizer.load(folder).generation_eos_ids == (7, 8)
    edit(folder / "special_tokens_map.json", eos_token={"content": "</s>"})
    assert Tokenizer.load(folder).eos_token == "</s>"


def test_chat_template_sources(folder):
    config = folder / "tokenizer_config.json"
    edit(config, chat_template="one")
    assert Tokenizer.load(folder).chat_template == "one"
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "two"}]
    edit(config, chat_template=named)
    assert Tokenizer.load(folder).chat_template == "two"
    (folder / "chat_template.jinja").write_text("three")
    assert Tokenizer.load(folder).chat_template == "three"


def test_truncation_and_padding_of_the_file_are_ignored(folder):
    edit(
        folder / "tokenizer.json",
        truncation={"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0},
        padding={
            "strategy": {"Fixed": 9},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "!",
        },
    )
    assert [len(ids) for ids in Tokenizer.load(folder).encode_batch(["abcdef", "a"])] == [6, 1]


def test_tokens_that_only_the_config_lists(folder):
    size = Tokenizer.load(folder).vocab_size
    listed = {str(size): {"content": "<new>", "special": True}}
    edit(folder / "tokenizer_config.json", added_tokens_decoder=listed)
    assert Tokenizer.load(folder).encode("a<new>")[-1] == size
    listed = {str(size + 3): {"content": "<new>", "special": True}}
    edit(folder / "tokenizer_config.json", added_tokens_decoder=listed)
    with pytest.raises(DataError, match="disagree about the token '<new>'"):
        Tokenizer.load(folder)


def test_fingerprint_follows_the_defining_files(folder):
    first = Tokenizer.load(folder).fingerprint()
    assert Tokenizer.load(folder).fingerprint() == first
    edit(folder / "config.json", hidden_size=8)
    assert Tokenizer.load(folder).fingerprint() == first
    edit(folder / "tokenizer_config.json", bos_token=None)
    assert Tokenizer.load(folder).fingerprint() != first


def test_survives_pickling_to_workers(folder):
    tokenizer = Tokenizer.load(folder)
    again = pickle.loads(pickle.dumps(tokenizer))
    assert again.encode("XY 你好") == tokenizer.encode("XY 你好")
    assert again.fingerprint() == tokenizer.fingerprint()


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", ['{"a": ', "[1]"])
def test_broken_files_are_named(folder, name, content):
    (folder / name).write_text(content)
    with pytest.raises(DataError, match=name):
        Tokenizer.load(folder)


def test_missing_tokenizer_json(tmp_path, monkeypatch):
    real = builtins.__import__

    def without_transformers(name, *args, **options):
        if name == "transformers":
            raise ImportError(name)
        return real(name, *args, **options)

    with pytest.raises(DataError, match="is not a folder"):
        Tokenizer.load(tmp_path / "nowhere")
    monkeypatch.setattr(builtins, "__import__", without_transformers)
    (tmp_path / "vocab.json").write_text("{}")  # there is something to convert
    with pytest.raises(DataError, match=r"has no tokenizer\.json") as caught:
        Tokenizer.load(tmp_path)
    assert caught.value.do == "pip install transformers"


def test_folder_without_tokenizer_json_is_converted(folder):
    pytest.importorskip("transformers")
    expected = Tokenizer.load(folder).encode("user XY 你好<|im_end|>")
    model = json.loads((folder / "tokenizer.json").read_text())
    (folder / "vocab.json").write_text(json.dumps(model["model"]["vocab"]))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in model["model"]["merges"]))
    added = {str(token.pop("id")): token for token in model["added_tokens"]}
    config = folder / "tokenizer_config.json"
    edit(config, tokenizer_class="GPT2Tokenizer", added_tokens_decoder=added, eos_token="<|im_end|>")
    (folder / "tokenizer.json").unlink()
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.encode("user XY 你好<|im_end|>") == expected
    assert len(tokenizer.fingerprint()) == 64


def published(name):
    """Our tokenizer and transformers' of a published one; the test is skipped where the folder is absent."""
    if not (PUBLISHED / name / "tokenizer.json").is_file():
        pytest.skip(f"no {PUBLISHED / name}: bash ../shared/assets/get_tokenizers.sh {PUBLISHED}")
    transformers = pytest.importorskip("transformers")
    return Tokenizer.load(PUBLISHED / name), transformers.AutoTokenizer.from_pretrained(PUBLISHED / name)


NAMES = ["Qwen2.5-Instruct", "Qwen3", "Llama-3-Instruct", "Llama-3.1-Instruct", "DeepSeek-V3"]
NAMES += ["DeepSeek-R1-Distill-Qwen", "DeepSeek-R1-Distill-Llama"]
TALK = [
    {"role": "user", "content": "What's 2+2? 你好 😀"},
    {"role": "assistant", "content": "4.\n\n好的 `x = 1`"},
    {"role": "user", "content": "And\t3*3?"},
    {"role": "assistant", "content": "9"},
]


@pytest.mark.shared
@pytest.mark.parametrize("name", NAMES)
def test_published_ids_equal_transformers(name):
    ours, theirs = published(name)
    texts = ["Hello  world\n\n it's 12345 ÄÖ 你好，世界 😀\r\n\tdef f(x):", "<|im_start|>x<|im_end|>\n<think>\n", ""]
    for text in texts:
        ids = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text) == ids
        assert ours.decode(ids) == theirs.decode(ids, clean_up_tokenization_spaces=False)
    assert (ours.bos_token_id, ours.eos_token_id) == (theirs.bos_token_id, theirs.eos_token_id)
    if name != "DeepSeek-V3":  # declares add_bos_token; get_tokenizers.sh replaced the class that heeds it
        assert ours.adds_bos == (theirs.bos_token_id is not None and theirs.bos_token_id in theirs.encode("a"))
    assert ours.vocab_size == len(theirs)


@pytest.mark.shared
@pytest.mark.parametrize(
    ("name", "template", "system"),
    [
        ("Qwen2.5-Instruct", "qwen2_5", None),
        ("Qwen2.5-Instruct", "chatml", "Be brief."),
        ("Qwen3", "qwen3", None),
        ("Qwen3", "qwen3", "Be brief."),
        ("Llama-3-Instruct", "llama3", None),
        ("Llama-3.1-Instruct", "llama3_2", None),
        ("Llama-3.1-Instruct", "llama3_2", "Be brief."),
        ("DeepSeek-R1-Distill-Qwen", "deepseek_r1", None),
        ("DeepSeek-R1-Distill-Llama", "deepseek_r1", "Be brief."),
    ],
)
def test_published_chat_template_gives_the_same_ids(name, template, system):
    ours, theirs = published(name)
    chosen = get_template(template, date=datetime.date(2024, 7, 26))  # the date that Llama 3.1's own template writes
    rows = TALK if system is None else [{"role": "system", "content": system}, *TALK]
    messages = [Message(**row) for row in rows]

    def rendered(part, **options):
        return theirs.apply_chat_template(part, tokenize=True, return_dict=False, **options)

    prompt = encode_prompt(chosen, ours, messages[:-1])
    assert prompt == rendered(rows[:-1], add_generation_prompt=True)
    if template != "qwen3":  # Qwen3's own template writes an empty thinking block before the last reply
        ids = encode(chosen, ours, messages).ids.tolist()
        assert rendered(rows)[: len(ids)] == ids  # Llama 3's own template opens one more reply, asked or not


def test_a_config_alone_is_no_tokenizer(tmp_path):
    """transformers makes an empty one of a Qwen config, with which every row would be at fault."""
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
    with pytest.raises(DataError, match=r"has no tokenizer\.json") as caught:
        Tokenizer.load(tmp_path)
    assert "copy it" in caught.value.do
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("3")
    with pytest.raises(DataError, match="is a Megatron checkpoint") as caught:
        Tokenizer.load(tmp_path)
    assert "--load" in caught.value.do
