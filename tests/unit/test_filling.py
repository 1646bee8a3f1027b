"""Tests fill-in-the-middle requests by the command's generator and the endpoint: they have the form of the training data.

If the tokenizer has no tokens for it, the request is rejected.
"""

import asyncio
import json

import pytest
import torch
from heliostat.apps.serve.asks import Ask, Holds
from heliostat.apps.serve.replica import Replica
from heliostat.apps.serve.routes.completions import CompletionsRoute
from heliostat.curation.text import infilling as arranging
from heliostat.curation.text.infilling import Arranged, FillInTheMiddle, arrange
from heliostat.errors import ConfigError
from heliostat.inference.generate import generate, read_text
from heliostat.recipes.text.causal_lm import CausalLM
from heliostat.recipes.text.infilling import Infilling
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.unit import build_pages
from tests.unit.build_job import BASE, job
from tests.unit.test_infilling import digest, make, pages, published  # noqa: F401 (a fixture)

PREFIX, SUFFIX = "def mean(values):\n    return ", " / len(values)\n"
MOST = 8


def export(folder, made) -> None:
    """Exports a model whose random weights are large enough to give different answers."""
    changes = {"model": {**BASE["model"], "vocab_size": 448}, "data.sequence_length": 256, "train.precision": "fp32"}
    recipe = CausalLM(job(**changes))
    recipe.bind([made])
    torch.manual_seed(2)
    model = recipe.build()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(8)
    model.save_pretrained(folder)
    recipe.save_config(folder)


@pytest.fixture(scope="module")
def folders(pages, tmp_path_factory):  # noqa: F811
    folder = tmp_path_factory.mktemp("models")
    datasets = {"both": FillInTheMiddle(), "suffix first": FillInTheMiddle(spm_rate=1), "none": None}
    for name, keys in datasets.items():
        export(folder / name, published(pages, f"of {name}", make(pages, f"of {name}", keys=keys)))
    return folder


def plain(folder, tokens: list[int]) -> str:
    """Returns the most likely tokens, one after another, until the document ends."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    made = list(tokens)
    for _ in range(MOST):
        token = int(model(torch.tensor([made])).logits[0, -1].argmax())
        if token == tokenizer.eos_token_id:
            break
        made.append(token)
    return tokenizer.decode(made[len(tokens) :], skip_special_tokens=True)


@pytest.mark.parametrize("name", ["both", "suffix first"])
def test_a_prompt_has_the_tokens_that_the_data_had_before_its_middle(folders, name):
    tokenizer = AutoTokenizer.from_pretrained(folders / name)
    asked = Infilling.of(tokenizer)
    config = json.loads((folders / name / "tokenizer_config.json").read_text())
    assert config["fill_in_the_middle"] == {"tokens": ["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"],
                                            "suffix_first": name == "suffix first"}  # fmt: skip
    count = 0
    for text in [*build_pages.texts()[:30], f"a <|fim_middle|> b {PREFIX}" * 9]:
        for one in arrange(text, digest(text), FillInTheMiddle(rate=1, spm_rate=float(name == "suffix first"))):
            assert isinstance(one, Arranged)
            (tokens,) = arranging.encode(asked.tokenizer, [[one]], tokenizer.eos_token_id, asked.markers)
            prompt = asked.prompt(one.prefix, one.suffix)
            assert tokens[: len(prompt)].tolist() == prompt
            assert tokenizer.decode(tokens[len(prompt) : -1]) == one.middle
            count += 1
    assert count > 30


@pytest.mark.parametrize("name", ["both", "suffix first"])
def test_the_command_and_the_endpoint_write_the_same_middle(folders, name):
    folder = folders / name
    asked, replica = Infilling.of(AutoTokenizer.from_pretrained(folder)), Replica(Holds(str(folder), 4))
    answer = CompletionsRoute().answer
    written = set()
    for prefix, suffix in ((PREFIX, SUFFIX), (PREFIX, ") * 7\n"), *((t[:60], t[80:140]) for t in build_pages.texts()[:3])):
        made = generate(folder, prefix, {"suffix": suffix, "max_tokens": MOST, "temperature": 0.0}, 0, None)
        text = plain(folder, asked.prompt(prefix, suffix))
        assert (made.facts, made.shown) == ({"text": text, "suffix": suffix}, prefix + text + suffix)
        (found,) = asyncio.run(replica.ask(answer, Ask([prefix], None, MOST, MOST, 0.0, 1.0, [0], [], suffix=suffix)))["answers"]
        assert (found["text"], found["prompt_tokens"]) == (text, len(asked.prompt(prefix, suffix)))
        written.add(text)
    assert len(written) > 2


def test_a_tokenizer_without_the_tokens_is_one_clear_error(folders):
    folder = folders / "none"
    assert "fill_in_the_middle" not in json.loads((folder / "tokenizer_config.json").read_text())
    with pytest.raises(ConfigError, match="suffix: the model's tokenizer has no prefix, suffix, and middle tokens"):
        generate(folder, PREFIX, {"suffix": SUFFIX}, 0, None)
    replica, answer = Replica(Holds(str(folder), 4)), CompletionsRoute().answer
    made = asyncio.run(replica.ask(answer, Ask([PREFIX], None, MOST, MOST, 0.0, 1.0, [0], [], suffix=SUFFIX)))
    status, message, param, code, _ = made["refused"]
    assert (status, param, code) == (400, "suffix", "no_fill_in_the_middle") and "has no prefix, suffix, and middle" in message
    plain_one = asyncio.run(replica.ask(answer, Ask([PREFIX], None, MOST, MOST, 0.0, 1.0, [0], [])))
    assert (
        plain_one["answers"][0]["text"]
        == generate(folder, PREFIX, {"max_tokens": MOST, "temperature": 0.0}, 0, None).facts["text"]
    )


def test_what_names_a_file_is_read_as_it_is_and_anything_else_is_text(tmp_path):
    (tmp_path / "a.py").write_bytes(b"def f():\r\n\t")
    (tmp_path / "b.py").write_bytes(b"\xff")
    assert read_text("--prefix", str(tmp_path / "a.py")) == "def f():\r\n\t"
    for text in ("", "def f():\n", "x" * 5000, "a\0b", str(tmp_path)):
        assert read_text("--prefix", text) == text
    with pytest.raises(ConfigError, match=r"--suffix: .*b\.py isn't UTF-8 text"):
        read_text("--suffix", str(tmp_path / "b.py"))
