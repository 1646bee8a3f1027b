"""Tests batch inference: each input is answered once, regardless of interruptions, and an invalid command is rejected before the
run."""

import json
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
import torch
import transformers
from heliostat.cluster import connect
from heliostat.curation import forget, synthetic
from heliostat.curation.text import sources, trace
from heliostat.curation.text.tasks import TextSource
from heliostat.errors import AccessError, ConfigError, HeliostatError, LeaseError
from heliostat.inference import generate, many
from heliostat.inference.batch import engines, loading, reading, run, tasks
from heliostat.inference.batch.engines import Continue
from heliostat.inference.batch.run import claim
from heliostat.inference.batch.tasks import BatchSettings
from heliostat.inference.many import generate_many
from heliostat.plan import hardware
from heliostat.recipes import exported, model_origins
from heliostat.storage import lease, run_folder
from heliostat.storage.locations import Location
from heliostat.tasks.work import Work
from heliostat.tracking import card
from ray.exceptions import RayTaskError

from tests.unit.build_curation import HereFlow, KilledError
from tests.unit.test_conversation_records import chats, held, prepared


class Echo(engines.BatchEngine):
    """Answers with the text itself."""

    def __init__(self) -> None:
        self.batch = 4

    def encode(self, text: str) -> list[int]:
        return [1] * len(text)

    def answer(self, tokens, inputs):
        return [
            engines.Answer({"answer": i.text[::-1], "tokens": len(t), "finish": "stop"})
            for t, i in zip(tokens, inputs, strict=True)
        ]


@pytest.fixture
def echo(monkeypatch):
    monkeypatch.setattr(tasks, "loaded", lambda *_: Echo())
    monkeypatch.setattr(reading, "LEAST", 256)


def lines(folder: Path, name: str, numbers: range) -> None:
    folder.mkdir(exist_ok=True)
    rows = [f'{{"text": "text {i}", "n": {i}}}' for i in numbers]
    (folder / name).write_text("\n".join(rows) + "\nno json\n")


def model_in(folder: Path) -> Path:
    """Writes the files of the model that a test's engine replaces."""
    model = folder / "model"
    if not model.exists():
        model.mkdir()
        (model / "config.json").write_text("{}")
    return model


def infer(folder: Path, out: Path, before_commit: Callable[[], None] = lambda: None, **flow) -> dict:
    place, model = Location(str(out)), model_in(out.parent)
    made_by = {"model": {"folder": str(model), "digest": "d"}, "engine": {"name": "transformers", "version": "0"}}
    facts = {**made_by, "settings": BatchSettings(keep=["n"]).model_dump(), "input": str(folder)}
    flow = HereFlow(Work(place.join(run.WORK)), **flow)
    return run.answer(flow, sources.listing(str(folder)), facts, place, before_commit)


def answers(out: Path) -> list[dict]:
    record = json.loads((out / run.RECORD).read_text())
    assert {one["file"] for one in record["answers_in"]} == {f"answers/{p.name}" for p in (out / "answers").iterdir()}
    return [row for one in record["answers_in"] for row in pq.read_table(out / one["file"]).to_pylist()]


def test_a_run_that_is_killed_goes_on_and_answers_each_input_once(echo, tmp_path):
    """The run is killed after one task, after two more, and so on. Answers, order, and the list of bad inputs equal those of one
    run."""
    lines(tmp_path / "in", "a.jsonl", range(100))
    lines(tmp_path / "in", "b.jsonl", range(100, 120))
    whole = infer(tmp_path / "in", tmp_path / "whole")
    broken = tries = 0
    while True:
        try:
            found = infer(tmp_path / "in", tmp_path / "out", seed=tries, most=2)
            break
        except KilledError:
            broken += 1
            tries += 1
            assert not (tmp_path / "out" / run.RECORD).exists()
    assert broken > 2 and found["inputs"] == whole["inputs"] and found["answers"] == 120 and found["bad"] == 2
    assert answers(tmp_path / "out") == answers(tmp_path / "whole")
    assert [row["n"] for row in answers(tmp_path / "out")] == [str(i) for i in range(120)]
    assert answers(tmp_path / "out")[7]["answer"] == "7 txet"
    bad = pq.read_table(tmp_path / "out" / run.BAD).to_pylist()
    assert [(b["id"], b["reason"]) for b in bad] == [("a.jsonl#101", "invalid_json"), ("b.jsonl#21", "invalid_json")]


