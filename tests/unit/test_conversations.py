"""Tests the shapes of conversations and preferences, and the packs that conversations become."""

import json
import random
from itertools import pairwise
from typing import Any

import pytest
from heliostat.curation.conversations import packing, shapes
from heliostat.curation.conversations.messages import FaultError, ParsedConversation, parse

ASK, ANSWER = {"role": "user", "content": "which?"}, {"role": "assistant", "content": "amber"}
SYSTEM = {"role": "system", "content": "Be brief."}
SAME = [ASK, ANSWER]
CALL = {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function", "function": {
    "name": "add", "arguments": '{"a": 1, "b": null}'}}]}  # fmt: skip


@pytest.mark.parametrize(
    "record",
    [
        {"messages": SAME},
        {"messages": json.dumps(SAME), "source": "a table"},
        {
            "messages": [
                {**ASK, "content": [{"type": "text", "text": "whi"}, "ch?"], "name": None},
                {**ANSWER, "tool_calls": None},
            ]
        },
        {"prompt": "which?", "completion": "amber"},
        {"prompt": [ASK], "completion": [ANSWER]},
        {"prompt": json.dumps([ASK]), "completion": "amber"},
        {"instruction": "which?", "input": "", "output": "amber"},
        {"instruction": "which?", "input": None, "output": "amber", "text": "all of it"},
        {"conversations": [{"from": "human", "value": "which?"}, {"from": "gpt", "value": "amber"}], "id": 1},
        {"conversations": [{"role": "user", "content": "which?"}, {"role": "assistant", "content": "amber"}]},
    ],
    ids=lambda record: "-".join(record),
)
def test_equal_conversations_of_all_shapes_are_equal(record: dict[str, Any]) -> None:
    made = shapes.conversation(record, "auto")
    assert made == ParsedConversation(SAME) and made.text == "user: which?\n\nassistant: amber"


def test_a_system_prompt_and_calls_keep_their_places() -> None:
    answer = {"role": "tool", "content": "3", "tool_call_id": "1"}
    made = shapes.conversation(
        {"messages": [{"role": "system", "content": "Add."}, ASK, CALL, answer, ANSWER, ASK], "tools": []}, "auto"
    )
    assert [m["role"] for m in made.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert made.messages[2]["tool_calls"][0]["function"]["arguments"] == {"a": 1, "b": None}
    assert made.trailing == 1 and made.tools is None and 'add({"a": 1, "b": null})' in made.text
    assert made.messages[3] == answer  # templates read further keys
    head = shapes.conversation({"system": "Add.", "instruction": "1", "input": "2", "output": "3"}, "alpaca").messages
    assert [m["content"] for m in head] == ["Add.", "1\n\n2", "3"]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"text": "a"}, "no_shape"),
        ({"messages": None}, "no_shape"),
        ({"messages": SAME, "prompt": "a", "completion": "b"}, "several_shapes"),
        ({"messages": "{"}, "invalid_messages"),
        ({"messages": ["a"]}, "invalid_messages"),
        ({"messages": [{**ASK, "content": 1}]}, "invalid_messages"),
        ({"messages": [{**ASK, "content": [{"type": "image", "url": "a"}]}]}, "invalid_messages"),
        ({"messages": [{**ASK, "role": "bot"}]}, "unknown_role"),
        ({"messages": [{"content": "a"}]}, "unknown_role"),
        ({"conversations": [{"from": "alien", "value": "a"}]}, "unknown_role"),
        ({"messages": [{**ASK, "content": " \n"}]}, "empty_turn"),
        ({"prompt": "a", "completion": ""}, "empty_turn"),
        ({"messages": [ASK]}, "no_answer"),
        ({"messages": []}, "no_answer"),
        ({"messages": [{**ASK, "role": ["user"]}]}, "unknown_role"),
        ({"conversations": [{"from": {"a": 1}, "value": "a"}]}, "unknown_role"),
        ({"prompt": "a", "completion": "b", "system": ["c"]}, "invalid_messages"),
        ({"messages": [ASK, {**ANSWER, "weight": 0.5}]}, "invalid_messages"),
        ({"messages": [ASK, {**CALL, "tool_calls": [{"function": {"name": "add", "arguments": "{a}"}}]}]}, "invalid_tool_call"),
        ({"messages": [ASK, {**CALL, "tool_calls": [{"function": {"name": "add", "arguments": "[1]"}}]}]}, "invalid_tool_call"),
        ({"messages": [ASK, {**CALL, "tool_calls": [{"function": {"arguments": "{}"}}]}]}, "invalid_tool_call"),
        ({"messages": [{**CALL, "role": "user"}, ANSWER]}, "invalid_tool_call"),
    ],
)  # fmt: skip
def test_what_is_no_conversation_is_dropped_with_the_reason(record: dict[str, Any], reason: str) -> None:
    with pytest.raises(FaultError) as fault:
        shapes.conversation(record, "auto")
    assert fault.value.reason == reason


