"""Conversations to text to tokens, knowing at every step which characters are learned.

A model's chat template prints the conversation; what the assistant says in it is found in one of two ways:

* a template with `{% generation %}` marks it itself;
* without it, an assistant turn is what `render(messages[:i + 1])` has more than `render(messages[:i])` with the
  generation prompt. That holds only if the template prints a conversation's start alike whatever follows; where it
  does not (a template that drops earlier reasoning, say), the row is refused rather than masked wrongly.

Either way the token that ends the turn is learned with it, else the model never stops (traps 4 and 5). Padding does
not exist here: the mask is made of positions in the text, never of token ids.
"""

import re
from dataclasses import dataclass
from typing import Literal

import numpy as np
from transformers import PreTrainedTokenizerBase

from ..errors import ConfigError, DataError
from .templates import (
    Message,
    Span,
    Tools,
    check_tools_printed,
    marks_assistant,
    render,
    render_marked,
    special_tokens,
)


@dataclass(frozen=True)
class Rendered:
    """A conversation or document as text, and what of it is learned."""

    text: str
    """What the model reads. A conversation ends with the last turn that is learned: what follows teaches nothing."""
    spans: list[Span]
    """Half-open character ranges that are supervised; in order, not overlapping, end-of-turn tokens included."""


def render_messages(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    tools: Tools,
    supervise: Literal["assistant", "last", "all"],
    where: str,
    first: int = 0,
) -> Rendered:
    """Print a conversation with the tokenizer's chat template and find the supervised characters.

    Args:
        tools: JSON schemas of the functions that the model may call.
        supervise: every assistant turn, the last one, or the whole text.
        where: the row, for messages.
        first: learn only turns from this index of `messages` on (the completion of a conversational prompt).

    Raises:
        ConfigError: no chat template, or one that is not valid Jinja.
        DataError: the template refuses the conversation, loses its tool calls, or does not tell what the assistant
            says; or nothing in it can end a turn.
    """
    turns = [i for i, message in enumerate(messages) if message.get("role") == "assistant"]
    # OpenAI's fine-tuning format: an assistant message of weight 0 is read, not learned
    learned = [i for i in turns if i >= first and messages[i].get("weight") != 0]
    if supervise == "all":
        text = render(tokenizer, messages, tools, where)
        check_tools_printed(messages, tools, text, text, where)
        return _with_stop(tokenizer, text, [(0, len(text.rstrip()))], where)
    if not learned:
        raise DataError(f"{where}: there is no assistant turn to learn from.", "Remove the row, or add the answer.")
    if supervise == "last":
        learned = learned[-1:]
    messages = messages[: learned[-1] + 1]
    if marks_assistant(tokenizer, tools):
        text, spans = _marked_spans(tokenizer, messages, tools, learned, where)
    else:
        text, spans = _difference_spans(tokenizer, messages, tools, learned, where)
    rendered = _with_stop(tokenizer, text, spans, where)
    said = "".join(rendered.text[start:end] for start, end in rendered.spans)
    check_tools_printed([messages[i] for i in learned], tools, said, rendered.text, where)
    return rendered


def render_prompt(tokenizer: PreTrainedTokenizerBase, messages: list[Message], tools: Tools = None) -> str:
    """The conversation so far, with the template's opening of an assistant turn: what a model is to continue."""
    return render(tokenizer, messages, tools, "the prompt", generation_prompt=True)


