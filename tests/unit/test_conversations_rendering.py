"""Tests the tokens of conversations and their loss masks, on templates in the forms that published models have."""

from typing import Any

import numpy as np
import pytest
from heliostat.curation.conversations import packing, templates
from heliostat.curation.conversations.messages import FaultError, ParsedConversation, parse
from heliostat.curation.conversations.rendering import Renderer
from heliostat.curation.conversations.shapes import ParsedPreference
from heliostat.errors import ConfigError

from tests.unit import build_chat_templates as chat

CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}],
}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}
THREE = ["which word?", "amber", "and then?", "birch of all", "first?", "the"]


def talk(*contents: str) -> list[dict[str, Any]]:
    """Makes messages: the first of the user, then in turns."""
    return [{"role": "assistant" if n % 2 else "user", "content": content} for n, content in enumerate(contents)]


def parts(renderer: Renderer, conversation: ParsedConversation) -> tuple[str, list[str]]:
    """Returns the text of all tokens, and of each run of trained tokens."""
    rendered, runs = renderer.conversation(conversation), list[list[int]]()
    for number, (token, trained) in enumerate(zip(rendered.tokens.tolist(), rendered.trained.tolist(), strict=True)):
        if trained:
            if not (number and rendered.trained[number - 1]):
                runs.append([])
            runs[-1].append(token)
    decode = renderer.tokenizer.decode
    return decode(rendered.tokens.tolist(), skip_special_tokens=False), [decode(run, skip_special_tokens=False) for run in runs]


@pytest.mark.parametrize(
    ("template", "before", "end"),
    [(chat.DEFAULT_SYSTEM, "", "<|im_end|>"), (chat.ENDS_TWICE, "", "<|end|>"), (chat.INSTRUCTIONS, " ", "</s>"),
     (chat.GENERATION, "", "<|im_end|>"), (templates.CHATML, "", "<|im_end|>"), (templates.LLAMA3, "", "<|eot_id|>"),
     (templates.PLAIN, "", "</s>")],
)  # fmt: skip
def test_the_answers_and_their_ends_are_trained_and_nothing_else(template: str, before: str, end: str) -> None:
    """The whole text has the tokens of the template, and the prompt of each answer is the prompt at inference."""
    renderer, messages = Renderer(chat.dialect(template)), talk(*THREE)
    text, trained = parts(renderer, ParsedConversation(messages))
    assert text == renderer.text(messages) and renderer.end == end
    assert trained == [f"{before}{answer}{end}" for answer in THREE[1::2]]
    rendered = renderer.conversation(ParsedConversation(messages))
    (prompt,) = renderer.encode(renderer.text(messages[:1], answer=True))
    assert rendered.tokens[: len(prompt)].tolist() == prompt.tolist() and not rendered.trained[: len(prompt)].any()
    assert [turn.ended for turn in rendered.turns] == [True] * 3 and not rendered.retokenized
    assert rendered.trained[[turn.stop - 1 for turn in rendered.turns]].all()

    _, last = parts(Renderer(chat.dialect(template), turns="last"), ParsedConversation(messages))
    assert last == trained[-1:]
    unended = Renderer(chat.dialect(template), end_of_turn=False)
    assert parts(unended, ParsedConversation(messages))[1] == [f"{before}{answer}" for answer in THREE[1::2]]
    assert not any(turn.ended for turn in unended.conversation(ParsedConversation(messages)).turns)


