"""Tests the pipeline that adds a reference's log-probabilities to a dataset of preferences."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from heliostat.curation import forget, streaming
from heliostat.curation.prepare import place
from heliostat.curation.references import computing
from heliostat.curation.references.pipeline import ReferencePipeline
from heliostat.curation.text import trace
from heliostat.data import ancestry, conversations, manifest, versions
from heliostat.data.manifest import Manifest
from heliostat.errors import ConfigError, DataError
from heliostat.recipes.folder_digests import weights_digest
from heliostat.tasks import shipping
from heliostat.tasks.flow import Flow

from tests.unit import build_conversations
from tests.unit.build_conversations import WORDS
from tests.unit.build_curation import HereFlow, KilledError
from tests.unit.test_conversation_records import Preferences, prepared
from tests.unit.test_dpo import dpo, plain_logprob, rows_of, write_base
from tests.unit.test_stream_failures import FailingStream


class ReferencesHere(ReferencePipeline):
    """Runs tasks in this process. The run ends after `most` tasks."""

    most: int = 1 << 60

    def flow(self) -> HereFlow:
        return HereFlow(self.worked, most=self.most)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_conversations.preferences(tmp_path_factory.mktemp("data") / "preferences", number=20)


def pipeline(base: Path, data: Path, output: Path, **keys: Any) -> ReferencesHere:
    usual = {"name": "referenced", "input": str(data), "model": str(base), "output": str(output)}
    return ReferencesHere.model_validate(usual | keys)


def make(made: ReferencesHere) -> Manifest:
    """Makes the dataset like `prepare`."""
    made.check()
    output = place(made.output, "output")
    dataset = manifest.write(output, *made.write(output, made.inputs()))
    versions.publish(output, dataset)
    made.finish(dataset)
    return manifest.read(output)


def rows(dataset: Manifest) -> list[dict[str, Any]]:
    return [row for path in dataset.paths for row in pq.read_table(dataset.location.join(path).path).to_pylist()]


def test_the_dataset_has_the_same_rows_and_the_models_own_log_probabilities(base: Path, data: Path, tmp_path: Path) -> None:
    """The right values come from one answer at a time. The recipe accepts the dataset, and a new model's margins are 0."""
    before, made = manifest.read(place(str(data), "data")), make(pipeline(base, data, tmp_path / "out"))
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    for row, old in zip(rows(made), rows_of(data).to_pylist(), strict=True):
        assert {name: row[name] for name in old} == old
        with torch.no_grad():
            right = [float(plain_logprob(model, row["prompt"], row[side])) for side in ("chosen", "rejected")]
        assert [row[name] for name in conversations.REFERENCE_COLUMNS] == pytest.approx(right, rel=1e-6, abs=1e-5)
    assert made.chunks["rows"].to_pylist() == before.chunks["rows"].to_pylist() and (made.places == before.places).all()
    facts = made.meta[conversations.FACT]
    assert facts["reference"] == {"digest": weights_digest(base), "precision": "fp32"}
    assert facts | {"reference": None} == before.meta[conversations.FACT]
    assert made.meta["made_from"] == [{"name": before.meta["name"], "digest": before.digest}]
    for name in ("tokenizer.json", conversations.TEMPLATE):
        assert made.file(name).read() == (data / name).read_bytes()
    recipe = dpo(base, tmp_path / "out")
    parts = recipe.loss(recipe.build(), recipe.batch(rows_table(made))).parts
    assert recipe.from_dataset and parts["margin"].value.item() == pytest.approx(0, abs=1e-5)


def rows_table(dataset: Manifest) -> Any:
    return pq.read_table(dataset.location.join(dataset.paths[0]).path)


def test_values_dont_depend_on_the_batches(base: Path, data: Path) -> None:
    """From one pair per batch to all pairs in one batch."""
    shipment, table = shipping.describe("model", str(base)), rows_of(data)
    found = []
    for tokens in (1, 300, 100_000):
        settings = computing.ReferenceModel(shipment, "fp32", False, 96, tokens)
        found.append(computing.logprobs(computing.loaded_once(str(base), settings), table, settings))
    for one in found[1:]:
        np.testing.assert_allclose(one, found[0], rtol=1e-6, atol=1e-5)


