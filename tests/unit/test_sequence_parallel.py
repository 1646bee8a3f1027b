"""Tests that `train.parallel.sequence` is rejected before the start where samples can't be split over workers, with the reason
and an alternative.

The parts of a batch have its tokens, positions, and targets.
"""

import re

import numpy as np
import pytest
import torch
from heliostat.errors import ConfigError
from heliostat.parallel import cutting
from heliostat.plan import planner
from heliostat.recipes.conformance import require_abilities
from heliostat.recipes.protocol import IGNORED
from heliostat.recipes.text.causal_lm import CausalLM
from heliostat.validation import check

from tests.unit.build_job import BASE, job
from tests.unit.build_recipe import Around
from tests.unit.test_causal_lm import END, recipe
from tests.unit.test_spec import faults

KEY = "train.parallel.sequence"
TWO = {KEY: 2, "workers.count": 2}


def refusal(**changes) -> str:
    with pytest.raises(ConfigError) as e:
        check.check_job(job(**{**TWO, **changes}))
    assert "\n" not in str(e.value)
    return str(e.value)


@pytest.mark.parametrize("sequence", range(2, 9))
@pytest.mark.parametrize("workers", range(1, 13))
def test_workers_are_a_multiple_of_those_that_share_a_sample(workers, sequence):
    """Only such a job is valid, and the numbers of workers in the error work."""
    changes = {KEY: sequence, "train.global_batch_size": 60, "train.micro_batch_size": 1, "data.sequence_length": 840}
    replicas = workers // sequence
    if workers % sequence == 0 and 60 % replicas == 0:
        made = job(**changes, **{"workers.count": workers})
        assert made.replicas == replicas and made.accumulation * replicas == 60
        return
    if workers % sequence == 0:
        return
    (line,) = faults(**changes, **{"workers.count": workers})
    offered = re.search(r"Use ([\d or]+) workers", line)
    assert line.startswith(f"{KEY}: {sequence} doesn't divide workers.count {workers}. ") and offered
    for number in map(int, offered[1].split(" or ")):
        assert job(**changes, **{"workers.count": number}).replicas == number / sequence


@pytest.mark.parametrize("key", ["pipeline", "context", "data"])
def test_layouts_that_are_not_offered_are_refused_by_name(key):
    """The error has the reason and an alternative. The same holds for configurations by DeepSpeed's own keys."""
    (line,) = faults(**{f"train.parallel.{key}": 2})
    assert (
        line.startswith(f"train.parallel: {key} isn't supported: ") and ". Remove this key (docs/training/parallelism.md#" in line
    )


def test_an_elastic_run_has_multiples_of_those_that_share_a_sample():
    assert job(**{KEY: 2, "workers.count": [1, 8]}).worker_counts() == [2, 4, 8]
    (line,) = faults(**{KEY: 4, "workers.count": [1, 3]})
    assert line == f"{KEY}: 4: no number from 1 to 3 (workers.count) is a multiple of this number. Change one of the two keys"


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"data.sequence_length": 63}, f"{KEY}: 2 doesn't divide data.sequence_length 63. Use a length of 62 or 64"),
        ({"train.compile": True}, f"{KEY}: 2 isn't supported with train.compile. Set train.compile to false"),
        (
            {"train.sdc_check": {"every": 5}},
            f"{KEY}: 2 isn't supported with train.sdc_check, which compares complete samples. Remove train.sdc_check",
        ),
        (
            {"train.global_batch_size": 10, "workers.count": 8},
            "train.global_batch_size: 10 isn't divisible by workers.count 8 / train.parallel.sequence 2 x "
            "train.micro_batch_size 2. Use a global batch of 8 or 16, or workers.count 10",
        ),
    ],
)
def test_what_cannot_hold_it_is_refused_by_name(changes, line):
    assert faults(**{**TWO, **changes}) == [line]


def test_another_recipe_is_refused_and_told_what_it_lacks():
    with pytest.raises(
        ConfigError,
        match=rf"{KEY}: .* doesn't support sequence parallelism.* derive the recipe from heliostat.recipes.protocol.CutsSamples",
    ):
        require_abilities(job(**TWO, evaluate=None), Around(torch.nn.Module))


@pytest.mark.parametrize(
    ("heads", "shared", "workers", "fits"),
    [(4, 2, 8, "1 or 2 or 4"), (6, 2, 3, "1 or 2 or 6"), (6, 6, 4, "1 or 2 or 3 or 6"), (12, 3, 2, "1 or 3 or 6 or 12")],
)
def test_heads_that_workers_cannot_share_are_refused_with_what_works(heads, shared, workers, fits):
    """There may be fewer heads of keys and values than workers. Several workers then hold each head."""
    model = {**BASE["model"], "hidden_size": 8 * heads, "num_attention_heads": heads, "num_key_value_heads": shared}
    changes = {"model": model, "data.sequence_length": 192, "train.micro_batch_size": 1}
    line = refusal(**changes, **{KEY: workers, "workers.count": workers})
    both = f"{heads} attention heads" + (f" and {shared} key/value heads" if shared < heads else "")
    assert f"{workers} workers can't share the model's {both} evenly. Use {fits} (" in line
    for number in map(int, fits.split(" or ")):
        check.check_job(job(**changes, **{KEY: number, "workers.count": number}))


@pytest.mark.parametrize("arch", ["llama", "qwen3", "mistral", "gpt2", "gpt_neox", "olmo2", "phi", "mixtral"])
@pytest.mark.parametrize("documents", [False, True])
def test_an_architecture_whose_attention_alone_mixes_tokens_is_taken(arch, documents):
    """A small model's logits for split samples equal those for whole ones, also with separate packed documents."""
    recipe({"arch": arch}, **{**TWO, "data.document_mask": documents}).probe()


