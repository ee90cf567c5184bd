"""For tests: a tiny random model as a Hugging Face folder, and ranks as forks of one process. No network, no download."""

from __future__ import annotations

import contextlib
import gc
import json
import multiprocessing
import os
import random
import signal
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from megatron_swift.checkpoint.weights import TORCH_DTYPES

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)
_ARCHITECTURES = {
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "llama": "LlamaForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "mixtral": "MixtralForCausalLM",
}
_EXPERTS = {"num_experts_per_tok": 2, "router_aux_loss_coef": 0.001}
_QWEN_EXPERTS = _EXPERTS | {
    "num_experts": 4,
    "moe_intermediate_size": 24,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
_CONFIGS: dict[str, dict[str, Any]] = {
    "qwen2": {"use_sliding_window": False},
    "qwen3": {"use_sliding_window": False, "head_dim": 32, "attention_bias": False},
    "llama": {"attention_bias": False, "mlp_bias": False},
    "qwen2_moe": {"use_sliding_window": False, "shared_expert_intermediate_size": 40, "norm_topk_prob": False}
    | _QWEN_EXPERTS,
    "qwen3_moe": {"use_sliding_window": False, "head_dim": 32, "attention_bias": False, "norm_topk_prob": True}
    | _QWEN_EXPERTS,
    "mixtral": {"sliding_window": None, "num_local_experts": 4} | _EXPERTS,
}
_WORDS = "the of and to in is you that it for was are with as his they be at one have this from what were we when your can said"


def make_tiny_model(
    folder: Path,
    *,
    family: str = "qwen2",
    tied: bool = True,
    layers: int = 2,
    vocab_size: int = 451,
    dtype: str = "float32",
    seed: int = 0,
    **config: object,
) -> Path:
    """Write a complete random model into `folder` (created if need be) and return it; the same arguments give the same bytes.

    family     : qwen2 (biases on q, k, v), qwen3 (q/k norms, head size 32), llama, or with 4 experts qwen2_moe (a shared one besides),
                 qwen3_moe or mixtral. The model's own chat template is ChatML.
    vocab_size : rows of the embedding. The tokenizer has fewer tokens: bytes, some English words, SPECIAL_TOKENS last.
    dtype      : float32, bfloat16 or float16, of the stored weights.
    config     : entries of config.json to change or add, such as hidden_size, rope_theta or rope_scaling.
    Norm weights and biases are random too: with ones and zeros a wrong mapping would go unnoticed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokens = _write_tokenizer(folder, vocab_size)
    hf: dict[str, Any] = {
        "architectures": [_ARCHITECTURES[family]],
        "model_type": family,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": vocab_size,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": tied,
        "torch_dtype": dtype,
        "bos_token_id": tokens["<|endoftext|>"],
        "eos_token_id": tokens["<|im_end|>"],
        **_CONFIGS[family],
        **config,
    }
    _write(folder / "config.json", hf)
    stops = [tokens["<|im_end|>"], tokens["<|endoftext|>"]]
    _write(folder / "generation_config.json", {"eos_token_id": stops, "pad_token_id": tokens["<|endoftext|>"]})
    weights = _weights(hf, torch.Generator().manual_seed(seed))
    stored = {name: weight.to(TORCH_DTYPES[dtype]) for name, weight in weights.items()}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_tokenizer(folder: Path, vocab_size: int) -> dict[str, int]:
    """Byte-level BPE whose merges spell the commonest words; returns the special tokens' ids."""
    vocab = {token: number for number, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges: list[tuple[str, str]] = []
    for word in _WORDS.split():
        left = "Ġ"
        for letter in word:
            if left + letter not in vocab and len(vocab) + len(SPECIAL_TOKENS) < vocab_size:
                vocab[left + letter] = len(vocab)
                merges.append((left, letter))
            left += letter
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL_TOKENS])
    assert backend.get_vocab_size() <= vocab_size, "vocab_size is too small for the bytes and special tokens"
    backend.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    _write(folder / "tokenizer_config.json", settings)
    return {text: number for text, number in backend.get_vocab().items() if text in SPECIAL_TOKENS}


