"""Small fast tokenizers and chat templates in the style of the known ones, for tests of the supervision mask."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = ["the quick brown fox jumps over the lazy dog", "hello there, how are you?", "user assistant system tool"] * 4

CHATML = """\
{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

LLAMA3 = """\
{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' }}\
{{ m.content | trim }}<|eot_id|>{% endfor %}\
{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""

MISTRAL = """\
{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}\
{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}\
{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"""

GEMMA = """\
{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}\
{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}\
{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' + m.content | trim }}\
{{ '<end_of_turn>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""

QWEN = """\
{%- if tools %}{{- '<|im_start|>system\\n' }}{%- for t in tools %}{{- t | tojson + '\\n' }}{%- endfor %}\
{{- '<|im_end|>\\n' }}{%- endif %}
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}
{%- for m in messages %}
{%- if m.role == 'tool' %}
{{- '<|im_start|>user\\n<tool_response>\\n' + m.content + '\\n</tool_response><|im_end|>\\n' }}
{%- else %}
{%- set said = m.content or '' %}
{%- if m.role == 'assistant' and loop.index0 < ns.last and '</think>' in said %}
{%- set said = said.split('</think>')[-1].lstrip('\\n') %}{%- endif %}
{{- '<|im_start|>' + m.role + '\\n' + said }}
{%- for call in m.tool_calls or [] %}
{{- '<tool_call>' + call.function.name + ' ' + call.function.arguments | tojson + '</tool_call>' }}{%- endfor %}
{{- '<|im_end|>\\n' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

PHI3 = """\
{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"""

# the block ends before the end-of-turn token (trap 5), which differs between tool calls and answers
MARKED = """\
{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% if m.role == 'assistant' %}\
{% generation %}{{ m.content or '' }}{% endgeneration %}\
{% for call in m.tool_calls or [] %}{% generation %}{{ '@' + call.function.name }}{% endgeneration %}{% endfor %}\
{{ '<|eom|>' if m.tool_calls else '<|im_end|>' }}{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

MARKED_WHOLE = MARKED.replace(
    "{% generation %}{{ m.content or '' }}{% endgeneration %}",
    "{% generation %}{{ m.content + '<|im_end|>\\n' }}{% endgeneration %}",
).replace("{{ '<|eom|>' if m.tool_calls else '<|im_end|>' }}", "")

PLAIN = """\
{% for m in messages %}{{ '### ' + m.role + ':\\n' + m.content + '\\n\\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '### assistant:\\n' }}{% endif %}"""

CHATML_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|eom|>"]


def byte_tokenizer(
    template: str | None, specials: list[str], eos: str | None, **more: object
) -> PreTrainedTokenizerFast:
    """Byte-level BPE. `more`: bos_token, pad_token; `trim_offsets` as RoBERTa's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trim = bool(more.pop("trim_offsets", False))
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim)
    return _wrapped(tokenizer, template, eos, more)


def metaspace_tokenizer(template: str | None, specials: list[str], eos: str, **more: object) -> PreTrainedTokenizerFast:
    """SentencePiece's way with spaces; BOS before and EOS after a text are added, as Llama's tokenizer may."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    letters = [chr(c) for c in range(33, 127)]
    trainer = trainers.BpeTrainer(
        vocab_size=240, special_tokens=["<unk>", *specials], initial_alphabet=letters, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    ends = [(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    return _wrapped(tokenizer, template, eos, {"unk_token": "<unk>", **more})


def word_tokenizer(template: str | None, specials: list[str], eos: str) -> PreTrainedTokenizerFast:
    """One token per word or mark; spaces are in no token."""
    words = sorted({word for line in CORPUS for word in line.replace(",", " ,").replace("?", " ?").split()})
    vocabulary = {token: i for i, token in enumerate(["<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(specials)
    return _wrapped(tokenizer, template, eos, {"unk_token": "<unk>"})


def _wrapped(
    tokenizer: Tokenizer, template: str | None, eos: str | None, named: dict[str, object]
) -> PreTrainedTokenizerFast:
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, **named)
    wrapped.chat_template = template
    return wrapped


def chatml(template: str = CHATML, **more: object) -> PreTrainedTokenizerFast:
    return byte_tokenizer(template, CHATML_TOKENS, "<|im_end|>", **more)


def turn(role: str, content: str | None, **more: object) -> dict:
    return {"role": role, "content": content, **more}


def call(name: str, arguments: object) -> dict:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}
