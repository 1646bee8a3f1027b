"""Tests decoding of growing answers: the text equals that of all tokens at once, and the cost doesn't grow with the answer."""

import queue
import random
from types import SimpleNamespace

import pytest
from heliostat.apps.serve.asks import UNFINISHED
from heliostat.apps.serve.row import LONG, Growing, Row, Stopping, Telling, ending
from heliostat.errors import ConfigError
from heliostat.inference.sampling import Draw
from tokenizers import Tokenizer
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from tests.unit.test_tokenizers import KINDS, TEXTS, trained

HARD = " \N{GRINNING FACE} 日本語のテキスト  မြန်မာဘာသာ é\u0301\u200d👩‍👩‍👧  two  spaces\n\n\ttab ᚠᛇᚻ\u2060 ‎ "


def tokenizer(kind: str) -> PreTrainedTokenizerFast:
    made = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(trained(kind, 8)))
    made.add_special_tokens({"additional_special_tokens": ["<|unseen|>"]})
    return made


def answers(made: PreTrainedTokenizerFast) -> list[list[int]]:
    """Returns real texts, texts of mostly single bytes, special tokens among them, and random tokens."""
    draw, unseen = random.Random(0), made.convert_tokens_to_ids("<|unseen|>")
    texts = ["".join(TEXTS)[:2000], HARD * 20, "".join(draw.choices(HARD, k=600)), "\N{GRINNING FACE}" * 150, " " * 200]
    real = [made(text, add_special_tokens=False)["input_ids"] for text in texts]
    special = [token for id in real[1] for token in ([unseen] * draw.randint(0, 3) + [id])]
    real = [tokens for tokens in real if tokens]
    return [*real, special, [unseen] * 60 + real[0], draw.choices(range(len(made)), k=500)]


@pytest.mark.parametrize("stops", [[], ["\n\n\tnever", "日x"]])
@pytest.mark.parametrize("kind", KINDS)
def test_the_text_that_is_sent_is_that_of_all_tokens_decoded_at_once(kind, stops):
    made = tokenizer(kind)
    telling = Telling(made, [])
    asked = answers(made)
    if kind == "byte fallback":
        asked.pop()  # at random, a byte that is no text takes the text of those before it away, which has been sent
    for number, tokens in enumerate(asked):
        pieces: queue.Queue = queue.Queue()
        row = Row([0], len(tokens), Draw(1.0, 1.0, 0), Stopping(stops), pieces.put)
        for token in tokens:
            telling.take(row, token, None)
        text = "".join(piece["text"] for piece in pieces.queue)
        assert text == made.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False), number
        assert row.over


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_grows_with_each_token_and_what_waits_does_not(kind):
    made, growing, longest = tokenizer(kind), Growing(), 0
    tokens = (made(HARD * 60, add_special_tokens=False)["input_ids"] * 3)[:4000]
    for token in tokens:
        growing.add(token, made.backend_tokenizer)
        growing.drop(max(0, len(growing.unsent) - 40))
        longest = max(longest, len(growing.waiting))
    assert longest < LONG


@pytest.mark.parametrize("kind", ["byte-level", "byte fallback"])
def test_bytes_that_are_no_text_are_sent_and_end_nothing(kind):
    """They don't wait forever, and neither does the text after them. DecodeStream alone keeps them all, or raises an error."""
    made, growing = tokenizer(kind), Growing()
    first, *_, last = made("\N{GRINNING FACE}", add_special_tokens=False)["input_ids"]
    for number in range(2 * LONG):
        growing.add(last, made.backend_tokenizer)
        assert growing.unsent or number < LONG
    assert set(growing.unsent) == {UNFINISHED}
    growing.drop(len(growing.unsent))
    word = made("value", add_special_tokens=False)["input_ids"]
    for token in [*word, first, *word, last, *word]:
        growing.add(token, made.backend_tokenizer)
    assert growing.unsent.count("value") == 3 and len(growing.waiting) < LONG


def test_a_tokenizer_whose_text_cannot_be_decoded_as_it_grows_is_one_error():
    with pytest.raises(ConfigError, match="isn't from the tokenizers library"):
        ending(SimpleNamespace(tokenizer=ByT5Tokenizer()), None)