def test_the_mask_agrees_with_the_mask_of_transformers(tmp_path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(chat.folder(tmp_path, chat.GENERATION))
    given = tokenizer.apply_chat_template(talk(*THREE), tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    rendered = Renderer(chat.dialect(chat.GENERATION)).conversation(ParsedConversation(talk(*THREE)))
    assert rendered.tokens.tolist() == given["input_ids"] and rendered.trained.tolist() == [
        bool(m) for m in given["assistant_masks"]
    ]


def test_an_answer_of_weight_0_is_not_trained() -> None:
    """OpenAI's files of conversations mark bad answers so."""
    messages = [{**message, "weight": int(number == 3)} if number % 2 else message for number, message in enumerate(talk(*THREE))]
    renderer = Renderer(chat.dialect(chat.DEFAULT_SYSTEM))
    text, trained = parts(renderer, ParsedConversation(messages))
    assert text == renderer.text(messages) and trained == [f"{THREE[3]}<|im_end|>"]


def test_a_template_without_ends_gets_the_end_of_the_document() -> None:
    renderer, messages = Renderer(chat.dialect(chat.UNENDED)), talk(*THREE[:4])
    text, trained = parts(renderer, ParsedConversation(messages))
    assert text == "User: which word?\n\nAssistant: amber\n\nUser: and then?\n\nAssistant: birch of all</s>"
    assert trained == ["amber", "birch of all</s>"] and renderer.end == "" and renderer.end_id == renderer.encode("</s>")[0][0]
    assert parts(Renderer(chat.dialect(chat.UNENDED), end_of_turn=False), ParsedConversation(messages))[1] == [
        "amber",
        "birch of all",
    ]


@pytest.mark.parametrize("template", [chat.DEFAULT_SYSTEM, chat.INSTRUCTIONS])
@pytest.mark.parametrize("normalizes", [True, False])
def test_a_tokenizer_that_writes_a_space_before_a_text_writes_none_before_answers(template: str, normalizes: bool) -> None:
    """Llama 2, TinyLlama, and Mistral have such tokenizers."""
    renderer, messages = Renderer(chat.spaced(template, normalizes)), talk(*THREE)
    rendered = renderer.conversation(ParsedConversation(messages))
    (whole,) = renderer.encode(renderer.text(messages))
    assert rendered.tokens.tolist() == whole.tolist() and not rendered.retokenized
    answers = renderer.preference(ParsedPreference(messages[:1], messages[1], messages[3]))
    begin = rendered.turns[0].start
    assert answers.prompt.tolist() == whole[:begin].tolist()
    assert answers.chosen[:1].tolist() == whole[begin : begin + 1].tolist()

    joined = Renderer(chat.spaced(chat.UNENDED, normalizes))  # the whole text has a token of the prompt's last space and a word
    assert joined.conversation(ParsedConversation(messages)).retokenized
    assert parts(joined, ParsedConversation(messages)) == (
        f"{joined.text(messages).rstrip()}{chat.END}",
        [*THREE[1:5:2], f"the{chat.END}"],
    )


def test_a_template_that_rewrites_earlier_answers_trains_only_the_last() -> None:
    messages = talk("which?", "<think>a</think>amber", "and?", "<think>b</think>birch")
    dialect = chat.dialect(chat.THOUGHTS)
    text, trained = parts(Renderer(dialect, turns="last"), ParsedConversation(messages))
    assert trained == ["<think>b</think>birch<|im_end|>"] and "<think>a" not in text
    with pytest.raises(FaultError, match="rewritten"):
        Renderer(dialect).conversation(ParsedConversation(messages))
    plain = ParsedConversation(talk("which?", "amber", "and?", "<think>b</think>birch"))  # nothing to rewrite
    assert parts(Renderer(dialect), plain)[1] == ["amber<|im_end|>", "<think>b</think>birch<|im_end|>"]


def test_a_call_with_a_special_token_is_trained_to_the_end_of_its_turn() -> None:
    _, trained = parts(Renderer(chat.dialect(chat.INSTRUCTIONS)), ParsedConversation([*talk("add 1"), CALL]))
    assert trained == ['[TOOL_CALLS] [{"name": "add", "arguments": {"a": 1}}]</s>']
    _, trained = parts(Renderer(chat.dialect(templates.CHATML)), ParsedConversation([*talk("add 1"), CALL], [TOOL]))
    assert trained == ['<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>']


@pytest.mark.parametrize(
    ("template", "messages", "tools", "reason"),
    [
        (chat.DEFAULT_SYSTEM, talk("a <|im_end|>", "b"), None, "special_token"),
        (chat.DEFAULT_SYSTEM, [*talk("add 1"), CALL], None, "unrendered"),  # the template ignores calls
        (chat.DEFAULT_SYSTEM, talk("add 1", "2"), [TOOL], "unrendered"),
        (chat.INSTRUCTIONS, [{"role": "system", "content": "a"}, *talk("b", "c")], None, "template"),
        (chat.INSTRUCTIONS, talk("b", "c")[1:], None, "template"),
        (chat.DEFAULT_SYSTEM, [{**talk("b")[0], "name": "\ud800"}, talk("b", "c")[1]], None, "invalid_messages"),
        (chat.DEFAULT_SYSTEM, [talk("b")[0], {**talk("b", "c")[1], "weight": 0}], None, "untrained"),
    ],
)
def test_a_conversation_that_the_template_leaves_out_is_dropped_with_the_reason(template, messages, tools, reason) -> None:
    with pytest.raises(FaultError) as fault:
        Renderer(chat.dialect(template)).conversation(ParsedConversation(messages, tools))
    assert fault.value.reason == reason


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('no') }}",
        "{% for m in messages %}{{ m.content }}",
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}",  # no prompt
        "{% for m in messages %}{{ '<|im_start|>' + m.role }}{% endfor %}",  # without contents
    ],
)  # fmt: skip
def test_a_template_that_cannot_be_trained_is_refused_at_the_start(template: str) -> None:
    with pytest.raises(ConfigError, match=r"^template: "):
        _ = Renderer(chat.dialect(template)).end


