"""The chat templates by name. Texts: the model owners' published chat templates, with Megatron-SWIFT's defaults."""

from __future__ import annotations

import datetime
import difflib
from collections.abc import Mapping
from dataclasses import replace

from megatron_swift.data.agent import AGENTS
from megatron_swift.data.jinja_template import jinja_template
from megatron_swift.data.sandbox import english_date
from megatron_swift.data.template import DATE, Template
from megatron_swift.data.tokenizer import Tokenizer
from megatron_swift.utils.errors import UsageError

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
_LLAMA3_DATE = "{environment}Cutting Knowledge Date: December 2023\nToday Date: {date}\n\n"
_LLAMA3 = Template(
    name="llama3",
    prefix=_LLAMA3_BOS,
    system_prefix=_LLAMA3_SYSTEM + "{system}<|eot_id|>",
    prompt=(
        "<|start_header_id|>user<|end_header_id|>\n\n{query}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
    separator="<|eot_id|>",
    suffix="<|eot_id|>",
    agent_template="llama3",
)
_QWEN = replace(_CHATML, agent_template="hermes")

_ALL = (
    _CHATML,
    replace(_QWEN, name="qwen", default_system="You are a helpful assistant."),
    replace(
        _QWEN,
        name="qwen2_5",
        default_system="You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
    ),
    replace(
        _QWEN,
        name="qwen2_5_math",
        default_system="Please reason step by step, and put your final answer within \\boxed{}.",
    ),
    replace(_QWEN, name="qwen3", drop_thinking=True, empty_think="<think>\n\n</think>\n\n"),
    replace(_QWEN, name="qwq", drop_thinking=True, response_prefix="<think>\n"),
    replace(
        _QWEN,
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

JINJA = "jinja"  # instead of a name: the template in the model's own folder
# By name, as written: take one by get_template, which fills its date.
TEMPLATES: dict[str, Template] = {template.name: template for template in _ALL}


def load_template(
    name: str,
    tokenizer: Tokenizer,
    *,
    date: datetime.date | None = None,
    enable_thinking: bool | None = None,
    agent_template: str | None = None,
    registered: Mapping[str, Template] | None = None,
) -> Template:
    """The template with the user's choices about it settled, for `encode`: what it says decides the tokens alone.

    name            : as `get_template`, or "jinja" for the template in the model's own folder.
    date            : as `get_template`; with "jinja", what the template is told as date_string, None: nothing.
    enable_thinking : False: prompts open the reply with the empty thinking part. True: replies to train on get none.
                      UsageError where the template has no such choice.
    agent_template  : a name in AGENTS instead of the template's own.
    registered      : the user's own templates.
    """
    if name == JINJA:
        if agent_template is not None:
            raise UsageError(
                f"--agent_template {agent_template} does not go with the template jinja",
                why="the model's own template writes tools and calls its own way",
                do="leave one of them out",
            )
        return jinja_template(tokenizer, date=date, enable_thinking=enable_thinking)
    template = get_template(name, date=date, registered=registered)
    if enable_thinking is not None:
        if not template.empty_think:
            switched = [one.name for one in TEMPLATES.values() if one.empty_think]
            raise UsageError(
                f"--enable_thinking: the template '{template.name}' has no such choice",
                do=f"leave it out; templates that have it: {', '.join(switched)}",
            )
        template = (
            replace(template, empty_think="")
            if enable_thinking
            else replace(template, response_prefix=template.empty_think)
        )
    return template if agent_template is None else replace(template, agent_template=agent_template)


def get_template(
    name: str, *, date: datetime.date | None = None, registered: Mapping[str, Template] | None = None
) -> Template:
    """The template of that name, its {date} filled; UsageError names the nearest ones when there is none.

    date       : the day written into Llama 3.1's and 3.2's system block, today by default. Give one for reproducible data.
    registered : the user's own templates; they win over ours of the same name.
    """
    known = {**TEMPLATES, **(registered or {})}
    template = known.get(name)
    if template is None:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise UsageError(f"there is no template named '{name}'", do=f"{hint}templates: {', '.join(known)}")
    if template.agent_template not in AGENTS:
        raise UsageError(
            f"the template '{name}' names the agent template '{template.agent_template}', which there is not",
            do=f"agent templates: {', '.join(AGENTS)}",
        )
    text = english_date(date or datetime.date.today())
    filled = {
        part: value.replace(DATE, text)
        for part in ("prefix", "system_prefix", "prompt")
        if (value := getattr(template, part)) is not None and DATE in value
    }
    return replace(template, **filled) if filled else template
