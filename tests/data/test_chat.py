import random

import chat_samples as samples
import pytest
from chat_samples import call, chatml, turn

from peft_engine.data.chat import (
    Rendered,
    check_stop_token,
    encode_rendered,
    render_messages,
    render_prompt,
    stop_token_ids,
)
from peft_engine.errors import ConfigError, DataError

HELLO = [turn("user", "hello"), turn("assistant", "hi there"), turn("user", "and you?"), turn("assistant", "fine")]


def learned(tokenizer, messages, supervise="assistant", tools=None, first=0):
    """The supervised tokens, decoded, as one text."""
    rendered = render_messages(tokenizer, messages, tools, supervise, "row 1", first)
    ids, supervised, _ = encode_rendered(tokenizer, rendered, "row 1")
    check_stop_token(tokenizer, ids, supervised, "row 1")
    return tokenizer.decode([i for i, is_learned in zip(ids, supervised, strict=True) if is_learned])


def test_chatml():
    tokenizer = chatml()
    messages = [turn("system", "be kind"), *HELLO]
    assert learned(tokenizer, messages) == "hi there<|im_end|>fine<|im_end|>"
    assert learned(tokenizer, messages, "last") == "fine<|im_end|>"
    assert learned(tokenizer, messages, first=3) == "fine<|im_end|>"
    whole = render_messages(tokenizer, messages, None, "all", "row 1")
    assert whole.text == tokenizer.apply_chat_template(messages, tokenize=False)
    assert whole.spans == [(0, len(whole.text.rstrip()))]


def test_what_follows_the_last_learned_turn_is_left_out():
    rendered = render_messages(chatml(), [*HELLO, turn("user", "bye")], None, "assistant", "row 1")
    assert rendered.text.endswith("fine<|im_end|>\n")
    assert "bye" not in rendered.text


def test_llama3_bos_and_header():
    tokenizer = samples.byte_tokenizer(
        samples.LLAMA3,
        ["<|begin|>", "<|end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        "<|end|>",
        bos_token="<|begin|>",
    )
    assert learned(tokenizer, [turn("system", "s"), *HELLO]) == "hi there<|eot_id|>fine<|eot_id|>"
    rendered = render_messages(tokenizer, HELLO, None, "assistant", "row 1")
    ids = encode_rendered(tokenizer, rendered, "row 1")[0]
    assert ids.count(tokenizer.bos_token_id) == 1
    eot = tokenizer.convert_tokens_to_ids("<|eot_id|>")
    assert stop_token_ids(tokenizer) == [tokenizer.eos_token_id, eot]


def test_mistral_spaces_as_sentencepiece_writes_them():
    tokenizer = samples.metaspace_tokenizer(
        samples.MISTRAL, ["<s>", "</s>", "[INST]", "[/INST]"], "</s>", bos_token="<s>"
    )
    rendered = render_messages(tokenizer, HELLO, None, "assistant", "row 1")
    assert [rendered.text[a:b] for a, b in rendered.spans] == [" hi there</s>", " fine</s>"]
    assert learned(tokenizer, HELLO).replace(" ", "") == "hithere</s>fine</s>"
    with pytest.raises(DataError, match=r"row 9: .*Only user and assistant roles are supported!"):
        render_messages(tokenizer, [turn("system", "s"), *HELLO], None, "assistant", "row 9")


def test_gemma_model_role_and_refusals():
    tokenizer = samples.byte_tokenizer(
        samples.GEMMA, ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"], "<eos>", bos_token="<bos>"
    )
    assert learned(tokenizer, HELLO) == "hi there<end_of_turn>fine<end_of_turn>"
    with pytest.raises(DataError, match=r"a\.jsonl, line 7: .*System role not supported"):
        render_messages(tokenizer, [turn("system", "s"), *HELLO], None, "assistant", "a.jsonl, line 7")
    with pytest.raises(DataError, match=r"row 1: .*must alternate"):
        render_messages(tokenizer, [HELLO[0], *HELLO], None, "assistant", "row 1")


def test_phi3_closes_a_conversation_once_more():
    specials = ["<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>"]
    tokenizer = samples.byte_tokenizer(samples.PHI3, specials, "<|endoftext|>")
    assert learned(tokenizer, HELLO) == "hi there<|end|>fine<|end|>\n<|endoftext|>"
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    assert stop_token_ids(tokenizer) == [tokenizer.eos_token_id, end]


TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]


