"""How tools, calls and their responses are written in a conversation: one small class for each agent template."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from megatron_swift.utils.errors import DataError


class Call(NamedTuple):
    """A call of a tool, its arguments parsed."""

    name: str
    arguments: Any


class AgentTemplate:
    """What an agent template has to say. As it stands here, responses are put into one turn of the user.

    environment   : fills {environment} of a chat template where the conversation has tools.
    response_turn : the text with {query} that a response stands in, "" for the chat template's own question.
    reply_opening : what follows the last `response_turn` and opens the reply.
    continues     : a call and its responses stay within the assistant's turn.
    """

    name = ""
    environment = ""
    response_turn = ""
    reply_opening = ""
    continues = False

    def system(self, tools: Sequence[dict[str, Any]], system: str) -> str:
        """The system prompt of a conversation with these tools; `system` is what it would be without them."""
        return system

    def question(self, tools: Sequence[dict[str, Any]], query: str) -> str:
        """The first question of such a conversation."""
        return query

    def calls(self, calls: Sequence[Call], before: str) -> str:
        """The calls as the reply's text, or its end where `before` stands in front."""
        raise NotImplementedError

    def end_of_reply(self, reply: str) -> str:
        """What is added to a reply that responses follow."""
        return ""

    def responses(self, responses: Sequence[str]) -> str:
        """The responses as one text, for the place of the question or, where `continues`, after the reply."""
        raise NotImplementedError


class Hermes(AgentTemplate):
    """The form of Qwen 2.5 and 3: tools in the system prompt, calls and responses between XML-like tags."""

    name = "hermes"

    def system(self, tools: Sequence[dict[str, Any]], system: str) -> str:
        """`system`, then the tools, one JSON text a line."""
        listed = "\n".join(_dump(_wrapped(tool)) for tool in tools)
        return (
            (f"{system}\n\n" if system else "")
            + "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
            + "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
            + f"{listed}\n</tools>\n\nFor each function call, return a json object with function name and arguments "
            + "within <tool_call></tool_call> XML tags:\n<tool_call>\n"
            + '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
        )

    def calls(self, calls: Sequence[Call], before: str) -> str:
        """Each call between tags, on lines of their own."""
        texts = [f"<tool_call>\n{_dump({'name': c.name, 'arguments': c.arguments})}\n</tool_call>" for c in calls]
        return ("\n" if before and not before.endswith("\n") else "") + "\n".join(texts)

    def responses(self, responses: Sequence[str]) -> str:
        """Each response between tags, on lines of their own."""
        return "\n".join(f"<tool_response>\n{text}\n</tool_response>" for text in responses)


class React(AgentTemplate):
    """The form of the ReAct paper: Thought, Action, Action Input and Observation, all in the assistant's one turn."""

    name = "react_en"
    continues = True

    def system(self, tools: Sequence[dict[str, Any]], system: str) -> str:
        """`system`, then the tools and the format of the answer."""
        described, names = [], []
        for tool in (_unwrapped(tool) for tool in tools):
            name = tool["name"]
            names.append(name)
            described.append(
                f"{name}: Call this tool to interact with the {name} API. What is the {name} API useful for? "
                f"{tool.get('description') or ''} Parameters: {_dump(tool.get('parameters') or {})} "
                "Format the arguments as a JSON object."
            )
        return (
            (f"{system}\n\n" if system else "")
            + "Answer the following questions as best you can. You have access to the following tools:\n\n"
            + "\n\n".join(described)
            + "\n\nUse the following format:\n\nQuestion: the input question you must answer\n"
            + "Thought: you should always think about what to do\n"
            + f"Action: the action to take, should be one of [{','.join(names)}]\n"
            + "Action Input: the input to the action\nObservation: the result of the action\n"
            + "... (this Thought/Action/Action Input/Observation can be repeated zero or more times)\n"
            + "Thought: I now know the final answer\n"
            + "Final Answer: the final answer to the original input question\n\nBegin!\n"
        )

    def calls(self, calls: Sequence[Call], before: str) -> str:
        """An Action and its input for each call, then the word at which the caller takes over."""
        texts = [f"Action: {call.name}\nAction Input: {_dump(call.arguments)}\n" for call in calls]
        return ("\n" if before and not before.endswith("\n") else "") + "".join(texts) + "Observation:"

    def end_of_reply(self, reply: str) -> str:
        """The word after which the response stands."""
        if reply.endswith("Observation:"):
            return ""
        return ("" if reply.endswith("\n") else "\n") + "Observation:"

    def responses(self, responses: Sequence[str]) -> str:
        """The responses one after another, each ending its line."""
        return "Observation:".join(text if text.endswith("\n") else f"{text}\n" for text in responses)