def encode_rendered(
    tokenizer: PreTrainedTokenizerBase, rendered: Rendered, where: str, add_special_tokens: bool = False
) -> tuple[list[int], list[bool], list[int]]:
    """Tokens of a rendered text.

    A token is supervised if it *begins* inside a span. One that begins before a span and reaches into it (a byte-level
    " yes" over a prompt that ends in a space) is not: it belongs to the prompt as well.

    Args:
        add_special_tokens: let the tokenizer open the text (BOS), for plain text. Templates print their own. Tokens
            that the tokenizer would add at the end are left off: the text holds its own end.

    Returns:
        input_ids, supervised and text bytes, a value per token. Text bytes are the UTF-8 bytes that a supervised token
        stands for; 0 for special and unsupervised ones. A character cut into several tokens is counted at its first.
        Where no token crosses a span's border they sum to the supervised text's bytes, special tokens apart.

    Raises:
        ConfigError: the tokenizer is a slow one.
        DataError: two BOS (trap 18), or text that is not valid Unicode.
    """
    if not tokenizer.is_fast:
        raise ConfigError(
            f"{type(tokenizer).__name__} is a slow tokenizer and does not tell which characters a token stands for.",
            "Save the model's fast tokenizer (tokenizer.json) into its folder.",
        )
    text = rendered.text
    points = _code_points(text, where)
    encoded = tokenizer(
        text,
        add_special_tokens=add_special_tokens,
        return_offsets_mapping=True,
        return_attention_mask=False,
        truncation=False,
        verbose=False,
    )
    input_ids: list[int] = encoded["input_ids"]
    offsets: list[Span] = encoded["offset_mapping"]
    while add_special_tokens and len(offsets) > 1 and tuple(offsets[-1]) == (0, 0):
        input_ids, offsets = input_ids[:-1], offsets[:-1]
    check_double_bos(tokenizer, input_ids, where)
    if not input_ids:
        return [], [], []

    bounds = np.asarray(offsets, dtype=np.int64)  # (tokens, 2)
    ends = np.maximum.accumulate(bounds[:, 1])
    previous = np.concatenate(([0], ends[:-1]))
    starts = np.where(_hides_space(tokenizer, input_ids, bounds[:, 0], previous, text), previous, bounds[:, 0])
    inside = np.zeros(len(text) + 1, dtype=bool)
    for start, end in rendered.spans:
        inside[start:end] = True
    supervised = inside[starts] & (bounds[:, 1] > bounds[:, 0])

    sizes = 1 + (points > 0x7F).astype(np.int64) + (points > 0x7FF) + (points > 0xFFFF)  # (characters,)
    bytes_before = np.concatenate(([0], np.cumsum(sizes * inside[:-1])))
    special = np.isin(input_ids, list(special_tokens(tokenizer).values()))
    text_bytes = np.where(supervised & ~special, bytes_before[ends] - bytes_before[previous], 0)
    return input_ids, supervised.tolist(), text_bytes.tolist()


def check_double_bos(tokenizer: PreTrainedTokenizerBase, input_ids: list[int], where: str) -> None:
    """Raise DataError where a sequence begins with two BOS tokens (trap 18)."""
    bos = tokenizer.bos_token_id
    if bos is not None and input_ids[:2] == [bos, bos]:
        raise DataError(
            f"{where}: the text begins with two {tokenizer.bos_token!r}, expected one.",
            "Remove it from the data: the tokenizer or its chat template adds it.",
        )


def check_stop_token(
    tokenizer: PreTrainedTokenizerBase, input_ids: list[int], supervised: list[bool], where: str
) -> None:
    """Raise DataError where the last supervised token can't end a turn (traps 4 and 5). For sequences not cut."""
    learned = [token for token, is_learned in zip(input_ids, supervised, strict=True) if is_learned]
    if learned and learned[-1] not in special_tokens(tokenizer).values():
        raise DataError(
            f"{where}: what is learned ends with {tokenizer.decode(learned[-1:])!r}, not with a token that ends a "
            "turn: the model would never stop.",
            "Mark the end-of-turn token as special in the tokenizer, or end the text with the tokenizer's eos_token.",
        )