def _weights(hf: dict[str, Any], generator: torch.Generator) -> dict[str, Tensor]:
    """Random float32 weights under transformers' names."""
    hidden, heads, groups = (hf[key] for key in ("hidden_size", "num_attention_heads", "num_key_value_heads"))
    head_dim = hf.get("head_dim") or hidden // heads
    weights: dict[str, Tensor] = {}

    def matrix(name: str, rows: int, columns: int, scale: float = 0.15) -> None:
        weights[f"{name}.weight"] = torch.randn(rows, columns, generator=generator) * scale

    def norm(name: str, size: int) -> None:
        weights[f"{name}.weight"] = 1 + 0.3 * torch.randn(size, generator=generator)

    matrix("model.embed_tokens", hf["vocab_size"], hidden)
    for layer in range(hf["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        for kind, count in (("q", heads), ("k", groups), ("v", groups)):
            matrix(f"{at}.self_attn.{kind}_proj", count * head_dim, hidden)
            if hf["model_type"].startswith("qwen2"):
                bias = torch.randn(count * head_dim, generator=generator) * 0.3
                weights[f"{at}.self_attn.{kind}_proj.bias"] = bias
            if hf["model_type"].startswith("qwen3") and kind in "qk":
                norm(f"{at}.self_attn.{kind}_norm", head_dim)
        matrix(f"{at}.self_attn.o_proj", hidden, heads * head_dim)
        _mlp(hf, layer, matrix)
        norm(f"{at}.input_layernorm", hidden)
        norm(f"{at}.post_attention_layernorm", hidden)
    norm("model.norm", hidden)
    if not hf["tie_word_embeddings"]:
        matrix("lm_head", hf["vocab_size"], hidden)
    return weights


def _mlp(hf: dict[str, Any], layer: int, matrix: Callable[..., None]) -> None:
    """The dense MLP of a layer, or its experts."""
    hidden, at = hf["hidden_size"], f"model.layers.{layer}.mlp"

    def swiglu(at: str, inner: int, names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")) -> None:
        gate, up, down = names
        matrix(f"{at}.{gate}", inner, hidden)
        matrix(f"{at}.{up}", inner, hidden)
        matrix(f"{at}.{down}", hidden, inner)

    if "num_local_experts" in hf:
        at = f"model.layers.{layer}.block_sparse_moe"
        matrix(f"{at}.gate", hf["num_local_experts"], hidden, 0.5)
        for expert in range(hf["num_local_experts"]):
            swiglu(f"{at}.experts.{expert}", hf["intermediate_size"], ("w1", "w3", "w2"))
    elif "num_experts" not in hf or layer in hf["mlp_only_layers"] or (layer + 1) % hf["decoder_sparse_step"]:
        swiglu(at, hf["intermediate_size"])
    else:
        matrix(f"{at}.gate", hf["num_experts"], hidden, 0.5)
        for expert in range(hf["num_experts"]):
            swiglu(f"{at}.experts.{expert}", hf["moe_intermediate_size"])
        if hf.get("shared_expert_intermediate_size"):
            swiglu(f"{at}.shared_expert", hf["shared_expert_intermediate_size"])
            matrix(f"{at}.shared_expert_gate", 1, hidden)


def run_ranks(function: Callable[..., Any], num_ranks: int, *args: Any, timeout: float = 120.0) -> list[Any]:
    """Call function(rank, *args) on `num_ranks` gloo ranks and return their results in rank order.

    The ranks are forks of this process, which has imported torch: 0.1 to 0.5 s instead of seconds. Each finds torchrun's environment
    variables, so that `parallel.mesh.start` works as in a real run. The first failure ends all of them and raises AssertionError with
    that rank's traceback. Results must be picklable.
    """
    context = multiprocessing.get_context("fork")
    pairs = [context.Pipe(duplex=False) for _ in range(num_ranks)]
    held = context.Pipe(duplex=False)
    port = free_port()
    senders = [sender for _, sender in pairs]
    processes = [
        context.Process(target=_rank_main, args=(rank, num_ranks, port, senders, held, function, args))
        for rank in range(num_ranks)
    ]
    for process in processes:
        process.start()
    for _, sender in pairs:
        sender.close()
    try:
        return _collect([receiver for receiver, _ in pairs], timeout)
    finally:
        for process in processes:
            if process.is_alive() and process.pid:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)
            process.join()
        for end in (*held, *(receiver for receiver, _ in pairs)):
            end.close()


def free_port() -> int:
    """A port that nobody listens on, from below those that Linux gives to whoever asks for any: before a rank takes it, no other program will."""
    import socket

    while True:
        port = random.SystemRandom().randrange(10_000, 32_768)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def _rank_main(
    rank: int,
    world: int,
    port: int,
    senders: Sequence[Connection],
    held: tuple[Connection, Connection],
    function: Callable[..., Any],
    args: Sequence[Any],
) -> None:
    gc.freeze()  # what the parent has made is not looked through: that would copy every page of it
    results = senders[rank]
    held[1].close()
    for other in senders:
        if other is not results:  # or a rank that dies is not noticed while another one, which waits for it, lives
            other.close()
    torch.set_num_threads(1)  # a fork must not use OpenMP with more threads after its parent did: it can hang
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    try:
        results.send((True, function(rank, *args)))
        held[0].poll(None)  # rank 0 has the store, which others may still read: all live until the parent ends them
    except BaseException:
        results.send((False, traceback.format_exc()))
    results.close()
    os._exit(0)  # no exit handlers of the parent, no waiting for its threads


def _collect(receivers: Sequence[Connection], timeout: float) -> list[Any]:
    outcomes: dict[int, Any] = {}
    end = time.monotonic() + timeout
    while len(outcomes) < len(receivers):
        ready = wait([r for i, r in enumerate(receivers) if i not in outcomes], timeout=max(end - time.monotonic(), 0))
        if not ready:
            raise AssertionError(
                f"ranks {sorted(set(range(len(receivers))) - outcomes.keys())} did not finish in {timeout} s"
            )
        for receiver in ready:
            assert isinstance(receiver, Connection)
            rank = receivers.index(receiver)
            try:
                good, value = receiver.recv()
            except EOFError:
                raise AssertionError(f"rank {rank} died without a word") from None
            if not good:
                raise AssertionError(f"rank {rank} failed:\n{value}")
            outcomes[rank] = value
    return [outcomes[rank] for rank in range(len(receivers))]