class Llama3(AgentTemplate):
    """The form of Llama 3.1's and 3.2's published template: tools in the first question, responses of the role ipython."""

    name = "llama3"
    environment = "Environment: ipython\n"
    response_turn = "<|start_header_id|>ipython<|end_header_id|>\n\n{query}<|eot_id|>"
    reply_opening = "<|start_header_id|>assistant<|end_header_id|>\n\n"

    def question(self, tools: Sequence[dict[str, Any]], query: str) -> str:
        """The tools, then the question."""
        listed = "".join(json.dumps(_wrapped(tool), ensure_ascii=False, indent=4) + "\n\n" for tool in tools)
        return (
            "Given the following functions, please respond with a JSON for a function call with its proper arguments "
            'that best answers the given prompt.\n\nRespond in the format {"name": function name, "parameters": '
            f"dictionary of argument name and its value}}.Do not use variables.\n\n{listed}{query}"
        )

    def calls(self, calls: Sequence[Call], before: str) -> str:
        """Each call as JSON, on a line of its own."""
        texts = [_dump({"name": call.name, "parameters": call.arguments}) for call in calls]
        return ("\n" if before and not before.endswith("\n") else "") + "\n".join(texts)


_REACT = React()
AGENTS: dict[str, AgentTemplate] = {"hermes": Hermes(), "react_en": _REACT, "react": _REACT, "llama3": Llama3()}


@lru_cache(maxsize=1024)
def parse_tools(tools: tuple[str, ...]) -> tuple[dict[str, Any], ...]:
    """The tools as JSON objects, each with a function's name; DataError for one that is not."""
    parsed = []
    for number, text in enumerate(tools, 1):
        try:
            tool = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DataError(f"tool {number} is not JSON", why=str(error), do="mend or remove the row") from None
        name = _unwrapped(tool).get("name") if isinstance(tool, dict) else None
        if not isinstance(name, str):
            raise DataError(
                f"tool {number} has no name",
                do='write it as {"type": "function", "function": {"name": ..., "description": ..., "parameters": {...}}}',
            )
        parsed.append(tool)
    return tuple(parsed)


def parse_call(text: str, *, number: int) -> Call:
    """The call that message `number` of role tool_call holds: JSON with name and arguments (or parameters)."""
    do = 'write it as {"name": ..., "arguments": {...}}'
    try:
        value = json.loads(text)
        arguments = value.get("arguments", value.get("parameters")) if isinstance(value, dict) else None
        if isinstance(arguments, str):
            arguments = json.loads(arguments)
    except (ValueError, RecursionError) as error:
        raise DataError(f"message {number}, a tool_call, is not JSON", why=str(error), do=do) from None
    if not isinstance(value, dict) or not isinstance(value.get("name"), str) or not isinstance(arguments, dict):
        raise DataError(f"message {number}, a tool_call, has no name or no arguments", do=do)
    return Call(value["name"], arguments)


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _unwrapped(tool: dict[str, Any]) -> dict[str, Any]:
    inner = tool.get("function")
    return inner if isinstance(inner, dict) else tool


def _wrapped(tool: dict[str, Any]) -> dict[str, Any]:
    return tool if "function" in tool else {"type": "function", "function": tool}