def test_qwen_tool_calls_are_learned_and_results_are_not():
    messages = [
        turn("user", "weather in Paris?"),
        turn("assistant", None, tool_calls=[call("weather", {"city": "Paris"})]),
        turn("tool", "22 degrees"),
        turn("assistant", "Warm."),
    ]
    tokenizer = chatml(samples.QWEN)
    called = '<tool_call>weather {"city": "Paris"}</tool_call><|im_end|>'
    assert learned(tokenizer, messages, tools=TOOLS) == called + "Warm.<|im_end|>"
    assert learned(tokenizer, messages, "last", tools=TOOLS) == "Warm.<|im_end|>"


def test_tools_that_the_template_passes_over_are_refused():
    messages = [turn("user", "x"), turn("assistant", "", tool_calls=[call("weather", {})])]
    with pytest.raises(DataError, match=r"row 3: .*does not print the tool call 'weather'"):
        render_messages(chatml(), messages, None, "assistant", "row 3")
    with pytest.raises(DataError, match=r"row 3: .*does not print the tool 'weather'"):
        render_messages(chatml(), HELLO, TOOLS, "assistant", "row 3")


def test_template_that_drops_earlier_reasoning_is_refused_and_last_is_the_way_out():
    tokenizer = chatml(samples.QWEN)
    messages = [
        turn("user", "a"),
        turn("assistant", "<think>\nhm\n</think>\n\nfirst"),
        turn("user", "b"),
        turn("assistant", "<think>\nso\n</think>\n\nsecond"),
    ]
    with pytest.raises(DataError, match=r"row 5: .*message 2 \(assistant\).*data\.supervise=last"):
        render_messages(tokenizer, messages, None, "assistant", "row 5")
    assert learned(tokenizer, messages, "last") == "<think>\nso\n</think>\n\nsecond<|im_end|>"
    # a user turn at the end would make the template drop the last reasoning as well
    assert learned(tokenizer, [*messages, turn("user", "c")], "last") == "<think>\nso\n</think>\n\nsecond<|im_end|>"


def test_generation_prompt_that_the_turn_does_not_begin_with_is_refused():
    template = samples.CHATML + "{% if add_generation_prompt %}<think>\n{% endif %}"
    with pytest.raises(DataError, match=r"row 1: .*\{% generation %\}") as error:
        render_messages(chatml(template), HELLO[:2], None, "last", "row 1")
    assert "supervise=last" not in str(error.value)


@pytest.mark.parametrize("template", [samples.MARKED, samples.MARKED_WHOLE])
def test_trap_05_stop_token_outside_the_generation_block(template):
    tokenizer = chatml(template)
    assert learned(tokenizer, [turn("system", "s"), *HELLO]) == "hi there<|im_end|>fine<|im_end|>"
    assert learned(tokenizer, HELLO, "last") == "fine<|im_end|>"
    assert learned(tokenizer, HELLO, first=2) == "fine<|im_end|>"


def test_generation_blocks_of_a_tool_call_and_its_own_end_token():
    messages = [
        turn("user", "x"),
        turn("assistant", "look", tool_calls=[call("weather", {})]),
        turn("tool", "22"),
        turn("assistant", "Warm."),
    ]
    tokenizer = chatml(samples.MARKED)
    assert learned(tokenizer, messages) == "look@weather<|eom|>Warm.<|im_end|>"
    assert learned(tokenizer, messages, "last") == "Warm.<|im_end|>"


def test_null_content_is_not_printed_as_none():
    template = samples.MARKED.replace("m.content or ''", "m.content")
    messages = [turn("user", "x"), turn("assistant", None, tool_calls=[call("weather", {})])]
    assert learned(chatml(template), messages) == "@weather<|eom|>"


def test_generation_block_followed_by_the_next_turns_opening():
    template = """\
{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% if m.role == 'assistant' %}{% generation %}\
{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{{ '\\n' }}{% endfor %}"""
    # nothing closes a turn here: <|im_start|> opens the next one and must not be learned; EOS is put at the end
    assert learned(chatml(template), HELLO) == "hi therefine<|im_end|>"


