"""A model's chat template: printing a conversation with it, and saying what went wrong in the user's words."""

import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeVar

import jinja2
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from ..errors import ConfigError, DataError

Message = dict[str, Any]
Tools = list[Any] | None  # JSON schemas of functions
Span = tuple[int, int]
Result = TypeVar("Result")

_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    tools: Tools,
    where: str,
    generation_prompt: bool = False,
) -> str:
    """The conversation as text.

    Raises:
        ConfigError: no chat template, or one that is not valid Jinja.
        DataError: the template refuses the conversation.
    """
    template = _template(tokenizer, tools)
    return _guarded(
        lambda: str(
            tokenizer.apply_chat_template(
                messages,
                tools=tools,
                chat_template=template,
                tokenize=False,
                add_generation_prompt=generation_prompt,
            )
        ),
        where,
    )


def marks_assistant(tokenizer: PreTrainedTokenizerBase, tools: Tools) -> bool:
    """Whether the template has `{% generation %}` blocks."""
    return bool(_GENERATION.search(_template(tokenizer, tools)))


def render_marked(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], tools: Tools, where: str
) -> tuple[str, list[Span]]:
    """The conversation as text and the character ranges of its `{% generation %}` blocks. Raises as `render`."""
    settings: dict[str, Any] = {
        # as `apply_chat_template` does: templates test for missing keys, not for null ones
        "conversations": [[{k: v for k, v in message.items() if v is not None} for message in messages]],
        "tools": tools,
        "chat_template": _template(tokenizer, tools),
        "return_assistant_tokens_mask": True,
        **tokenizer.special_tokens_map,
    }
    rendered: Any = _guarded(lambda: render_jinja_template(**settings), where)
    (text,), (blocks,) = rendered
    return text, [(int(start), int(end)) for start, end in blocks]


def check_tools_printed(messages: list[Message], tools: Tools, said: str, text: str, where: str) -> None:
    """Raise DataError where a template passes over tools or tool calls: they would be lost without a word.

    Args:
        messages: the turns that are learned; the names of their tool calls must stand in `said`.
        text: the whole conversation; the names of the tools must stand in it.
    """
    calls = [call for message in messages for call in message.get("tool_calls") or []]
    for items, printed, what in ((calls, said, "tool call"), (tools or [], text, "tool")):
        for item in items:
            name = (item.get("function") or item).get("name") if isinstance(item, dict) else None
            if isinstance(name, str) and name not in printed:
                raise DataError(
                    f"{where}: the model's chat template does not print the {what} {name!r}: nothing would be learned "
                    "from it.",
                    "Take a model whose template knows tools, or remove the tools from the data.",
                )


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Text and id of the tokens that stand for no text: EOS, BOS, turn markers."""
    return _special_tokens(tokenizer, len(tokenizer), tokenizer.eos_token)


@lru_cache(maxsize=8)
def _special_tokens(tokenizer: PreTrainedTokenizerBase, size: int, eos: str | None) -> dict[str, int]:
    """`size` and `eos` are part of the key only: tokens may be added to the same object."""
    found = {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    named = zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)
    return found | {str(text): int(i) for text, i in named}


def _template(tokenizer: PreTrainedTokenizerBase, tools: Tools) -> str:
    if not tokenizer.chat_template:
        raise ConfigError(
            "The data holds messages, but the model's tokenizer has no chat template to print them with.",
            "Take an instruct model, put a chat_template.jinja into the model's folder, or give the data as "
            "prompt/completion or text.",
        )
    try:
        return str(tokenizer.get_chat_template(tools=tools))
    except ValueError as error:
        raise ConfigError(f"The model's tokenizer has no usable chat template: {error}") from error


def _guarded(render: Callable[[], Result], where: str) -> Result:
    try:
        return render()
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(f"The model's chat template is not valid Jinja: {error}", "Repair or replace it.") from error
    except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise DataError(
            f"{where}: the model's chat template can't print this conversation: {str(error).rstrip('.')}.",
            "Change the row to what the template takes (roles, their order, contents that are text), or remove it.",
        ) from error
