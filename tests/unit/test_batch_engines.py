"""Tests engines of batch inference: an answer depends only on its input, not on its batch, and an input without an answer doesn't
stop the run."""

import math
import shutil

import pytest
import torch
import transformers
from heliostat.errors import ConfigError, HeliostatError
from heliostat.inference.batch import engines
from heliostat.inference.batch.engines import Continue, Embed, Input, Score
from heliostat.inference.batch.tasks import BatchSettings
from heliostat.recipes.text.generator import Sampling
from heliostat.recipes.text.server import continue_text
from heliostat.schema import validate

from tests.unit.build_language_model import ARCHITECTURES, PROMPTS, write_model


@pytest.fixture(scope="module", params=ARCHITECTURES)
def any_model(request, tmp_path_factory):
    return write_model(tmp_path_factory.mktemp(request.param), ARCHITECTURES[request.param])


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_continuation_is_the_same_in_any_batch(any_model, temperature):
    """The answer is the same alone, after other inputs, and before others, with its own random numbers if there are any."""
    engine = Continue(any_model, 4, {"max_tokens": 6, "temperature": temperature})
    together = [answer.values for answer in engine(PROMPTS)]
    assert together == [engine([one])[0].values for one in PROMPTS]
    assert together == [answer.values for answer in engine(PROMPTS[::-1])][::-1]
    if temperature:
        assert together[0] != together[6]  # the same prompt with another seed


def test_the_likeliest_continuation_is_that_of_a_plain_loop(model):
    engine = Continue(model, 4, {"max_tokens": 6, "temperature": 0})
    plain = [continue_text(engine.model, engine.tokenizer, one.text, 6, 0, 1.0, 0) for one in PROMPTS]
    assert [answer.values["answer"] for answer in engine(PROMPTS)] == plain


def test_a_folder_that_samples_in_its_own_way_changes_no_answer(model, tmp_path):
    """Draws follow the model within temperature and top_p. A penalty in generation_config.json doesn't change them."""
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    named = transformers.GenerationConfig(repetition_penalty=9.0, no_repeat_ngram_size=1, top_k=1, do_sample=True)
    named.save_pretrained(folder)
    options = {"max_tokens": 8, "temperature": 0.9}
    one, other = ([answer.values for answer in Continue(place, 4, options)(PROMPTS)] for place in (model, folder))
    assert one == other


def test_noise_draws_from_the_softmax():
    """Of 4,000 draws, each of four tokens appears as often as its probability, within five standard deviations, and none is
    beyond top_p."""
    logits, draws = torch.tensor([[1.0, 0.0, -1.0, -4.0]]), 4000
    noise = engines.Noise(range(draws), Sampling(temperature=0.7, top_p=0.97))
    chosen = noise(torch.zeros(draws, 1, dtype=torch.long), logits.repeat(draws, 1)).argmax(-1)
    shares = torch.softmax(logits[0] / 0.7, -1)
    shares[3] = 0  # the others have 0.99 of the probability
    shares /= shares.sum()
    for token, share in enumerate(shares.tolist()):
        count = int((chosen == token).sum())
        assert abs(count - draws * share) <= 5 * math.sqrt(draws * share * (1 - share)), (token, count)


def test_a_score_is_the_sum_over_its_tokens_in_any_batch(any_model):
    """The score equals that of one text at a time without padding. Bits per byte count the text's own bytes."""
    engine = Score(any_model, 3)
    texts = [one for one in PROMPTS if one.text]
    for answer, one in zip(engine(texts), texts, strict=True):
        ids = torch.tensor([engine.encode(one.text)])
        with torch.no_grad():
            logits = engine.model(input_ids=ids).logits[0, :-1].double()
        nats = float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
        assert answer.values["nats"] == pytest.approx(nats, rel=1e-5)
        assert answer.values["bits_per_byte"] == pytest.approx(nats / math.log(2) / len(one.text.encode()), rel=1e-5)


def test_an_embedding_is_the_same_in_any_batch_and_of_length_one(any_model):
    engine = Embed(any_model, 3)
    texts = [one for one in PROMPTS if one.text]
    for answer, one in zip(engine(texts), texts, strict=True):
        vector = torch.tensor(answer.values["embedding"])
        assert float(vector.norm()) == pytest.approx(1, rel=1e-5)
        torch.testing.assert_close(vector, torch.tensor(engine([one])[0].values["embedding"]), rtol=1e-4, atol=1e-5)


def test_what_cannot_be_answered_is_said_and_stops_nothing(model, monkeypatch):
    engine = Continue(model, 4, {"max_tokens": 6, "temperature": 0})
    long = Input("a " * 200, 0)
    first, refused, last = engine([PROMPTS[0], long, PROMPTS[2]])
    assert (refused.bad, first.bad, last.bad) == ("too_long", "", "") and "the model has room for" in refused.detail
    whole = Score(model, 4)([long])[0].values
    assert whole["truncated"] and whole["tokens"] == engine.longest - 1
    plain = engine.answer
    monkeypatch.setattr(engine, "answer", lambda tokens, inputs: 1 / 0 if PROMPTS[2] in inputs else plain(tokens, inputs))
    answers = engine(PROMPTS[:3])
    assert [a.bad for a in answers] == ["", "", "failed"] and "ZeroDivisionError" in answers[2].detail


def test_a_model_that_answers_nothing_ends_the_run(model, monkeypatch):
    """The inputs aren't the cause. Otherwise all of them would be listed as bad, and never be processed again."""
    engine = Continue(model, 4, {"max_tokens": 6})
    monkeypatch.setattr(engine, "answer", lambda tokens, inputs: 1 / 0)
    with pytest.raises(HeliostatError, match="The first input failed with: ZeroDivisionError"):
        engine(PROMPTS)


def test_an_engine_that_has_died_ends_the_run_though_one_answer_was_made(model, monkeypatch):
    engine = Continue(model, 1, {"max_tokens": 4})
    plain = engine.answer

    def answer(tokens, inputs):
        if inputs[0] is PROMPTS[4]:  # the longest is the last
            raise torch.AcceleratorError("an illegal memory access was encountered")
        return plain(tokens, inputs)

    monkeypatch.setattr(engine, "answer", answer)
    with pytest.raises(HeliostatError, match=r"the engine has died .AcceleratorError: an illegal memory access"):
        engine(PROMPTS)


@pytest.mark.parametrize(
    "asked", [{"keep": ["id"]}, {"keep": ["text"]}, {"column": "answer"}, {"task": "score", "keep": ["nats"]}]
)
def test_columns_of_one_name_are_refused(asked):
    with pytest.raises(ConfigError, match="two columns"):
        validate(BatchSettings, asked, "infer")


def test_padding_that_changes_an_answer_is_found(model):
    """The attention of this model sees padding, so prompts of different lengths can't share a batch."""
    engine = Continue(model, 4, {"max_tokens": 4, "temperature": 0})
    assert engine.pads and not engine.apart(2, 3)
    forward = engine.model.forward
    engine.model.forward = lambda input_ids, attention_mask=None, position_ids=None, **more: forward(input_ids, **more)
    assert not engines.pads_hold(engine)
    engine.pads = False
    assert [len(b) for b in engine.batches({0: 2, 1: 2, 2: 3, 3: 2})] == [3, 1]