def test_template_without_any_end_token_gets_eos():
    tokenizer = samples.byte_tokenizer(samples.PLAIN, ["<|endoftext|>"], "<|endoftext|>")
    rendered = render_messages(tokenizer, HELLO, None, "assistant", "row 1")
    assert rendered.text.endswith("### assistant:\nfine<|endoftext|>")
    assert learned(tokenizer, HELLO) == "hi therefine<|endoftext|>"
    without_eos = samples.byte_tokenizer(samples.PLAIN, ["<|x|>"], None)
    with pytest.raises(DataError, match=r"row 2: .*never stop"):
        render_messages(without_eos, HELLO, None, "assistant", "row 2")


def test_trap_04_pad_equal_to_eos_keeps_eos_supervised():
    tokenizer = chatml(pad_token="<|im_end|>")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    assert learned(tokenizer, HELLO) == "hi there<|im_end|>fine<|im_end|>"


def test_check_stop_token():
    tokenizer = chatml()
    ids = tokenizer("fine<|im_end|>")["input_ids"]
    check_stop_token(tokenizer, ids, [True] * len(ids), "row 1")
    with pytest.raises(DataError, match=r"row 1: .*never stop"):
        check_stop_token(tokenizer, ids, [True] * (len(ids) - 1) + [False], "row 1")


def test_conversation_that_begins_with_the_assistant():
    assert learned(chatml(), HELLO[1:]) == "hi there<|im_end|>fine<|im_end|>"
    tokenizer = samples.byte_tokenizer(samples.MISTRAL, ["<s>", "</s>"], "</s>", bos_token="<s>")
    with pytest.raises(DataError, match="Begin the conversation with a user turn"):
        render_messages(tokenizer, HELLO[1:], None, "assistant", "row 1")


def test_first_assistant_turn_without_the_opening_of_the_generation_prompt():
    template = samples.CHATML.replace(
        "{% if add_generation_prompt %}<|im_start|>assistant", "{% if add_generation_prompt %}##"
    )
    with pytest.raises(DataError, match=r"row 1: the first message is the assistant's"):
        render_messages(chatml(template), HELLO[1:], None, "assistant", "row 1")


def test_assistant_turns_that_follow_one_another():
    messages = [turn("user", "a"), turn("assistant", "b"), turn("assistant", "c")]
    assert learned(chatml(), messages) == "b<|im_end|>c<|im_end|>"


def test_no_assistant_turn():
    with pytest.raises(DataError, match=r"row 4: .*no assistant turn"):
        render_messages(chatml(), HELLO[:1], None, "assistant", "row 4")
    with pytest.raises(DataError, match=r"row 4: .*no assistant turn"):
        render_messages(chatml(), HELLO[:3], None, "last", "row 4", first=2)


def test_templates_that_are_missing_or_broken():
    with pytest.raises(ConfigError, match="no chat template"):
        render_messages(samples.byte_tokenizer(None, ["<|e|>"], "<|e|>"), HELLO, None, "assistant", "row 1")
    with pytest.raises(ConfigError, match="not valid Jinja"):
        render_messages(chatml("{% for %}"), HELLO, None, "assistant", "row 1")


def test_prompt_for_generation():
    text = render_prompt(chatml(), HELLO[:1])
    assert text == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"


def test_token_across_a_spans_border_is_not_supervised():
    tokenizer = samples.byte_tokenizer(None, ["<|e|>"], "<|e|>")
    text = "how are"
    words = tokenizer.tokenize(text)
    assert words[-1] == "Ġare"
    ids, supervised, text_bytes = encode_rendered(tokenizer, Rendered(text, [(4, 7)]), "row 1")
    assert not any(supervised)
    assert sum(text_bytes) == 0
    _, supervised, text_bytes = encode_rendered(tokenizer, Rendered(text, [(3, 7)]), "row 1")
    assert supervised == [False] * (len(ids) - 1) + [True]
    assert text_bytes[-1] == 4


def test_offsets_that_leave_out_the_space_hide_no_straddling_token():
    tokenizer = samples.byte_tokenizer(None, ["<|e|>"], "<|e|>", trim_offsets=True)
    encoded = tokenizer("how are", return_offsets_mapping=True)
    assert encoded["offset_mapping"][-1] == (4, 7)
    _, supervised, _ = encode_rendered(tokenizer, Rendered("how are", [(4, 7)]), "row 1")
    assert not any(supervised)
    _, supervised, text_bytes = encode_rendered(tokenizer, Rendered("how are", [(3, 7)]), "row 1")
    assert supervised[-1]
    assert sum(text_bytes) == 4


