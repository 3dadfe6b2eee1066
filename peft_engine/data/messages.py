"""Conversations in one shape: a list of {"role", "content", …} dicts, whatever format they came in.

Taken: OpenAI's and TRL's `role`/`content`, ShareGPT's `from`/`value`, content as a list of text parts, and any of these
as a JSON string (a CSV or Parquet cell).
"""

import json
from typing import Any

from .parsing import shown

Message = dict[str, Any]
ROLES = ("system", "developer", "user", "assistant", "tool", "function")
SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "function": "tool",
}
SPEECH = ("content", "reasoning_content", "thinking")


class Malformed(ValueError):
    """A row that can't be used; the message says why, the caller adds where."""


class Empty(Malformed):
    """A row whose text, label or conversation is there and holds nothing."""


def as_conversation(value: Any, column: str) -> list[Message]:
    """Messages of one row. Raises Malformed."""
    value = _decoded(value)
    if not isinstance(value, list):
        raise Malformed(f"column {column!r} is {shown(value)}, a list of messages was expected")
    if not value:
        raise Empty(f"column {column!r} has no messages")
    messages = [_as_message(turn, number) for number, turn in enumerate(value, start=1)]
    spoken = [turn for turn in messages if turn["role"] == "assistant"]
    if spoken and not any(_says_something(turn) for turn in spoken):
        raise Empty(f"the assistant says nothing in column {column!r}")
    return messages


def _says_something(turn: Message) -> bool:
    said = (turn.get(key) for key in SPEECH)
    return bool(turn.get("tool_calls")) or any(isinstance(text, str) and text.strip() for text in said)


def _as_message(turn: Any, number: int) -> Message:
    """The turn with a known role, content as a string or absent beside tool calls, and its other keys as they are."""
    if not isinstance(turn, dict):
        raise Malformed(f"message {number} is {shown(turn)}, an object was expected")
    if "role" not in turn and "from" in turn:
        role = SHAREGPT_ROLES.get(str(turn["from"]))
        if role is None:
            raise Malformed(f"message {number} is from {turn['from']!r}, known are {', '.join(SHAREGPT_ROLES)}")
        rest = {key: value for key, value in turn.items() if key not in ("from", "value")}
        turn = {"role": role, "content": turn.get("value"), **rest}
    if turn.get("role") not in ROLES:
        got = f"has the role {turn['role']!r}" if "role" in turn else f"has no role (keys {sorted(map(str, turn))})"
        raise Malformed(f"message {number} {got}, known are {', '.join(ROLES)}")
    message = dict(turn)
    if message.get("tool_calls"):
        message["tool_calls"] = _tool_calls(message["tool_calls"], number)
    content = message.pop("content", None)
    if content is None:
        if not message.get("tool_calls"):
            raise Malformed(f"message {number} ({message['role']}) has no content")
        return message
    return {"role": message.pop("role"), "content": _joined(content, number), **message}


def _joined(content: Any, number: int) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise Malformed(f"the content of message {number} is {shown(content)}, a string was expected")
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise Malformed(
                f"the content of message {number} holds {shown(part)}; "
                'only parts {"type": "text", "text": …} are taken'
            )
    return "".join(part["text"] for part in content)


def _tool_calls(calls: Any, number: int) -> list[dict[str, Any]]:
    """The calls with `arguments` as an object: OpenAI writes a JSON string, which templates would encode once more."""
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise Malformed(f"tool_calls of message {number} is {shown(calls)}, a list of objects was expected")
    decoded = []
    for call in calls:
        function = call.get("function")
        if isinstance(function, dict) and isinstance(function.get("arguments"), str):
            call = {**call, "function": {**function, "arguments": _decoded(function["arguments"])}}
        decoded.append(call)
    return decoded


def as_tools(value: Any) -> list[dict[str, Any]] | None:
    """Tool schemas of one row, None where it has none. Raises Malformed."""
    if value is None or value in ("", []):
        return None
    value = _decoded(value)
    tools = [_decoded(tool) for tool in value] if isinstance(value, list) else value
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise Malformed(f"the tools are {shown(value)}, a list of JSON schemas was expected")
    return tools or None


def _decoded(value: Any) -> Any:
    """What a JSON string of a list or object holds; anything else as it is."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value