def stop_token_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end a generation: EOS, and what closes an assistant turn in the chat template where there is one."""
    ids = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    if tokenizer.chat_template:
        where = "a conversation of one turn"
        probe = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
        rendered = render_messages(tokenizer, probe, None, "last", where)
        tokens, supervised, _ = encode_rendered(tokenizer, rendered, where)
        specials = special_tokens(tokenizer).values()
        learned = [token for token, is_learned in zip(tokens, supervised, strict=True) if is_learned]
        ids += [token for token in dict.fromkeys(learned) if token in specials and token not in ids]
    return ids


def _difference_spans(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], tools: Tools, learned: list[int], where: str
) -> tuple[str, list[Span]]:
    """Turns of a template without `{% generation %}`: what each has more than the prompt before it."""
    specials = tuple(special_tokens(tokenizer))
    text = render(tokenizer, messages, tools, where)
    spans = []
    for i in learned:
        is_last = i == len(messages) - 1
        turn = text if is_last else render(tokenizer, messages[: i + 1], tools, where)
        if i:
            prompt = render(tokenizer, messages[:i], tools, where, generation_prompt=True)
        else:
            prompt = _opening(tokenizer, messages[0], tools, turn, where)
        if not turn.startswith(prompt):
            raise _unstable(i, "the template prints what stands before it otherwise without it", is_last, where)
        ends = [end for end in _possible_ends(turn, len(prompt), specials) if text.startswith(turn[:end])]
        if not ends:
            raise _unstable(i, "the template prints it otherwise once another message follows", is_last, where)
        spans.append((len(prompt), ends[0]))
    return text, spans


def _possible_ends(turn: str, start: int, specials: tuple[str, ...]) -> list[int]:
    """Where a turn that begins at `start` may end, last first: without white space after it, and, where the template
    closes the end of a conversation once more (Phi-3's EOS), without that."""
    end = max(start, len(turn.rstrip()))
    ends = [end]
    while closer := next((token for token in specials if turn.endswith(token, start, end)), None):
        end = start + len(turn[start : end - len(closer)].rstrip())
        if turn.endswith(specials, start, end):
            ends.append(end)
    return ends


def _opening(tokenizer: PreTrainedTokenizerBase, message: Message, tools: Tools, turn: str, where: str) -> str:
    """The text before what the assistant says in a conversation's very first message: no prompt can be rendered."""
    prompted = render(tokenizer, [message], tools, where, generation_prompt=True)
    opening = prompted[len(turn) :] if prompted.startswith(turn) else ""
    if not opening or opening not in turn:
        raise DataError(
            f"{where}: the first message is the assistant's, and the chat template does not tell where it begins.",
            "Begin the conversation with a user turn.",
        )
    return turn[: turn.index(opening) + len(opening)]


def _unstable(turn: int, cause: str, is_last: bool, where: str) -> DataError:
    use = "Use" if is_last else "Set data.supervise=last, which learns the last turn alone, or use"
    return DataError(
        f"{where}: the text of message {turn + 1} (assistant) can't be told from what stands around it: {cause}.",
        f"{use} a chat template that marks what the assistant says with {{% generation %}}.",
    )


def _marked_spans(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], tools: Tools, learned: list[int], where: str
) -> tuple[str, list[Span]]:
    """Turns of a template with `{% generation %}`: its blocks, each with the end-of-turn token that follows it."""
    specials = sorted(special_tokens(tokenizer), key=len, reverse=True)
    following = re.compile(rf"\s*({'|'.join(map(re.escape, specials)) or '(?!)'})")
    # A special token after a block may also open the next turn: only what follows a conversation's last block closes.
    closers: set[str] = set()
    text = ""
    blocks: list[Span] = []
    wanted: list[int] = []
    for i in (i for i, message in enumerate(messages) if message.get("role") == "assistant"):
        before = len(blocks)
        text, blocks = render_marked(tokenizer, messages[: i + 1], tools, where)
        if len(blocks) > before and (match := following.match(text, blocks[-1][1])):
            closers.add(match[1])
        if i in learned:
            wanted += range(before, len(blocks))
    spans = []
    for start, end in (blocks[k] for k in wanted):
        said = text[start:end].rstrip()
        match = following.match(text, end)
        if said.endswith(tuple(specials)):
            end = start + len(said)
        elif match and match[1] in closers:
            end = match.end()
        if end > start:
            spans.append((start, end))
    return text, spans


def _with_stop(tokenizer: PreTrainedTokenizerBase, text: str, spans: list[Span], where: str) -> Rendered:
    """Where no special token ends the last span: the text without trailing white space, and a supervised EOS."""
    if not spans or text[: spans[-1][1]].rstrip().endswith(tuple(special_tokens(tokenizer))):
        return Rendered(text, spans)
    if not tokenizer.eos_token:
        raise DataError(
            f"{where}: nothing ends the last turn, and the tokenizer has no eos_token: the model would never stop.",
            "Set eos_token in the model's tokenizer_config.json.",
        )
    start = spans[-1][0]
    text = text[:start] + text[start:].rstrip() + tokenizer.eos_token
    return Rendered(text, [*spans[:-1], (start, len(text))])


def _code_points(text: str, where: str) -> np.ndarray:
    """Unicode code points, (characters,) uint32."""
    try:
        return np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: character {error.start + 1} of the text is half a character ({text[error.start]!a}, a lone "
            f"surrogate), after {text[max(0, error.start - 20) : error.start]!r}.",
            "Repair or remove the row.",
        ) from error


def _hides_space(
    tokenizer: PreTrainedTokenizerBase, input_ids: list[int], starts: np.ndarray, previous: np.ndarray, text: str
) -> np.ndarray:
    """Tokens whose offsets leave out the space that they begin with (tokenizers with `trim_offsets`), (tokens,)."""
    hides = np.zeros(len(starts), dtype=bool)
    for k in np.flatnonzero(starts > previous):
        token = str(tokenizer.convert_ids_to_tokens(input_ids[k]))
        hides[k] = token[:1] in ("Ġ", "▁") and text[previous[k] : starts[k]].isspace()
    return hides
