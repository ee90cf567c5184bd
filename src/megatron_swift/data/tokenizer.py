"""Text to token ids and back, from a model's folder, on the `tokenizers` library alone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from megatron_swift.utils.errors import DataError
from megatron_swift.utils.files import TRACKER

# Files that transformers makes a tokenizer of. Without any of them it makes an empty one for some models.
_OTHERS = ("vocab.json", "vocab.txt", "merges.txt", "*.model", "*.tiktoken", "tekken.json")
_DEFINING = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


class Tokenizer:
    """A model's tokenizer, as its folder defines it. Texts are never truncated, padded or given extra tokens.

    folder                       : where it was read from.
    bos_token, eos_token         : texts of the special tokens, None where the folder names none.
    bos_token_id, eos_token_id   : their ids.
    pad_token_id                 : the padding token's id, else the end-of-sequence token's.
    adds_bos                     : True where the tokenizer itself puts a bos in front of a text.
    generation_eos_ids           : the ids on which generation_config.json (else config.json) stops, may be empty.
    chat_template                : the folder's Jinja chat template, None where it has none.
    """

    def __init__(self, backend: Backend, *, folder: Path, settings: dict[str, Any], generation: dict[str, Any]) -> None:
        """Use `Tokenizer.load`.

        settings   : tokenizer_config.json over special_tokens_map.json.
        generation : generation_config.json over config.json; used for the end of sequence only.
        """
        backend.no_truncation()  # some published tokenizer.json files carry a 512-token cut or a padding
        backend.no_padding()
        self._backend = backend
        self.folder = folder
        _add_missing_tokens(backend, settings, folder)
        self.generation_eos_ids = _id_list(generation.get("eos_token_id"))
        self.bos_token = _content(settings.get("bos_token"))
        self.bos_token_id = self._known_id(self.bos_token)
        self.eos_token = _content(settings.get("eos_token"))
        self.eos_token_id = self._known_id(self.eos_token)
        if self.eos_token_id is None and self.generation_eos_ids:
            self.eos_token_id = self.generation_eos_ids[0]
            self.eos_token = backend.id_to_token(self.eos_token_id)
        pad = self._known_id(_content(settings.get("pad_token")))
        self.pad_token_id = self.eos_token_id if pad is None else pad
        declared = settings.get("add_bos_token")
        if isinstance(declared, bool):
            self.adds_bos = declared and self.bos_token_id is not None
        else:
            self.adds_bos = self.bos_token_id is not None and self.bos_token_id in backend.encode("").ids
        self.chat_template = _chat_template(settings.get("chat_template"), folder)

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """The tokenizer of a model folder. DataError names the file that is missing or broken."""
        folder = Path(folder)
        settings = {**_read_json(folder / "special_tokens_map.json"), **_read_json(folder / "tokenizer_config.json")}
        config = _read_json(folder / "config.json")
        text_config = config.get("text_config")
        nested = text_config if isinstance(text_config, dict) else {}
        generation = {**nested, **config, **_read_json(folder / "generation_config.json")}
        path = folder / "tokenizer.json"
        if path.is_file():
            try:
                backend = Backend.from_file(str(path))
            except Exception as error:  # the library raises bare Exception for every fault of the file
                raise DataError(f"{path} cannot be read", why=str(error), do="copy it again from the model") from error
        else:
            backend = _convert(folder)
        return cls(backend, folder=folder, settings=settings, generation=generation)

    def encode(self, text: str) -> list[int]:
        """The text's ids; special tokens written in the text are recognised, nothing is added."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, on all cores and without tracking offsets."""
        return [item.ids for item in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """The text of the ids; incomplete characters at the ends show as U+FFFD."""
        return self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def token_id(self, text: str) -> int | None:
        """The id of the token that is written exactly so, None where there is none."""
        return self._backend.token_to_id(text)

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included. The model's embedding may have more rows."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    def fingerprint(self) -> str:
        """A hash that changes when the files that define the tokenizer do: 64 hexadecimal digits."""
        digest = hashlib.sha256()
        for name in _DEFINING:
            path = self.folder / name
            if path.is_file():
                digest.update(f"{name}\0{path.stat().st_size}\0".encode())
                digest.update(path.read_bytes())
        if not (self.folder / "tokenizer.json").is_file():
            digest.update(self._backend.to_str().encode())
        digest.update(repr((self.bos_token_id, self.eos_token_id, self.pad_token_id, self.adds_bos)).encode())
        return digest.hexdigest()

    def _known_id(self, token: str | None) -> int | None:
        return None if token is None else self._backend.token_to_id(token)


def _content(entry: Any) -> str | None:
    """The text of a token entry, which is a string or {"content": string}."""
    if isinstance(entry, dict):
        entry = entry.get("content")
    return entry if isinstance(entry, str) and entry else None


def _id_list(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (value,)


def _read_json(path: Path) -> dict[str, Any]:
    """The object in the file, {} where there is no file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise DataError(f"{path} is not valid JSON", why=str(error), do="copy it again from the model") from error
    if not isinstance(value, dict):
        raise DataError(f"{path} holds no JSON object", do="copy it again from the model")
    return value


def _add_missing_tokens(backend: Backend, settings: dict[str, Any], folder: Path) -> None:
    """Add the tokens that only tokenizer_config.json lists; DataError if they would get other ids than it says."""
    listed = settings.get("added_tokens_decoder") or {}
    for number, entry in sorted(((int(key), value) for key, value in listed.items()), key=lambda item: item[0]):
        text = _content(entry)
        if text is None or backend.token_to_id(text) is not None:
            continue
        flags = {key: bool(entry.get(key, False)) for key in ("single_word", "lstrip", "rstrip", "normalized")}
        token = AddedToken(text, special=bool(entry.get("special", False)), **flags)
        backend.add_tokens([token])
        if backend.token_to_id(text) != number:
            raise DataError(
                f"{folder}: tokenizer.json and tokenizer_config.json disagree about the token '{text}'",
                why=f"tokenizer_config.json gives it the id {number}, tokenizer.json leaves only "
                f"{backend.token_to_id(text)} free",
                do="copy both files again from one model",
            )


def _chat_template(entry: Any, folder: Path) -> str | None:
    """chat_template.jinja, else tokenizer_config.json's entry: a text, or a list of named ones ("default" first)."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    if isinstance(entry, list):
        named = {item["name"]: item["template"] for item in entry}
        entry = named.get("default", next(iter(named.values()), None))
    return entry if isinstance(entry, str) else None


def _convert(folder: Path) -> Backend:
    """The tokenizer of a folder without tokenizer.json, converted by transformers where that is installed."""
    what = f"{folder} has no tokenizer.json"
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder", do="give the folder of a model")
    if (folder / TRACKER).is_file():
        raise DataError(
            f"{folder} is a Megatron checkpoint, not a Hugging Face folder",
            do="give it as --load or --mcore_model, and the model's folder as --model",
        )
    if not any(next(folder.glob(pattern), None) for pattern in _OTHERS):
        raise DataError(
            what, why="nor any other tokenizer's file", do="copy it and tokenizer_config.json from the model"
        )
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise DataError(
            what, why="other tokenizer files need the package transformers", do="pip install transformers"
        ) from error
    try:
        backend = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False).backend_tokenizer
    except Exception as error:  # anything, from a missing package to a broken file
        raise DataError(
            what, why=f"and transformers cannot make one of the other files: {error}", do="copy it from the model"
        ) from error
    return backend
