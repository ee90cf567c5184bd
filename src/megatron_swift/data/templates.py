"""The chat templates by name. Texts: the model owners' published chat templates, with Megatron-SWIFT's defaults."""

from __future__ import annotations

import datetime
import difflib
from dataclasses import replace

from megatron_swift.data.template import DATE, Template
from megatron_swift.utils.errors import UsageError

_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")

_LLAMA_SYSTEM = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being safe. "
    "Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal content. "
    "Please ensure that your responses are socially unbiased and positive in nature.\n\n"
    "If a question does not make any sense, or is not factually coherent, explain why instead of answering something "
    "not correct. If you don't know the answer to a question, please don't share false information."
)

# The newline after <|im_end|> is part of the reply and trained (Megatron-SWIFT from 3.11 on).
_CHATML = Template(
    name="chatml",
    prefix="",
    system_prefix="<|im_start|>system\n{system}<|im_end|>\n",
    prompt="<|im_start|>user\n{query}<|im_end|>\n<|im_start|>assistant\n",
    separator="<|im_end|>\n",
    suffix="<|im_end|>\n",
    stop_words=("<|endoftext|>",),
)

_LLAMA3_BOS = "<|begin_of_text|>"
_LLAMA3_SYSTEM = _LLAMA3_BOS + "<|start_header_id|>system<|end_header_id|>\n\n"
_LLAMA3_DATE = "Cutting Knowledge Date: December 2023\nToday Date: {date}\n\n"
_LLAMA3 = Template(
    name="llama3",
    prefix=_LLAMA3_BOS,
    system_prefix=_LLAMA3_SYSTEM + "{system}<|eot_id|>",
    prompt=(
        "<|start_header_id|>user<|end_header_id|>\n\n{query}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
    separator="<|eot_id|>",
    suffix="<|eot_id|>",
)

_ALL = (
    _CHATML,
    replace(_CHATML, name="qwen", default_system="You are a helpful assistant."),
    replace(
        _CHATML,
        name="qwen2_5",
        default_system="You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
    ),
    replace(
        _CHATML,
        name="qwen2_5_math",
        default_system="Please reason step by step, and put your final answer within \\boxed{}.",
    ),
    replace(_CHATML, name="qwen3", drop_thinking=True),
    replace(_CHATML, name="qwq", drop_thinking=True, response_prefix="<think>\n"),
    replace(
        _CHATML,
        name="qwq_preview",
        default_system=(
            "You are a helpful and harmless assistant. You are Qwen developed by Alibaba. "
            "You should think step-by-step."
        ),
    ),
    Template(
        name="llama",
        prefix="<s>[INST] ",
        system_prefix="<s>[INST] <<SYS>>\n{system}\n<</SYS>>\n\n",
        prompt="{query} [/INST]",
        separator="</s><s>[INST] ",
        suffix="</s>",
        default_system=_LLAMA_SYSTEM,
    ),
    _LLAMA3,
    replace(
        _LLAMA3,
        name="llama3_2",
        prefix=_LLAMA3_SYSTEM + _LLAMA3_DATE + "<|eot_id|>",
        system_prefix=_LLAMA3_SYSTEM + _LLAMA3_DATE + "{system}<|eot_id|>",
    ),
    Template(
        name="deepseek",
        prefix="{bos}",
        system_prefix="{bos}{system}\n\n",
        prompt="User: {query}\n\nAssistant:",
        separator="{eos}",
        suffix="{eos}",
    ),
    Template(
        name="deepseek_r1",
        prefix="<｜begin▁of▁sentence｜>",
        system_prefix="<｜begin▁of▁sentence｜>{system}",
        prompt="<｜User｜>{query}<｜Assistant｜>",
        separator="<｜end▁of▁sentence｜>",
        suffix="<｜end▁of▁sentence｜>",
        response_prefix="<think>\n",
        drop_thinking=True,
        thinking_strip="",
    ),
    # No chat template: plain text for pre-training, one round.
    Template(
        name="generation",
        prefix="{auto_bos}",
        system_prefix=None,
        prompt="{query}",
        separator="{eos}",
        suffix="{eos}",
        single_round=True,
    ),
)

# By name, as written: take one by get_template, which fills its date.
TEMPLATES: dict[str, Template] = {template.name: template for template in _ALL}


def get_template(name: str, *, date: datetime.date | None = None) -> Template:
    """The template of that name, its {date} filled; UsageError names the nearest ones when there is none.

    date : the day written into Llama 3.1's and 3.2's system block, today by default. Give one for reproducible data.
    """
    template = TEMPLATES.get(name)
    if template is None:
        near = difflib.get_close_matches(name, TEMPLATES, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise UsageError(f"there is no template named '{name}'", do=f"{hint}templates: {', '.join(TEMPLATES)}")
    if DATE not in template.prefix:
        return template
    day = date or datetime.date.today()
    text = f"{day.day:02d} {_MONTHS[day.month - 1]} {day.year}"  # strftime's %b would depend on the locale
    assert template.system_prefix is not None
    return replace(
        template,
        prefix=template.prefix.replace(DATE, text),
        system_prefix=template.system_prefix.replace(DATE, text),
    )