def test_new_input_is_only_its_own_work_and_what_has_gone_has_no_answers(echo, tmp_path):
    lines(tmp_path / "in", "a.jsonl", range(100))
    infer(tmp_path / "in", tmp_path / "out")
    assert infer(tmp_path / "in", tmp_path / "out")["new"] == 0
    lines(tmp_path / "in", "b.jsonl", range(100, 104))
    assert infer(tmp_path / "in", tmp_path / "out")["new"] <= 2
    assert len(answers(tmp_path / "out")) == 104
    (tmp_path / "in" / "a.jsonl").unlink()
    assert infer(tmp_path / "in", tmp_path / "out")["deleted"] == 100
    assert infer(tmp_path / "in", tmp_path / "out")["deleted"] == 0
    assert [row["n"] for row in answers(tmp_path / "out")] == [str(i) for i in range(100, 104)]


def test_answers_of_objects_that_were_recorded_without_etags_count(echo, tmp_path, monkeypatch):
    """Versions before ETags named tasks by sizes and times. Answering all inputs of a store again would cost GPUs for days."""
    for i in range(10):  # small ones, whose lines are not counted first
        lines(tmp_path / "in", f"{i}.jsonl", range(i * 10, i * 10 + 10))
    assert infer(tmp_path / "in", tmp_path / "out")["new"] > 2
    real = sources.listing
    monkeypatch.setattr(sources, "listing", lambda uri: [replace(file, etag="abc") for file in real(uri)])
    monkeypatch.setattr(TextSource, "read", lambda *_: pytest.fail("is read again"))
    after = infer(tmp_path / "in", tmp_path / "out")
    assert (after["new"], after["answers"], after["deleted"]) == (0, 100, 0) and len(answers(tmp_path / "out")) == 100


def test_a_kept_value_that_cannot_be_written_stops_nothing_and_a_column_that_is_nowhere_is_said(echo, tmp_path, caplog):
    rows = [{"text": "a", "n": "\ud800"}, {"text": "b", "n": {"c": "\ud800"}}, {"text": "c", "n": None}]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = infer(tmp_path / "in.jsonl", tmp_path / "out")
    assert (found["answers"], found["bad"], found["missing"]) == (2, 1, []) and "inputs have no" not in caplog.text
    assert [(row["text"], row["n"]) for row in answers(tmp_path / "out")] == [("b", '{"c": "\\ud800"}'), ("c", None)]
    (bad,) = pq.read_table(tmp_path / "out" / run.BAD).to_pylist()
    assert (bad["reason"], bad["detail"]) == ("not_utf8", "the kept column 'n'")
    (tmp_path / "other.jsonl").write_text('{"text": "a", "m": 1}\n')
    assert infer(tmp_path / "other.jsonl", tmp_path / "other")["missing"] == ["n"]
    assert "--keep: 'n': the inputs have no such column" in caplog.text


def test_what_answers_cost_is_that_of_the_devices_that_made_them(echo, tmp_path):
    """The cost includes all runs of the folder: a CPU counts per core, a GPU per hour. A device that isn't in the table has no
    known cost."""
    lines(tmp_path / "in", "a.jsonl", range(100))
    for _ in range(2):
        (used,) = infer(tmp_path / "in", tmp_path / "out")["devices"]
        assert used["name"] == "cpu"
    table, hour = hardware.table(), {"seconds": 3600.0}
    gpu = {"name": "NVIDIA H100 80GB HBM3", "memory": 79 * hardware.GIB, **hour}
    devices = table["devices"]
    assert (
        hardware.cost([{"name": "cpu", "memory": None, **hour}, gpu], table) == devices["cpu"]["hour"] + devices["H100"]["hour"]
    )
    assert hardware.cost([{**gpu, "name": "NVIDIA GeForce RTX 5090"}], table) is None
    records = [{"seconds": 2.0, "wall": 5.0, "gpu": [gpu["name"], gpu["memory"]]}, {"seconds": 3.0, "wall": 9.0}]
    assert [(one["name"], one["seconds"]) for one in run._devices(records)] == [(gpu["name"], 5.0), ("cpu", 3.0)]