def test_words_without_spaces_between_are_supervised():
    tokenizer = samples.word_tokenizer(samples.CHATML, ["<|im_start|>", "<|im_end|>"], "<|im_end|>")
    messages = [turn("user", "hello"), turn("assistant", "the lazy dog")]
    assert learned(tokenizer, messages) == "the lazy dog <|im_end|>"


def test_text_bytes_of_characters_in_several_tokens():
    tokenizer = chatml()
    said = "naïve 你好 😀👩‍🚀!"
    rendered = render_messages(tokenizer, [turn("user", "🙂"), turn("assistant", said)], None, "assistant", "row 1")
    ids, supervised, text_bytes = encode_rendered(tokenizer, rendered, "row 1")
    assert sum(supervised) > len(said)
    assert sum(text_bytes) == len(said.encode())
    assert all(n == 0 for n, is_learned in zip(text_bytes, supervised, strict=True) if not is_learned)
    assert text_bytes[ids.index(tokenizer.eos_token_id, 5)] == 0


def test_trap_18_double_bos():
    tokenizer = samples.metaspace_tokenizer("{{ bos_token + bos_token }}", ["<s>", "</s>"], "</s>", bos_token="<s>")
    with pytest.raises(DataError, match=r"row 6: .*two '<s>'"):
        encode_rendered(tokenizer, Rendered("<s><s>hello</s>", []), "row 6")
    with pytest.raises(DataError, match=r"row 6: .*two '<s>'"):
        encode_rendered(tokenizer, Rendered("<s>hello</s>", []), "row 6", add_special_tokens=True)


def test_plain_text_gets_bos_but_no_second_eos():
    tokenizer = samples.metaspace_tokenizer(None, ["<s>", "</s>"], "</s>", bos_token="<s>")
    rendered = Rendered("hello you</s>", [(5, 13)])
    ids, supervised, _ = encode_rendered(tokenizer, rendered, "row 1", add_special_tokens=True)
    assert ids[0] == tokenizer.bos_token_id
    assert not supervised[0]
    assert ids.count(tokenizer.eos_token_id) == 1
    assert supervised[-1]


def test_half_a_character():
    with pytest.raises(DataError, match=r"row 8: character 4 .*\\ud83d"):
        encode_rendered(chatml(), Rendered("abc\ud83d", []), "row 8")


def test_slow_tokenizer():
    class Slow:
        is_fast = False

    with pytest.raises(ConfigError, match="Slow is a slow tokenizer"):
        encode_rendered(Slow(), Rendered("abc", []), "row 1")


@pytest.mark.parametrize("template", [samples.CHATML, samples.QWEN, samples.MARKED, samples.MARKED_WHOLE])
def test_any_conversation(template):
    """Supervised text is what the assistant says, each time with the end-of-turn token, and nothing else."""
    tokenizer = chatml(template)
    draw = random.Random(0)
    alphabet = ["the ", "fox", " ", "?", "é", "你好", "😀", "\n", "<b>", "{{x}}", "assistant", "-" * 3]
    for _ in range(60):
        messages = [turn("system", "".join(draw.choices(alphabet, k=3)))] if draw.random() < 0.5 else []
        for _ in range(draw.randint(1, 4)):
            messages.append(turn("user", "".join(draw.choices(alphabet, k=draw.randint(0, 6)))))
            # the header's newline and one in the answer may be one token, which then begins before the answer
            messages.append(turn("assistant", "a" + "".join(draw.choices(alphabet, k=draw.randint(0, 6)))))
        said = [message["content"] for message in messages if message["role"] == "assistant"]
        assert learned(tokenizer, messages) == "".join(text + "<|im_end|>" for text in said)
        assert learned(tokenizer, messages, "last") == said[-1] + "<|im_end|>"
        rendered = render_messages(tokenizer, messages, None, "assistant", "row 1")
        assert sum(encode_rendered(tokenizer, rendered, "row 1")[2]) == sum(len(text.encode()) for text in said)