@pytest.mark.parametrize(
    ("model", "why"),
    [
        ({"arch": "mamba"}, "which has no attention heads"),
        ({"arch": "bloom"}, "only the implementation 'eager'"),
        ({"arch": "gpt_oss"}, "only the implementation 'eager'"),
        ({"arch": "deepseek_v3"}, "widths of queries, keys, and values"),
        ({"arch": "mistral", "sliding_window": 32}, "something other than full attention mixes tokens"),
        ({"arch": "gemma3_text", "sliding_window": 32}, "something other than full attention mixes tokens"),
        pytest.param({"arch": "qwen3_next"}, "something other than full attention mixes tokens", marks=pytest.mark.ci),
        ({"arch": "mixtral", "output_router_logits": True}, "the router's loss of 'mixtral', which needs whole samples"),
    ],
)
def test_an_architecture_that_mixes_tokens_otherwise_is_refused(model, why):
    """Windows shorter than a sample, recurrent states, and attention by other code."""
    made = recipe(model, **TWO)
    with pytest.raises(ConfigError, match=re.escape(why)) as e:
        made.probe()
    assert str(e.value).startswith(f"{KEY}: ") and "\n" not in str(e.value)


def test_a_window_that_is_longer_than_a_sample_is_taken():
    recipe({"arch": "mistral", "sliding_window": 64}, **TWO).probe()


def test_what_cannot_be_tried_is_refused_and_says_why(monkeypatch):
    monkeypatch.setattr(cutting.tiny, "LARGEST", 0)
    monkeypatch.setattr(cutting, "_known", {})
    with pytest.raises(
        ConfigError, match=rf"{KEY}: not supported for 'llama': the check failed \(the architecture's smallest model"
    ):
        recipe(**TWO).probe()


@pytest.mark.parametrize("documents", [False, True])
def test_the_stretches_of_a_batch_are_its_tokens_with_their_positions_and_targets(documents):
    """Nothing is lost at a split: the last token of a part has the first token of the next part as its target."""
    made = recipe(length=12, **{"data.document_mask": documents})
    tokens = np.random.default_rng(0).integers(0, 5, (3, 12)).astype(np.int32)
    whole = made.batch(tokens)
    parts = [made.cut(whole, part, 3) for part in range(3)]
    joined = {name: torch.cat([part[name] for part in parts], dim=1) for name in parts[0]}
    assert torch.equal(joined["input_ids"], whole["input_ids"])
    assert torch.equal(joined["position_ids"], whole["position_ids"] if documents else torch.arange(12).expand(3, -1))
    assert torch.equal(joined["targets"][:, :-1], whole["labels"][:, 1:]) and (joined["targets"][:, -1] == IGNORED).all()
    assert sum(map(made.terms, parts)) == made.terms(whole) == int((whole["labels"] != IGNORED).sum())
    if documents:
        assert (tokens == END).any() and made.terms(whole) < 33


# the plan ------------------------------------------------------------------------------------------------------------


def planned(sequence: int, **changes) -> dict:
    sizes = {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 16, "num_key_value_heads": 4}
    sizes |= {"num_hidden_layers": 4, "vocab_size": 4096}
    given = {
        "workers.gpus": 1,
        "workers.count": 8,
        "train.global_batch_size": 8,
        "train.micro_batch_size": 1,
        "data.sequence_length": 8192,
    }
    j = job(**{**given, **changes}, **{KEY: sequence}, **{f"model.{k}": v for k, v in sizes.items()})
    return planner.plan(j, CausalLM(j))


def test_the_plan_counts_a_workers_stretch_and_what_it_hands_the_others():
    """The plan has the activations of its own tokens, the state of all workers, proportionally more micro-batches, and exchanged
    heads."""
    tokens = 65536  # of fewer, launches of small kernels would take most of the time
    whole, shared = (planned(n, **{"data.sequence_length": tokens}) for n in (1, 4))
    assert shared["memory"]["activations"] == pytest.approx(whole["memory"]["activations"] / 4, rel=1e-6)
    assert all(shared["memory"][k] == whole["memory"][k] for k in ("weights", "optimizer"))
    assert shared["parts"]["forward_backward"] == pytest.approx(whole["parts"]["forward_backward"], rel=0.2)
    # layers, tokens of a worker, heads of queries and results and of keys and values, their width, the share that leaves, bf16
    forward = 4 * tokens // 4 * (2 * 16 + 2 * 4) * 128 * 3 // 4 * 2
    handed = shared["communication"]["bytes_per_step"] - whole["communication"]["bytes_per_step"]
    assert handed == 4 * 2 * forward  # micro-batches, forward and backward
    assert shared["parts"]["exposed"] > whole["parts"]["exposed"]


def test_what_does_not_fit_whole_fits_cut():
    """For 262,144 tokens, a quarter of whose activations fits on a GPU."""
    long = {"data.sequence_length": 262144}
    with pytest.raises(ConfigError, match=r"each worker needs .* GiB \(.*activations"):
        planned(1, **long)
    assert planned(4, **long)["memory"]["total"] < 80 * 2**30


def test_few_heads_of_keys_and_values_are_sent_to_every_worker():
    made = recipe({**BASE["model"], "hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 2})
    assert [made.exchanged(parts) for parts in (2, 8)] == [2 * 32 * (16 + 4) * 8 // 2, 2 * 8 * (16 + 16) * 8 * 7 // 8]