def test_what_is_made_of_answers_knows_their_model_settings_and_inputs(echo, tmp_path, caplog):
    """This holds for the folder, a pattern, or one file. Files that aren't from the inference have no lineage."""
    lines(tmp_path / "in", "a.jsonl", range(100))
    facts, out = infer(tmp_path / "in", tmp_path / "out"), tmp_path / "out" / "answers"

    def known(input: str) -> dict | None:
        return synthetic.answers(sources.root(input), sources.listing(input))

    one = sorted(out.iterdir())[0]
    for input in (str(out), f"{out}/", f"{out}/*.parquet", str(one)):
        found = known(input)
        assert found == {name: facts[name] for name in ("model", "engine", "settings", "input", "inputs", "answers")}, input
    assert known(str(tmp_path / "in")) is None and not caplog.text
    shutil.copy(one, out / "mine.parquet")
    assert known(str(out)) is None and "inference.json doesn't list mine.parquet" in caplog.text


def test_a_dataset_of_answers_leads_to_the_run_of_the_model_that_wrote_them(echo, tmp_path):
    """A crawled page thus leads to the model that trains on the answers, also through a copy without a conversation. Answers of
    earlier versions, with less about the model, do too."""
    lines(tmp_path / "in", "a.jsonl", range(100))
    of_job = {"name": "writer", "model": {}, "data": {}, "train": {}}
    record = {"recipe": "r", "job": of_job, "origin": {"run_id": "r" * 32, "step": 7}}
    (model_in(tmp_path) / exported.RECORD).write_text(json.dumps(record))
    infer(tmp_path / "in", tmp_path / "out")
    place = tmp_path / "out" / synthetic.RECORD
    facts = json.loads(place.read_text())
    columns = {"prompt": "text", "completion": "answer"}
    for number, origin in enumerate((model_origins.of("m", model_in(tmp_path)), record["origin"])):
        place.write_text(json.dumps({**facts, "model": {**facts["model"], "origin": origin}}))
        made = prepared(tmp_path / f"made-{number}", [], input=str(tmp_path / "out" / "answers"), columns=columns)
        gone = forget.one(trace.find(made, id=held(made)[0][2]["ids"][0]), "--id")
        less = forget.forget(made, *gone, Location(f"{made.location}-less"))
        for dataset in (made, less):
            (parent,) = card.models_of_data([dataset])
            assert (parent["key"], parent["run_id"], parent["step"]) == ("data.sources.0.writer", "r" * 32, 7)
    assert card.models_of_data([prepared(tmp_path / "plain", chats(3))]) == []


def test_answers_that_were_lost_are_made_again(echo, tmp_path):
    lines(tmp_path / "in", "a.jsonl", range(100))
    infer(tmp_path / "in", tmp_path / "out")
    was = answers(tmp_path / "out")
    next((tmp_path / "out" / "answers").iterdir()).unlink()
    assert infer(tmp_path / "in", tmp_path / "out")["new"] == 1 and answers(tmp_path / "out") == was


def test_a_command_that_was_taken_for_dead_deletes_no_answer_of_the_next(echo, tmp_path):
    lines(tmp_path / "in", "a.jsonl", range(100))
    place = Location(str(tmp_path / "out"))
    first = lease.take(place)
    infer(tmp_path / "in", tmp_path / "out")
    was = answers(tmp_path / "out")
    place.join(run_folder.LEASE, "00000002.json").write(lease.Holder.me().dump())
    lines(tmp_path / "in", "a.jsonl", range(3))
    with pytest.raises(LeaseError, match="has taken over the lease"):
        infer(tmp_path / "in", tmp_path / "out", before_commit=first.fence.check)
    assert json.loads((tmp_path / "out" / run.RECORD).read_text())["answers"] == len(was) == 100
    first.release()


@pytest.fixture
def no_ray(monkeypatch):
    monkeypatch.setattr(connect, "connect", lambda **_: pytest.fail("Ray starts"))


