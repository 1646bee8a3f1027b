"""Tests an HTTP server and a replica in one process with OpenAI's own client: prompts as tokens, and logprobs of chats."""

from typing import Any

import openai
import pytest
import transformers

from tests.unit.build_job import BASE
from tests.unit.build_language_model import write_model
from tests.unit.page import client, opened

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
NAME = "model"
ASKED: dict[str, Any] = {"model": NAME, "prompt": "a b", "max_tokens": 12, "seed": 3, "temperature": 0.9}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = write_model(tmp_path_factory.mktemp("writer"), BASE["model"], 512)
    tokenizer = transformers.AutoTokenizer.from_pretrained(made)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(made)
    return made


@pytest.fixture(scope="module")
def ask(folder):
    with opened(folder) as url:
        yield client(url)


def test_tokens_are_prompts_as_the_texts_that_they_are_of(ask, folder):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    first, second = (tokenizer(text)["input_ids"] for text in ("a b", "c d e f"))
    wanted = [choice.text for choice in ask.completions.create(**{**ASKED, "prompt": ["a b", "c d e f"]}).choices]
    assert [choice.text for choice in ask.completions.create(**{**ASKED, "prompt": [first, second]}).choices] == wanted
    assert ask.completions.create(**{**ASKED, "prompt": first}).choices[0].text == wanted[0]
    for more, param in (
        ({"prompt": [10**9]}, "prompt"),
        ({"prompt": first, "suffix": "a"}, "suffix"),
        ({"prompt": [[]]}, "prompt"),
    ):
        with pytest.raises(openai.BadRequestError) as refused:
            ask.completions.create(**{**ASKED, **more})
        assert refused.value.param == param


def test_logprobs_of_a_chat_are_those_of_the_completion_of_its_prompt(ask):
    asked: dict[str, Any] = {"model": NAME, "max_tokens": 9, "seed": 1, "temperature": 0.9}
    messages: Any = [{"role": "user", "content": "a"}]
    plain = ask.completions.create(**asked, prompt="user: a\nassistant:", logprobs=2).choices[0]
    made = ask.chat.completions.create(**asked, messages=messages, logprobs=True, top_logprobs=2).choices[0]
    assert made.message.content == plain.text
    assert [one.token for one in made.logprobs.content] == plain.logprobs.tokens
    assert [one.logprob for one in made.logprobs.content] == pytest.approx(plain.logprobs.token_logprobs, abs=1e-4)
    for one, best in zip(made.logprobs.content, plain.logprobs.top_logprobs, strict=True):
        assert {top.token: top.logprob for top in one.top_logprobs} == pytest.approx(best, abs=1e-4)
        assert one.bytes is None or bytes(one.bytes).decode() == one.token
    alone = ask.chat.completions.create(**asked, messages=messages, logprobs=True).choices[0].logprobs.content
    assert [one.token for one in alone] == plain.logprobs.tokens and not any(one.top_logprobs for one in alone)
    stream = ask.chat.completions.create(**asked, messages=messages, logprobs=True, stream=True)
    pieces = [one for chunk in stream for one in (chunk.choices[0].logprobs.content or [])]
    assert [one.token for one in pieces] == plain.logprobs.tokens
    assert ask.chat.completions.create(**asked, messages=messages).choices[0].logprobs is None