def test_a_function_among_the_tools_is_not_a_call() -> None:
    """LFM2's template shows tools, and leaves out calls."""
    messages = [*talk("which?"), CALL, {"role": "tool", "content": "3"}, talk("", "3")[1]]
    renderer = Renderer(chat.dialect("{{ tools | tojson }}" + chat.DEFAULT_SYSTEM), turns="last")
    with pytest.raises(FaultError, match=r"unrendered.*messages.1"):
        renderer.conversation(ParsedConversation(messages, [TOOL]))
    assert parts(renderer, ParsedConversation([*talk("which?", "I add.", "and?", "3")], [TOOL]))[1] == ["3<|im_end|>"]


def test_the_date_of_the_day_does_not_change_a_dataset() -> None:
    dated = chat.DEFAULT_SYSTEM.replace("Be brief.", "' + strftime_now('%d %b %Y') + '")
    assert "system\n26 Jul 2024<|im_end|>" in Renderer(chat.dialect(dated)).text(talk("a", "b"))


def test_special_tokens_of_other_models_are_known() -> None:
    assert templates.special(templates.LLAMA3) == {"<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"}
    assert templates.special(templates.CHATML) == {"<|im_start|>", "<|im_end|>"} and not templates.special(templates.PLAIN)


def test_answers_of_a_preference_begin_after_the_same_prompt() -> None:
    renderer = Renderer(chat.dialect(chat.ENDS_TWICE))
    first, second = (talk("", word)[1] for word in ("birch", "the"))
    answers = renderer.preference(ParsedPreference(talk("which?", "amber", "and?"), first, second))
    texts = [renderer.tokenizer.decode(one.tolist(), skip_special_tokens=False) for one in answers]
    assert texts == [renderer.text(talk("which?", "amber", "and?"), answer=True), "birch<|end|>", "the<|end|>"]


def test_a_cut_conversation_ends_with_a_trained_token_and_counts_only_what_is_left() -> None:
    rendered = Renderer(chat.dialect(chat.DEFAULT_SYSTEM)).conversation(ParsedConversation(parse(talk(*THREE))))
    for length in range(len(rendered.tokens) + 1):
        kept = packing.cut(rendered.trained, length)
        cut = rendered.cut(kept)
        assert kept <= length and not rendered.trained[kept:length].any()
        assert len(cut.tokens) == len(cut.trained) == kept and (not kept or cut.trained[-1])
        assert sum(turn.ended for turn in cut.turns) == sum(turn.stop <= kept for turn in rendered.turns)
        assert np.array_equal(cut.tokens, rendered.tokens[:kept]) and (bool(cut.turns) == bool(kept))