def test_another_input_and_a_second_command_are_refused_before_ray_starts(model, tmp_path, no_ray):
    """Otherwise the answers of one input would be deleted, because the other input doesn't have them."""
    asked = BatchSettings(options={"max_tokens": 3})
    for name in ("one", "two"):
        lines(tmp_path / name, "a.jsonl", range(3))
    out = tmp_path / "out"
    with (
        lease.take(Location(str(out))),
        pytest.raises(ConfigError, match=r"--out: .*out: not empty, and has no batch inference\. Pass another folder"),
    ):
        run.infer(model, str(tmp_path / "one"), str(out), asked)
    shutil.rmtree(out)
    known = {"model": run.model_digest(model), "input": str(tmp_path / "one"), **asked.identity}
    claim(Location(str(out)), known, "answers", "batch inference")
    with pytest.raises(
        ConfigError, match=r"--out: .* contains answers of another input \('.*one', not '.*two'\)\. Pass another folder"
    ):
        run.infer(model, str(tmp_path / "two"), str(out), asked)
    with (
        lease.take(Location(str(out))),
        pytest.raises(ConfigError, match=r"--out: .*out is being written by process \d+ on .*\. Wait for that process"),
    ):
        run.infer(model, str(tmp_path / "one"), str(out), asked)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"temperature": -1}, "options: temperature: -1 is too small. Use 0 or more"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 32}, "max_tokens: 32 leaves no room for a prompt: prompt and answer have at most 32 tokens"),
    ],
)
def test_options_that_cannot_be_claim_no_folder(model, tmp_path, no_ray, options, said):
    """The corrected options are then accepted."""
    lines(tmp_path / "in", "a.jsonl", range(3))
    with pytest.raises(ConfigError) as found:
        run.infer(model, str(tmp_path / "in"), str(tmp_path / "out"), BatchSettings(options=options))
    assert said in str(found.value) and "\n" not in str(found.value)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match="leaves no room for a prompt"):  # of `ask` too
        Continue(model, 1, {"max_tokens": 33})


def test_many_prompts_are_answered_once_each_also_by_a_run_that_was_killed(model, tmp_path):
    """The answers equal those of one process. The second run doesn't repeat answers from before the kill."""
    prompts, options = [f"word {i}" for i in range(40)], {"max_tokens": 3, "temperature": 0.7}
    whole = [{"prompt": one.prompt, **one.facts} for one in generate.answer(model, prompts, options, 5, None)]

    def run_(seed: int, most: int = 1 << 60) -> tuple[list[dict], HereFlow]:
        flow = HereFlow(Work(Location(str(tmp_path / "out" / "work"))), seed=seed, most=most)
        return [json.loads(one) for one in many.answered(flow, model, prompts, options, 5, str(tmp_path / "out"), "key")], flow

    with pytest.raises(KilledError):
        run_(1, most=1)
    found, flow = run_(2)
    assert found == whole and (flow.kept["generate"], flow.done["generate"]) == (2, 1), "batches of 16"


def test_what_ends_drawing_is_one_line(model, tmp_path, monkeypatch):
    def fail(*_: object) -> None:
        raise RayTaskError("draw", "Traceback:\n  lines", torch.OutOfMemoryError("out of memory: 9 GiB\nmore of it"))

    monkeypatch.setattr(connect, "connect", lambda *_, **__: None)
    monkeypatch.setattr(many, "answered", fail)
    with pytest.raises(HeliostatError, match=r"^generating failed: out of memory: 9 GiB$"):
        generate_many(model, ["a"], {}, 0, str(tmp_path / "out"), 1)


def test_drawing_into_a_folder_that_cannot_be_is_refused_before_ray_starts(model, tmp_path, no_ray):
    (tmp_path / "file").write_text("")
    with pytest.raises(AccessError, match="can't write to the folder"):
        generate_many(model, ["a"], {}, 0, str(tmp_path / "file"), 1)


def test_a_place_that_takes_no_answer_is_refused_before_a_model_is_loaded(model, tmp_path, monkeypatch):
    monkeypatch.setattr(exported, "generator", lambda *_: pytest.fail("a model was loaded"))
    (tmp_path / "file").write_text("")
    for out, why in (
        (tmp_path, "is a folder. Use a file in this folder"),
        (tmp_path / "file" / "a.txt", "can't write to the folder"),
    ):
        with pytest.raises(AccessError, match=why):
            generate.generate(model, "a", {}, 0, str(out))


def test_a_folder_of_something_else_is_refused(tmp_path):
    place = Location(str(tmp_path / "out"))
    claim(place, {"model": "a", "seed": 0}, "answers", "batch inference")
    claim(place, {"model": "a", "seed": 0}, "answers", "batch inference")
    with pytest.raises(ConfigError, match=r"--out: .* contains answers of another seed \('0', not '1'\)\. Pass another folder"):
        claim(place, {"model": "a", "seed": 1}, "answers", "batch inference")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    with pytest.raises(ConfigError, match=r"--out: .*full: not empty, and has no batch inference\. Pass another folder"):
        claim(Location(str(tmp_path / "full")), {}, "answers", "batch inference")


