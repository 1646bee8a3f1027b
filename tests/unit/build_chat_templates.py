"""Builds chat templates in the forms that published models have, and folders of models with a tokenizer for them."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from heliostat.curation.conversations.rendering import Dialect
from heliostat.curation.text import tokens
from tokenizers import Tokenizer

END = "</s>"
SPECIAL = ["<s>", END, "<|im_start|>", "<|im_end|>", "<|user|>", "<|assistant|>", "<|end|>", "[INST]", "[/INST]", "[TOOL_CALLS]",
           "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]  # fmt: skip
TEXT = [
    "which word comes first the amber birch of all, system user assistant tool User: Assistant: Be brief and kind. 0123456789"
]
DEFAULT_SYSTEM = (  # SmolLM2
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe brief.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)  # fmt: skip
ENDS_TWICE = (  # Phi-3: a token ends each turn, and another token ends the conversation
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
INSTRUCTIONS = (  # Mistral: roles must alternate, a space comes before answers, and calls have a special token
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message.tool_calls %}"
    "{{ '[TOOL_CALLS] [' + message.tool_calls[0].function | tojson + ']' + eos_token }}"
    "{% else %}{{ ' ' + message['content'] | trim + eos_token }}{% endif %}{% endfor %}"
)
THOUGHTS = (  # Qwen3: answers before the last question lose their thoughts
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if loop.last %}{{ message['content'] }}"
    "{% else %}{{ message['content'].split('</think>')[-1] }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
UNENDED = (  # no special token at all
    "{% for message in messages %}{{ ('User: ' if message['role'] == 'user' else 'Assistant: ') + message['content'] + '\n\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}"
)
GENERATION = (  # SmolLM3 and others: marks the trained part
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ message['content'] + '<|im_end|>' }}"
    "{% endif %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@cache
def definition() -> str:
    return tokens.train(TEXT, 400, END, [name for name in SPECIAL if name != END])


def dialect(template: str) -> Dialect:
    return Dialect(definition(), template, {"bos_token": "<s>", "eos_token": END}, END)


def folder(path: Path, template: str | None) -> Path:
    """Writes a tokenizer with a chat template, like the folder of a model."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(definition()), bos_token="<s>", eos_token=END)
    if template is not None:
        tokenizer.chat_template = template
    tokenizer.save_pretrained(path)
    return path