def test_batches_have_every_row_once_and_at_most_so_many_tokens() -> None:
    lengths = np.random.default_rng(0).integers(1, 500, 200)
    for tokens in (1, 1000, 5000):
        taken = [*computing.batches(lengths, tokens)]
        assert sorted(np.concatenate(taken)) == list(range(200))
        for some in taken:
            padded = -(-lengths[some].max() // 64) * 64
            assert len(some) == 1 or 2 * len(some) * padded <= tokens


def test_an_interrupted_run_resumes_and_gives_the_same_dataset(base: Path, data: Path, tmp_path: Path) -> None:
    """A run that ends after the first task computes nothing again. The digest depends on the model and the input alone."""
    with pytest.raises(KilledError):
        make(pipeline(base, data, tmp_path / "out", most=1))
    made = pipeline(base, data, tmp_path / "out")
    flows: list[HereFlow] = []
    object.__setattr__(made, "flow", lambda: flows.append(HereFlow(made.worked)) or flows[0])
    resumed, whole = make(made), make(pipeline(base, data, tmp_path / "other"))
    assert flows[0].kept["reference"] == 1 and not flows[0].done.get("reference") and resumed.digest == whole.digest
    assert make(pipeline(write_base(tmp_path, seed=1), data, tmp_path / "third")).digest != whole.digest


class StreamedHere(ReferencesHere):
    """Runs the stream for GPUs on this machine's CPU."""

    gpus: float = 1.0

    @cached_property
    def described(self) -> computing.ReferenceModel:
        return replace(super().described, on_gpu=False)


def streamed(base: Path, data: Path, output: Path) -> StreamedHere:
    keys = {"name": "referenced", "input": str(data), "model": str(base), "output": str(output), "batch_tokens": 300}
    return StreamedHere.model_validate(keys)


@pytest.mark.parametrize("seed", range(2))
def test_a_stream_that_loses_blocks_gives_the_dataset_of_recorded_tasks(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Bit for bit, with row groups that end in any order. Recorded tasks compute the shards that the stream doesn't finish, and a
    second run computes nothing again."""
    data = in_shards(tmp_path / "data", [6, 3, 11] * 4)
    plain = make(pipeline(base, data, tmp_path / "plain", batch_tokens=300))
    monkeypatch.setattr(streaming, "RunningStream", FailingStream)
    monkeypatch.setattr(Flow, "devices", lambda flow, each=1.0: 1)
    monkeypatch.setattr(FailingStream, "rng", random.Random(seed))
    monkeypatch.setattr(FailingStream, "ends_after", (6, 99)[seed])
    made = streamed(base, data, tmp_path / "streamed")
    made.write(place(made.output, "output"), made.inputs())
    done = list((tmp_path / "streamed.work/done/stream").iterdir())
    flow = HereFlow(made.worked)
    object.__setattr__(made, "flow", lambda: flow)
    again = make(made)
    assert rows(again) == rows(plain) and again.digest == plain.digest and 0 < len(done) < 12 and not flow.done


def in_shards(folder: Path, sizes: list[int]) -> Path:
    """Writes a dataset of preferences with a shard of each size, in row groups of 5 pairs."""
    one, footers, begin = build_conversations.preferences(folder, sum(sizes)), list[Any](), 0
    location, table = place(str(one), "data"), rows_of(one)
    meta = {name: value for name, value in manifest.read(location).meta.items() if name != "digest"}
    for number, size in enumerate(sizes):
        pq.write_table(table.slice(begin, size), folder / f"shards/{number}.parquet", row_group_size=5, write_page_checksum=True)
        footers += manifest.read_footer(location, f"shards/{number}.parquet", None)
        begin += size
    manifest.write(location, footers, meta)
    return one


def test_inputs_and_models_that_dont_fit_are_errors(base: Path, data: Path, tmp_path: Path) -> None:
    make(pipeline(base, data, tmp_path / "out"))
    packs = build_conversations.packs(tmp_path / "packs", 12)
    long = build_conversations.preferences(tmp_path / "long", 4, length=100_000)
    other = build_conversations.preferences(tmp_path / "other", 4, raw=other_tokenizer())
    for source, output, message in [
        (tmp_path / "out", "again", r"^input: .* has a reference already"),
        (packs, "again", "^input: .* contains a dataset of conversations"),
        (long, "again", r"^model: .* has 2048 positions, but the rows of .* have up to 100000 tokens"),
        (other, "again", "^model: .* the model's tokenizer differs from the tokenizer of"),
        (data, str(data), "^output: .* is also the input"),
    ]:
        with pytest.raises(ConfigError, match=message):
            pipeline(base, source, tmp_path / output).check()
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    for folder, message in [
        ("run", " is a run, not a model"),
        ("adapter", " is an adapter without its base"),
        ("no", ": no such folder"),
    ]:
        with pytest.raises(ConfigError, match=f"^model: .*{folder}'{message}"):
            pipeline(tmp_path / folder, data, tmp_path / "again").check()
    with pytest.raises(ConfigError, match=r"^input: .*no: no dataset here \(manifest.parquet is missing\)"):
        pipeline(base, tmp_path / "no", tmp_path / "again").check()


def other_tokenizer() -> Any:
    from heliostat.curation.text import tokens
    from tokenizers import Tokenizer

    parts = [build_conversations.START, build_conversations.STOP]
    return Tokenizer.from_str(tokens.train(["quite other words, and others still"] * 2, 300, build_conversations.END, parts))


def test_values_that_arent_finite_are_an_error_that_names_the_row(base: Path, data: Path) -> None:
    settings = computing.ReferenceModel(shipping.describe("model", str(base)), "fp32", False, 96, 4096)
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(DataError, match=r"^row 'pair-0000': the reference's log-probability isn't finite"):
        computing.logprobs(model, rows_of(data), settings)


def test_a_pair_is_traced_and_forgotten_like_in_the_dataset_without_a_reference(base: Path, tmp_path: Path) -> None:
    """The record has the raw input, the other dataset's folder, and the reference's origin."""
    pairs = [{"prompt": " ".join(WORDS[n : n + 3]), "chosen": WORDS[n], "rejected": "no"} for n in range(10)]
    before = prepared(tmp_path, [*pairs, {**pairs[0], "rejected": pairs[0]["chosen"]}], Preferences)
    made = make(pipeline(base, Path(before.location.path), tmp_path / "referenced"))
    assert (made.places == before.places).all() and (made.places >= 0).all()
    for number in (3, 11):
        (end,) = trace.find(made, id=f"chats.jsonl#{number}")
        ways = [trace.trace(one, end) for one in (before, made)]
        paths = [way["shard"] and way["shard"].pop("path") for way in ways]
        assert ways[0] == ways[1] and ways[1]["notes"] == [] and (ways[1]["kept"] is None) == (number == 11)
        assert all((path in one.paths) == (number == 3) for path, one in zip(paths, (before, made), strict=True))
    assert ancestry.inputs_of(made) == [before.location.uri, str(tmp_path / "in")]
    origin = ancestry.models_of(made)[ancestry.REFERENCE]
    assert origin["folder"] == str(base) and ancestry.models_of(before) == {}
    (end,) = trace.find(made, id="chats.jsonl#3")
    less = forget.forget(made, "chats.jsonl#3", [end], made.location.ending("-less"))
    assert rows(less) == [row for row in rows(made) if row["id"] != "chats.jsonl#3"] != rows(made)
    assert ancestry.related(less.meta) == {less.digest, made.digest, before.digest}
    assert ancestry.inputs_of(less) == ancestry.inputs_of(made) and ancestry.models_of(less) == {ancestry.REFERENCE: origin}