def test_the_common_beginning_of_two_conversations_is_the_prompt() -> None:
    other = {"role": "assistant", "content": "birch"}
    for record in (
        {"prompt": "which?", "chosen": "amber", "rejected": "birch"},
        {"prompt": [ASK], "chosen": [ANSWER], "rejected": [other]},
        {"chosen": [ASK, ANSWER], "rejected": [ASK, other]},
        {"prompt": "which?", "chosen": json.dumps([ASK, ANSWER]), "rejected": json.dumps([ASK, other])},
        {"prompt": "which? ", "chosen": [ASK, ANSWER], "rejected": [ASK, other]},
    ):
        made = shapes.preference(record)
        assert (made.prompt, made.chosen, made.rejected) == ([ASK], ANSWER, other)
        assert made.text == "user: which?\n\nchosen: amber\n\nrejected: birch"


def test_a_question_after_a_system_prompt_is_not_repeated() -> None:
    system, other = {"role": "system", "content": "Be brief."}, {"role": "assistant", "content": "birch"}
    for head in ({"system": "Be brief.", "prompt": "which?"}, {"prompt": [system, ASK]}):
        for begin in ([], [ASK], [system, ASK]):
            assert shapes.preference({**head, "chosen": [*begin, ANSWER], "rejected": [*begin, other]}).prompt == [system, ASK]
    record = {"prompt": "which?", "chosen": [system, ASK, ANSWER], "rejected": [system, ASK, other]}
    assert shapes.preference(record).prompt == [system, ASK]


def test_an_output_that_is_json_stays_a_text() -> None:
    record = {"instruction": "Write messages.", "output": json.dumps(SAME)}
    assert shapes.conversation(record, "auto").messages[1] == {"role": "assistant", "content": json.dumps(SAME)}


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "same_answers"),
        ({"prompt": "a", "chosen": "b"}, "no_shape"),
        ({"chosen": "a", "rejected": "b"}, "no_prompt"),
        ({"chosen": [ASK, ANSWER], "rejected": [ASK]}, "several_turns"),
        ({"chosen": [ASK, ANSWER], "rejected": [{**ASK, "content": "else"}, ANSWER]}, "other_prompt"),
        ({"prompt": "else", "chosen": [ASK, ANSWER], "rejected": [ASK, {**ANSWER, "content": "no"}]}, "other_prompt"),
        (
            {"prompt": [ASK], "chosen": [SYSTEM, ASK, ANSWER], "rejected": [SYSTEM, {**ASK, "content": "no"}, ANSWER]},
            "other_prompt",
        ),
    ],
)
def test_what_is_no_preference_is_dropped_with_the_reason(record: dict[str, Any], reason: str) -> None:
    with pytest.raises(FaultError) as fault:
        shapes.preference(record)
    assert fault.value.reason == reason


def test_conversations_with_the_same_first_question_have_the_same_prompt() -> None:
    system, late = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "and?"}
    pair = [ASK, ANSWER]
    prompts = {ParsedConversation(m).prompt for m in (pair, [system, *pair], [ANSWER, *pair], [*pair, late, ANSWER])}
    assert len(prompts) == 1 and prompts != {ParsedConversation([late, ANSWER]).prompt}


def test_exchanges_begin_with_the_user_and_have_an_answer() -> None:
    system = {"role": "system", "content": "Be brief."}
    messages = parse([system, ASK, ASK, ANSWER, ASK, CALL, {"role": "tool", "content": "3"}, ANSWER, ANSWER, ASK, ANSWER])
    head, exchanges = ParsedConversation(messages).exchanges()
    assert head == [system] and [m for exchange in exchanges for m in exchange] == messages[1:]
    assert [len(exchange) for exchange in exchanges] == [3, 5, 2]
    assert all(one[0] == ASK and any(m["role"] == "assistant" for m in one) for one in exchanges)


def first_fit(lengths: list[int], room: int) -> int:
    """Returns the number of packs that conversations need in their order, each in the first pack with room."""
    left: list[int] = []
    for length in lengths:
        place = next((n for n, free in enumerate(left) if free >= length), None)
        if place is None:
            left.append(room - length)
        else:
            left[place] -= length
    return len(left)


def test_packs_have_each_conversation_once_and_are_at_least_as_full_as_by_first_fit() -> None:
    rng, fewer = random.Random(5), 0
    for _ in range(300):
        room = rng.randint(1, 200)
        lengths = [rng.randint(1, room) for _ in range(rng.randint(0, 60))]
        packs = packing.best_fit(lengths, room)
        assert sorted(n for pack in packs for n in pack) == list(range(len(lengths)))
        assert all(0 < sum(lengths[n] for n in pack) <= room for pack in packs)
        assert all(a < b for pack in packs for a, b in pairwise(pack)) and packs == sorted(packs)
        assert len(packs) <= first_fit(lengths, room)
        fewer += len(packs) < first_fit(lengths, room)
    assert fewer > 50
    assert packing.best_fit([3, 8, 5, 2, 7], 10) == [[0, 4], [1, 3], [2]]
