"""Tests DPO: losses and gradients equal those of the papers' formulas on single sequences, and rows or references that would
train another model are errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from heliostat.config.spec import Job
from heliostat.data import conversations, manifest
from heliostat.errors import ConfigError, DataError
from heliostat.recipes.folder_digests import weights_digest
from heliostat.recipes.protocol import Batch
from heliostat.recipes.text import answer_logprobs, preference_loss, preference_rows, reference_check, tiled_loss
from heliostat.recipes.text.causal_lm import CausalLM
from heliostat.recipes.text.dpo import DPO
from heliostat.storage.locations import Location
from torch.nn.functional import logsigmoid

from tests.unit import build_conversations
from tests.unit.build_job import BASE, job

VOCABULARY = 448


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Writes a small model whose random weights are large enough to prefer some answers, with the tokenizer of the dataset."""
    return write_base(tmp_path_factory.mktemp("base"))


def write_base(folder: Path, seed: int = 0) -> Path:
    config = transformers.LlamaConfig(**{k: v for k, v in BASE["model"].items() if k != "arch"} | {"vocab_size": VOCABULARY})
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(8)
    model.save_pretrained(folder / "model")
    raw = build_conversations.tokenizer()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=build_conversations.END)
    fast.chat_template = build_conversations.CHATML
    fast.save_pretrained(folder / "model")
    (folder / "model/tokenizer.json").write_text(raw.to_str())
    return folder / "model"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_conversations.preferences(tmp_path_factory.mktemp("data") / "preferences", number=12)


def referenced(data: Path, folder: Path, digest: str, shift: float = 0.0) -> Path:
    """Writes the dataset again with made-up log-probabilities of a reference."""
    rows = pq.read_table(data / "shards/0.parquet").to_pylist()
    for number, row in enumerate(rows):
        row |= dict(zip(conversations.REFERENCE_COLUMNS, (-20.0 - number, -25.0 + shift), strict=True))
    facts = manifest.read(Location(str(data))).meta[conversations.FACT]
    known = {**facts, "reference": {"digest": digest, "precision": "fp32"}}
    return build_conversations.write(folder, rows, conversations.REFERENCE, build_conversations.tokenizer(), known)


def dpo(base: Path, *data: Path, **changes: Any) -> DPO:
    recipe = DPO(described(base, *data, **changes))
    recipe.bind([manifest.read(Location(str(one))) for one in data])
    return recipe


def described(base: Path, *data: Path, **changes: Any) -> Job:
    usual = {"recipe": "heliostat.recipes:DPO", "model": {"pretrained": str(base)}, "data.sequence_length": None,
             "data.sources": [{"path": str(one)} for one in data], "train.precision": "fp32"}  # fmt: skip
    return job(**{**usual, **changes})


def rows_of(data: Path) -> pa.Table:
    return pq.read_table(data / "shards/0.parquet")


# losses and gradients --------------------------------------------------------------------------------------------------