def test_of_commands_that_begin_together_one_has_the_folder(tmp_path):
    """Each command has its own settings. One of them writes its settings, and all others report what the folder holds."""
    for number in range(20):
        place, together = Location(str(tmp_path / str(number))), threading.Barrier(4)

        def begin(seed: int, place: Location = place, together: threading.Barrier = together) -> str | None:
            together.wait()
            try:
                claim(place, {"seed": seed}, "answers", "batch inference")
            except ConfigError as e:
                return str(e)
            return None

        with ThreadPoolExecutor(4) as pool:
            told = list(pool.map(begin, range(4)))
        first = told.index(None)
        assert json.loads(place.join("settings.json").read()) == {"seed": first}
        assert all(f"answers of another seed ('{first}'" in line for line in told if line is not None) and told.count(None) == 1


def test_a_model_that_continues_no_text_and_an_input_of_no_file_are_refused_before_ray_starts(model, tmp_path, no_ray):
    config = transformers.LlamaConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    config.save_pretrained(tmp_path / "model")
    with pytest.raises(ConfigError, match=r"can't read its tokenizer or config.json .*Copy the folder again") as found:
        run.infer(tmp_path / "model", str(tmp_path / "empty"), str(tmp_path / "out"), BatchSettings())
    assert "\n" not in str(found.value)
    with pytest.raises(ConfigError, match="no such file"):
        run.infer(model, str(tmp_path / "empty"), str(tmp_path / "out"), BatchSettings(options={"max_tokens": 3}))
    assert not (tmp_path / "out").exists()


def test_a_worker_whose_engine_has_died_loads_another_for_the_next_run(model, tmp_path, monkeypatch):
    """The next command may get the same worker."""
    lines(tmp_path / "in", "a.jsonl", range(4))
    asked, place = BatchSettings(options={"max_tokens": 2}), Location(str(tmp_path / "out"))
    facts = {"model": {"folder": str(model), "digest": "d"}, "settings": asked.model_dump(), "input": str(tmp_path / "in")}
    engine = tasks.loaded(str(model), "continue", asked.batch, json.dumps(asked.options, sort_keys=True), "transformers", "d")

    def answer(*_):
        raise torch.AcceleratorError("an illegal memory access was encountered")

    def go() -> dict:
        return run.answer(HereFlow(Work(place.join(run.WORK))), sources.listing(str(tmp_path / "in")), facts, place)

    monkeypatch.setattr(engine, "answer", answer)
    with pytest.raises(HeliostatError, match="the engine has died"):
        go()
    assert go()["answers"] == 4


def test_a_worker_answers_by_the_model_that_is_in_the_folder_now(tmp_path, monkeypatch):
    """A later command may reuse the process of an idle worker. An unchanged model is loaded only once."""
    says, loads = tmp_path / "says", list[str]()

    class Says(Echo):
        def __init__(self, *_: object) -> None:
            super().__init__()
            self.text = says.read_text()
            loads.append(self.text)

        def answer(self, tokens, inputs):
            return [engines.Answer({"answer": self.text, "tokens": 1, "finish": "stop"}) for _ in inputs]

        def drawn(self, asked):
            return [SimpleNamespace(prompt=one.prompt, facts={"text": self.text}) for one in asked]

    monkeypatch.setattr(loading, "engine", Says)
    monkeypatch.setattr(exported, "generator", lambda *_: Says().drawn)
    lines(tmp_path / "in", "a.jsonl", range(4))
    tasks.loaded.cache_clear()
    many._generator.cache_clear()
    for number, text in enumerate(["one", "two", "two"]):
        says.write_text(text)
        place = Location(str(tmp_path / f"infer{number}"))
        facts = {"model": {"folder": str(model_in(tmp_path)), "digest": text}, "settings": BatchSettings().model_dump(),
                 "input": str(tmp_path / "in")}  # fmt: skip
        run.answer(HereFlow(Work(place.join(run.WORK))), sources.listing(str(tmp_path / "in")), facts, place)
        (file,) = Path(place.join(tasks.ANSWERS).path).iterdir()
        assert set(pq.read_table(file)["answer"].to_pylist()) == {text}
        flow = HereFlow(Work(Location(str(tmp_path / f"many{number}" / "work"))))
        (made,) = many.answered(flow, model_in(tmp_path), ["a"], {}, 0, str(tmp_path / f"many{number}"), text)
        assert json.loads(made) == {"prompt": "a", "text": text}
    assert loads == ["one", "one", "two", "two"]
    tasks.loaded.cache_clear()
    many._generator.cache_clear()