def plain_logprob(model: torch.nn.Module, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """Computes the log-probability of one answer without batches, padding, or masks."""
    tokens = torch.tensor([prompt + answer])
    scores = model(input_ids=tokens, use_cache=False).logits[0].log_softmax(-1)
    return torch.stack([scores[len(prompt) + i - 1, token] for i, token in enumerate(answer)]).sum()


def plain_losses(model: torch.nn.Module, rows: list[dict[str, Any]], references: np.ndarray, kind: str, beta: float,
                 smoothing: float) -> torch.Tensor:  # fmt: skip
    losses = []
    for row, reference in zip(rows, references, strict=True):
        chosen, rejected = (plain_logprob(model, row["prompt"], row[side]) for side in ("chosen", "rejected"))
        won, lost = chosen - reference[0], rejected - reference[1]
        if kind == "ipo":
            losses.append((won / len(row["chosen"]) - lost / len(row["rejected"]) - 1 / (2 * beta)) ** 2)
        else:
            h = beta * (won - lost)
            losses.append(-(1 - smoothing) * logsigmoid(h) - smoothing * logsigmoid(-h))
    return torch.stack(losses).sum()


FORMS = [("sigmoid", 0.1, 0.0), ("sigmoid", 0.5, 0.2), ("ipo", 0.1, 0.0)]


@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("reference", ["dataset", "base"])
@pytest.mark.parametrize(("kind", "beta", "smoothing"), FORMS)
def test_losses_and_gradients_equal_the_papers_formulas_in_fp64(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiled: bool, reference: str, kind: str, beta: float,
    smoothing: float,
) -> None:  # fmt: skip
    """With blocks and tiles of a few tokens, and prompts so long that their logits are left out. The right values come from one
    sequence at a time, in fp64."""
    monkeypatch.setattr(tiled_loss, "tile_rows", lambda hidden, vocabulary: 7)
    monkeypatch.setattr(answer_logprobs.next_token, "block_rows", lambda logits: 7)
    keys = {"loss": kind, "beta": beta, "label_smoothing": smoothing, "reference": reference}
    source = referenced(data, tmp_path / "referenced", weights_digest(base)) if reference == "dataset" else data
    adapter = {} if reference == "dataset" else {"adapter": {"rank": 2}}
    recipe = dpo(base, source, model={"pretrained": str(base), "dpo": keys, **adapter}, **{"train.tiled_loss": tiled})
    torch.manual_seed(1)
    model, rows = recipe.build(), lengthened(rows_of(source))[:5]
    with torch.no_grad():  # so that an adapter changes the model
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter += 0.02 * torch.randn_like(parameter)
    batch = recipe.batch(rows)
    assert preference_rows.last(batch) == 64 < batch["input_ids"].shape[-1]
    loss = recipe.loss(model, batch)
    loss.sum.backward()
    mine = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    right, lists = model.double(), rows.to_pylist()
    if reference == "dataset":
        references = np.array([[row[name] for name in conversations.REFERENCE_COLUMNS] for row in lists])
    else:
        frozen = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
        with torch.no_grad():
            sides = [[plain_logprob(frozen, r["prompt"], r[side]).item() for side in ("chosen", "rejected")] for r in lists]
        references = np.array(sides)
    expected = plain_losses(right, lists, references, kind, beta, smoothing)
    expected.backward()
    assert loss.sum.item() == pytest.approx(expected.item(), rel=1e-5)
    assert mine.keys() == {name for name, p in right.named_parameters() if p.grad is not None} and mine
    for name, parameter in right.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(
                mine[name].double(), parameter.grad, rtol=1e-4, atol=1e-5 * parameter.grad.abs().max().item()
            )
    with torch.no_grad():
        scores = recipe.evaluate(model.float(), batch)
    assert recipe.metrics({name: float(values.sum()) for name, values in scores.items()})["loss"] == pytest.approx(
        expected.item() / 5, rel=1e-5
    )
    assert loss.parts["accuracy"].value.item() == pytest.approx(scores["accuracy"].mean().item())


def test_a_new_adapter_begins_with_margins_of_0_and_an_accuracy_of_one_half(base: Path, data: Path) -> None:
    recipe = dpo(base, data, model={"pretrained": str(base), "adapter": {"rank": 2}})
    model = recipe.build()
    needed = [p.requires_grad for p in model.parameters()]
    parts = recipe.loss(model, recipe.batch(rows_of(data))).parts
    assert [p.requires_grad for p in model.parameters()] == needed
    assert (parts["margin"].value.item(), parts["accuracy"].value.item()) == (0.0, 0.5)


def test_log_probabilities_dont_depend_on_the_other_rows_of_the_batch(base: Path, data: Path) -> None:
    recipe = dpo(base, data, model={"pretrained": str(base), "adapter": {"rank": 2}})
    model, rows = recipe.build(), rows_of(data)
    rows = pa.concat_tables([rows, long_row(rows)])

    def logprobs(some: pa.Table) -> torch.Tensor:
        with torch.no_grad():
            return recipe.compared(model, recipe.batch(some)).policy

    together, alone = logprobs(rows), torch.cat([logprobs(rows.slice(i, 1)) for i in range(len(rows))])
    torch.testing.assert_close(together, alone, rtol=1e-6, atol=1e-5)


def test_a_compiled_model_gets_one_shape_whatever_the_rows(base: Path, data: Path) -> None:
    """Otherwise torch would compile it for each shape, with the adapter on and off, and soon give up without an error."""
    keys = {"model": {"pretrained": str(base), "adapter": {"rank": 2}}}
    recipe, plain, rows = dpo(base, data, **keys, **{"train.compile": True}), dpo(base, data, **keys), rows_of(data)
    model = recipe.build()
    contents = [rows.slice(0, 2), lengthened(rows).slice(3, 2), pa.concat_tables([rows.slice(5, 1), long_row(rows)])]
    shapes = {(tuple(batch["input_ids"].shape), preference_rows.last(batch)) for batch in map(recipe.batch, contents)}
    assert shapes == {((2, 2, recipe.length), recipe.length)}
    for content in contents:
        with torch.no_grad():
            ours, right = (one.compared(model, one.batch(content)).policy for one in (recipe, plain))
        torch.testing.assert_close(ours, right, rtol=1e-6, atol=1e-5)


def lengthened(rows: pa.Table) -> pa.Table:
    """Adds 70 tokens to the beginning of each prompt."""
    lists = rows.to_pylist()
    return pa.Table.from_pylist([row | {"prompt": [*range(5, 75), *row["prompt"]]} for row in lists], schema=rows.schema)


def long_row(rows: pa.Table) -> pa.Table:
    """Makes a row of the maximum length."""
    row = {"id": "long", "prompt": [5] * 40, "chosen": [*range(4, 60)], "rejected": [9, 10]}
    return pa.Table.from_pylist([row], schema=rows.schema)


def test_a_batch_trains_exactly_the_answers(base: Path, data: Path) -> None:
    """Whatever the lengths: each sequence is its prompt and its answer, with labels at the answer."""
    recipe, rows = dpo(base, data, model={"pretrained": str(base), "adapter": {"rank": 2}}), rows_of(data)
    batch: Batch = recipe.batch(pa.concat_tables([rows, long_row(rows)]))
    assert batch["input_ids"].shape == (13, 2, 96)
    for row, tokens, labels in zip(rows.to_pylist(), batch["input_ids"].tolist(), batch["labels"].tolist(), strict=False):
        for side, ids, goals in zip(("chosen", "rejected"), tokens, labels, strict=True):
            whole = row["prompt"] + row[side]
            assert ids[: len(whole)] == whole and [g for g in goals if g != -100] == row[side]
            assert goals[len(row["prompt"]) : len(whole)] == row[side]


# mistakes --------------------------------------------------------------------------------------------------------------


def changed(rows: pa.Table, **values: Any) -> pa.Table:
    lists = rows.to_pylist()
    lists[3] |= values
    return pa.Table.from_pylist(lists, schema=rows.schema)


def test_rows_without_a_preference_are_errors_that_name_the_row(base: Path, data: Path, tmp_path: Path) -> None:
    source = referenced(data, tmp_path / "referenced", weights_digest(base))
    recipe, rows = dpo(base, source), rows_of(source)
    faults = [
        (changed(rows, prompt=[]), "row 'pair-0003': `prompt` has no tokens"),
        (changed(rows, rejected=[]), "row 'pair-0003': `rejected` has no tokens"),
        (changed(rows, rejected=None), "row 'pair-0003': `rejected` has no tokens"),
        (changed(rows, chosen=[7, VOCABULARY]), "row 'pair-0003': `chosen` has tokens from 7 to 448, but the vocabulary has"),
        (changed(rows, prompt=[-100, 7]), "row 'pair-0003': `prompt` has tokens from -100 to 7, but the vocabulary has"),
        (changed(rows, rejected=rows["chosen"][3].as_py()), "row 'pair-0003': `chosen` and `rejected` are equal"),
        (changed(rows, chosen=[7] * 96), "row 'pair-0003': the prompt and an answer have .* above the dataset's 96"),
        (changed(rows, reference_chosen=float("nan")), "row 'pair-0003': a log-probability of the reference isn't finite"),
        (changed(rows, reference_rejected=None), "row 'pair-0003': a log-probability of the reference isn't finite"),
    ]
    for content, message in faults:
        with pytest.raises(DataError, match=f"^{message}"):
            recipe.batch(content)


def test_a_reference_of_another_model_is_an_error_unless_the_job_accepts_it(base: Path, data: Path, tmp_path: Path) -> None:
    mine, other = weights_digest(base), weights_digest(write_base(tmp_path, seed=1))
    assert mine != other
    source = referenced(data, tmp_path / "referenced", other)
    with pytest.raises(ConfigError, match=rf"^data\.sources\.0\.path: .* another reference \({other}\) .* \({mine}\)\. Run"):
        dpo(base, source)
    for accepted in (other, "any"):
        assert dpo(base, source, model={"pretrained": str(base), "dpo": {"reference_model": accepted}}).from_dataset
    with pytest.raises(ConfigError, match=r"than model\.dpo\.reference_model"):
        dpo(base, source, model={"pretrained": str(base), "dpo": {"reference_model": "00"}})


def of_first_step(recipe: DPO, source: Path, moved: float = 0.0) -> dict[str, float]:
    """Returns the parts of a step with all rows. `moved`: added to the rewards."""
    with torch.no_grad():
        parts = recipe.loss(recipe.build(), recipe.batch(rows_of(source))).parts
    return {name: part.value.item() + moved * name.endswith("reward") for name, part in parts.items()}


def test_a_model_that_isnt_its_reference_is_an_error_at_the_first_step(base: Path, data: Path, tmp_path: Path) -> None:
    """The dataset has the right digest, but values of another model. Without this check, such a run trains without a sign."""
    digest = weights_digest(base)
    planted, shown = referenced(data, tmp_path / "planted", digest), rf"\({digest}, fp32\)\."
    recipe = dpo(base, planted)
    with pytest.raises(ConfigError, match=rf"^model\.dpo\.reference: at step 1, .* {shown} .* {shown} Run `heliostat"):
        recipe.check_first_step(of_first_step(recipe, planted))
    accepted = dpo(base, planted, model={"pretrained": str(base), "dpo": {"reference_model": digest}})
    accepted.check_first_step(of_first_step(accepted, planted))
    own = dpo(base, data, model={"pretrained": str(base), "adapter": {"rank": 2}})
    own.check_first_step(of_first_step(own, data))
    with pytest.raises(
        ConfigError, match=r"The reference is the model with its adapter off .* Set model\.dpo\.reference: dataset"
    ):
        own.check_first_step(of_first_step(own, data, moved=0.01))


def test_rounding_is_within_the_bound_of_the_first_step(base: Path, data: Path) -> None:
    """Whether the model or its reference is in bf16. The same difference is an error if both are in fp32."""
    recipe = dpo(base, data, model={"pretrained": str(base), "adapter": {"rank": 2}})
    models = [transformers.AutoModelForCausalLM.from_pretrained(base, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]
    batch = recipe.batch(rows_of(data))
    with torch.no_grad():
        exact, rounded = (answer_logprobs.of_pairs(model, batch) for model in models)
    error, pairs = float((exact - rounded).mean(0).abs().max()), len(exact)
    limits = [reference_check.bound(["fp32", other], recipe.length - 1, pairs) for other in ("fp32", "bf16")]
    assert limits[0] < error < limits[1]


def test_a_reference_in_another_precision_is_warned_about(
    base: Path, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = referenced(data, tmp_path / "referenced", weights_digest(base))
    dpo(base, source)
    assert not caplog.records
    dpo(base, source, **{"train.precision": "bf16"})
    (record,) = caplog.records
    assert "has log-probabilities in fp32, but train.precision is bf16" in record.getMessage()
    caplog.clear()
    dpo(base, source, **{"train.precision": "fp16", "workers.gpus": 1})
    assert not caplog.records, "references have no fp16, so nothing is nearer"


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({}, r"^data\.sources\.0\.path: .* has no log-probabilities of a reference\. Set model\.adapter, or add"),
        ({"dpo": {"reference": "base"}}, r"^model\.dpo\.reference: base needs an adapter"),
        ({"dpo": {"reference": "dataset"}, "adapter": {"rank": 2}}, "has no log-probabilities of a reference"),
        ({"dpo": {"loss": "ipo", "label_smoothing": 0.1}}, "label_smoothing .* is only for loss: sigmoid"),
        ({"dpo": {"label_smoothing": 0.5}}, "label_smoothing"),
        ({"dpo": {"loss": "dpo"}}, r"^model\.dpo\.loss: 'dpo' isn't a choice\. Did you mean 'sigmoid'"),
        ({"dpo": {"beta": 0.0}}, r"^model\.dpo\.beta: 0\.0 "),
        ({"dpo": {"betta": 0.1}}, r"^model\.dpo\.betta: unknown key"),
    ],
)
def test_keys_that_dont_fit_are_errors(base: Path, data: Path, model: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dpo(base, data, model={"pretrained": str(base), **model})


def test_a_dataset_of_packs_and_a_model_without_weights_are_errors(base: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^data\.sources\.0\.path: .* contains a dataset of conversations, but DPO trains on"):
        dpo(base, build_conversations.packs(tmp_path / "packs", 12))
    with pytest.raises(ConfigError, match=r"^model\.pretrained: required for DPO"):
        dpo(base, data, model=BASE["model"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train.parallel.sequence": 2, "workers.count": 2}, r"^train\.parallel\.sequence: not supported for DPO"),
        ({"train.parallel.tensor": 2, "workers.count": 2}, r"^train\.parallel\.tensor: not supported for DPO"),
        ({"model.attention_dropout": 0.1}, r"^model\.attention_dropout: dropout \(0\.1\) would add noise"),
        ({"data.document_mask": True}, r"^data\.document_mask: only for packs"),
        ({"data.sequence_length": 64}, r"^data\.sequence_length: only for token datasets"),
    ],
)
def test_settings_that_dpo_doesnt_support_are_errors_before_the_datasets_are_read(
    base: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        DPO(described(base, base, **changes)).probe()


def test_measures_follow_their_definitions() -> None:
    answers = preference_loss.ComparedAnswers(
        torch.tensor([[-1.0, -3.0], [-4.0, -2.0]]), torch.tensor([[-2.0, -2.0], [-2.0, -2.0]]), torch.tensor([[1, 2], [2, 1]])
    )
    measures = preference_loss.measures(answers, 0.5)
    assert measures["margin"].tolist() == [1.0, -1.0] and measures["accuracy"].tolist() == [1.0, 0.0]
    assert measures["chosen_reward"].tolist() == [0.5, -1.0] and measures["rejected_reward"].tolist() == [-0.5, 0.0]


def test_architectures_are_checked_as_next_token_models(base: Path, data: Path) -> None:
    recipe = dpo(base, data, model={"pretrained": str(base), "adapter": {"rank": 2}}, **{"train.tiled_loss": True})
    tiled_loss.require(recipe)
    assert isinstance(recipe, DPO) and type(recipe.small(recipe.config, 32, 0)) is CausalLM
