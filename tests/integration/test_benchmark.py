"""Tests `heliostat model benchmark` against lm-eval's own command, and the path from a score to the gate for an alias."""

import contextlib
import dataclasses
import json
import os
import re
import socket
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from heliostat import schema
from heliostat.checkpoint import layout
from heliostat.config.spec import Job
from heliostat.data import manifest
from heliostat.data.dataset import open_dataset, plan
from heliostat.errors import ConfigError
from heliostat.evaluation import held_out, recording, shown
from heliostat.evaluation.follow import Followed, summary
from heliostat.evaluation.run import Benchmark
from heliostat.evaluation.suite import load
from heliostat.inference.batch.engines import Continue, Input
from heliostat.recipes import exported
from heliostat.recipes.text.causal_lm import CausalLM
from heliostat.runs.goodput import RecordedAttempt
from heliostat.storage import run_folder
from heliostat.storage.locations import Location
from heliostat.tracking import tags
from mlflow import MlflowClient

from tests import stores
from tests.integration import commands
from tests.unit import build_checkpoint, build_pages
from tests.unit.build_job import job

FRACTION, EXAMPLES, STEP = 0.2, 24, 12
ENV = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Creates a dataset of real pages, a suite of its held-out part, and a model that was trained briefly on the rest."""
    folder = tmp_path_factory.mktemp("benchmark")
    # on one line each: of lines and tables so small a model learns white space alone, and would write no word
    pages = build_pages.make(folder / "pages", tuple(" ".join(text.split()) for text in build_pages.texts()))
    held_out.make(str(pages.location), folder / "suite", EXAMPLES, FRACTION, seed=0)
    store = f"sqlite:///{folder}/mlflow.db"
    client = MlflowClient(store)
    run_id = client.create_run(client.create_experiment("x", artifact_location=str(folder / "artifacts"))).info.run_id
    write_model(folder / "model", pages, run_id)
    answer_as_the_model(folder)
    client.create_registered_model("lm")
    client.create_model_version("lm", str(folder / "model"), run_id, tags={tags.STEP: str(STEP)})
    return folder, store, client, run_id


def job_on(pages, **changes):
    of_pages = {"model.vocab_size": pages.fact("vocab_size"), "data.sources.0.path": str(pages.location)}
    return job(**{**of_pages, "data.sequence_length": 320, "evaluate.fraction": FRACTION, "train.precision": "fp32", **changes})


def write_model(folder: Path, pages, run_id: str) -> None:
    made_of = job_on(pages)
    recipe = CausalLM(made_of)
    recipe.bind([pages])
    torch.manual_seed(0)
    model = recipe.build()
    data = open_dataset(plan(made_of, [pages]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(STEP):
        tokens = torch.from_numpy(data.read(data.order.locate(data.order.step(step).ravel()))).long()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    recipe.save_config(folder)
    exported.write(folder, made_of, {"run_id": run_id, "step": STEP, "data_version": 2})


def answer_as_the_model(folder: Path) -> None:
    """Replaces every other answer with the model's own text. The model is too small to be right, and scores of 0 would be equal
    by chance."""
    write = Continue(folder / "model", 8, {"max_tokens": 24, "temperature": 0})
    for name, begin in (("held_out_cloze", r"\s*\S+"), ("held_out_recall", r"\S+\s+\S+")):
        place = folder / "suite" / "data" / f"{name}.jsonl"
        asked = [json.loads(line) for line in place.read_text().splitlines()]
        for one, written in zip(asked[::2], write([Input(one["context"], 0) for one in asked[::2]]), strict=True):
            one["answer"] = found[0] if (found := re.search(begin, written.values.get("answer", ""))) else one["answer"]
        place.write_text("".join(json.dumps(one) + "\n" for one in asked))


def benchmark(folder: Path, *words: str, code: int = 0, **environment: str) -> dict:
    out = folder / "result.json"
    done = commands.run("model", "benchmark", *words, "--out", str(out), "--json", log=folder / "log", **ENV, **environment)
    assert done.returncode == code, done.err
    return json.loads(done.out.splitlines()[-1])


LM_EVAL = """
import sys
from lm_eval.tasks import TaskManager
class OfThePathAlone(TaskManager):  # to read lm-eval's own 13,000 files takes a minute
    def __init__(self, *args, **options):
        super().__init__(*args, **{**options, "include_defaults": False})
import lm_eval.tasks, lm_eval.evaluator
lm_eval.tasks.TaskManager = lm_eval.evaluator.TaskManager = OfThePathAlone
from lm_eval.__main__ import cli_evaluate
cli_evaluate()
"""


def lm_eval(model: Path, suite: Path, out: Path, *more: str) -> dict:
    """Returns the scores of lm-eval's own command for a folder."""
    words = ["--model", "hf", "--model_args", f"pretrained={model}", "--tasks", ",".join(held_out.TASKS), "--include_path", ".",
             "--device", "cpu", "--batch_size", "16", "--output_path", str(out), *more]  # fmt: skip
    done = subprocess.run([sys.executable, "-c", LM_EVAL, *words], cwd=suite, env={**os.environ, **ENV}, capture_output=True,
                          text=True, timeout=400)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    (file,) = out.rglob("results*.json")
    return json.loads(file.read_text())


@pytest.mark.ci
def test_the_scores_are_those_of_lm_evals_own_command(place, tmp_path):
    """For all tasks and metrics, with their standard errors. The examples weren't trained on."""
    folder, store, _, _ = place
    ours = benchmark(tmp_path, str(folder / "model"), str(folder / "suite" / "suite.yaml"), "--mlflow", store)
    theirs = lm_eval(folder / "model", folder / "suite", tmp_path / "theirs")["results"]
    assert [row["task"] for row in ours["tasks"]] == list(held_out.TASKS)
    for row in ours["tasks"]:
        known = {k: v for k, v in theirs[row["task"]].items() if isinstance(v, float) and not k.startswith("perplexity_stderr")}
        assert {k: row["metrics"][k] for k in known} == pytest.approx(known, rel=1e-6) and len(known) >= 2
        assert row["score"] == theirs[row["task"]][f"{row['metric']},{row['filter']}"] and row["examples"] == row["of"]
        assert row["low"] <= row["score"] <= row["high"] and row["contamination"]["compared"] > EXAMPLES / 2
        assert row["contamination"]["contaminated"] < 0.3  # what pages have in common: tables, commands
    assert [row["chance"] for row in ours["tasks"]] == [0.25, 0.0, 0.0]
    assert all(0.2 < row["score"] < 0.8 for row in ours["tasks"][1:]), "none is right or wrong throughout"
    assert ours["contamination"]["unknown"] == "" and ours["contamination"]["datasets"][0]["chunks"] > 0


def test_a_score_is_on_the_models_run_at_its_step_and_opens_the_gate(place, tmp_path):
    folder, store, client, run_id = place
    ours = benchmark(tmp_path, str(folder / "model"), str(folder / "suite" / "suite.yaml"), "--mlflow", store)
    score = ours["tasks"][0]["score"]
    assert ours["recorded"]["versions"] == ["models:/lm/1"] and ours["recorded"]["run_id"] == run_id
    (last,) = client.get_metric_history(run_id, "bench/held_out_choice")[-1:]
    assert (last.step, last.value) == (STEP, score)
    assert client.list_artifacts(run_id, "benchmarks")[0].path == f"benchmarks/held-out-{STEP:08d}.json"
    words = ["model", "promote", "lm/1", "champion", "--mlflow", store, "--require"]
    refused = commands.run(*words, f"bench/held_out_choice>{score}", log=tmp_path / "log")
    assert refused.returncode == 1 and f"bench/held_out_choice is {score:.6g}, expected >" in refused.err
    assert commands.run(*words, f"bench/held_out_choice>={score}", log=tmp_path / "log").returncode == 0
    assert str(client.get_model_version_by_alias("lm", "champion").version) == "1"


@pytest.mark.ci
def test_solved_examples_and_fewer_of_them_are_as_lm_eval_has_them(place, tmp_path):
    """With a split for solved examples. The seed is that of the command."""
    folder, store, _, _ = place
    suite = tmp_path / "suite"
    (suite / "tasks").mkdir(parents=True)
    rows = (folder / "suite" / "data" / "held_out_choice.jsonl").read_text().splitlines(keepends=True)
    for split, part in (("train", rows[::2]), ("test", rows[1::2])):
        short = [json.loads(row) for row in islice(part, 8)]
        lines = [json.dumps({**one, "context": one["context"][-60:]}) + "\n" for one in short]
        (suite / f"{split}.jsonl").write_text("".join(lines))
    for name in held_out.TASKS:  # the same task under the names that the command is given
        task = yaml.safe_load((folder / "suite" / "tasks" / "held_out_choice.yaml").read_text())
        task |= {"task": name, "fewshot_split": "train", "num_fewshot": None}
        task["dataset_kwargs"] = {"data_files": {"train": "train.jsonl", "test": "test.jsonl"}}
        (suite / "tasks" / f"{name}.yaml").write_text(yaml.safe_dump({k: v for k, v in task.items() if v is not None}))
    told = {"name": "shots", "tasks": list(held_out.TASKS), "fewshot": 1, "examples": 6, "seed": 7}
    (suite / "suite.yaml").write_text(yaml.safe_dump(told | {"contamination": {"measure": False}}))
    assert load(suite / "suite.yaml")[0].seed == 7
    ours = benchmark(tmp_path, str(folder / "model"), str(suite / "suite.yaml"), "--mlflow", store)
    words = ["--num_fewshot", "1", "--limit", "6", "--seed", "7"]
    theirs = lm_eval(folder / "model", suite, tmp_path / "theirs", *words)["results"]
    for row in ours["tasks"]:
        assert (row["fewshot"], row["examples"], row["contamination"]) == (1, 6, None)
        assert row["metrics"]["acc_norm,none"] == theirs[row["task"]]["acc_norm,none"]
        assert row["metrics"]["acc,none"] == theirs[row["task"]]["acc,none"]


METRIC, FILTER = {"task": "t", "metric": "accuracy"}, [{"name": "x", "filter": [{"function": "take_frist"}]}]
CLASSES = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
WRONG = {  # what the task file has, the suite, and what is said
    "no such task": ({}, {"tasks": ["held_out_choic"]}, "held_out_choic' isn't a task of .*Did you mean 'held_out_choice'"),
    "a group": ({}, {"tasks": ["mmlu"]}, "'mmlu' is a group of tasks in lm-eval. List the group's tasks"),
    "not its metric": ({}, {"tasks": [METRIC]}, "metric: 'accuracy' isn't a metric of the task. Metrics: acc, acc_norm"),
    "unknown metric": (
        {"metric_list": [{"metric": "acurracy"}]},
        {},
        "t.yaml: metric_list: 'acurracy' isn't a metric of lm-eval",
    ),
    "missing data": ({"dataset_kwargs": {"data_files": "gone.jsonl"}}, {}, "t.yaml: data_files: .*gone.jsonl: no such file"),
    "missing split": ({"test_split": "tset"}, {}, "t.yaml: can't build the task: .*tset"),
    "missing column": ({"doc_to_text": "{{contxt}}"}, {}, "t.yaml: can't build the task: .*contxt"),
    "unknown key": ({"doc_to_txt": "x"}, {}, "t.yaml: doc_to_txt: unknown key. Did you mean 'doc_to_text'"),
    "unknown kind": ({"output_type": "multiple_choices"}, {}, "output_type: 'multiple_choices' isn't a choice. Did you mean"),
    "unknown filter": ({"filter_list": FILTER}, {}, "'take_frist' isn't a filter. Did you mean"),
    "code of a library": (
        {"generation_kwargs": {"custom_generate": "x/y"}},
        {},
        "generation_kwargs: 'custom_generate' isn't supported",
    ),
    "code in a template": ({"doc_to_text": CLASSES}, {}, "t.yaml: can't build the task: SecurityError"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_one_line_before_the_model_is_loaded(place, tmp_path, case):
    folder, _, _, _ = place
    task, suite, said = WRONG[case]
    made = yaml.safe_load((folder / "suite" / "tasks" / "held_out_choice.yaml").read_text())
    made["dataset_kwargs"] = {"data_files": {"test": str(folder / "suite" / "data" / "held_out_choice.jsonl")}}
    (tmp_path / "t.yaml").write_text(yaml.safe_dump({**made, "task": "t", **task}))
    (tmp_path / "other.yaml").write_text("task: held_out_choice\n")
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump({"name": "x", "tasks": ["t"], **suite}))
    with pytest.raises(ConfigError, match=said) as e:
        Benchmark(*load(tmp_path / "suite.yaml"), quiet=True)
    assert "\n" not in str(e.value)


def test_functions_are_scored_by_tests_that_are_run_in_a_sandbox(place, tmp_path):
    """The model writes a comment, so the prompt decides which programs pass."""
    folder, _, _, _ = place
    tests = ("assert one() == 1", "assert one() == 2", "assert one() < 2", "while True: print('x' * 1000)", "open('/etc/passwd')")
    rows = [{"prompt": "def one():\n    return 1\n#", "tests": code} for code in tests]
    (tmp_path / "functions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {"task": "functions", "unit_tests": "{{tests}}", "doc_to_text": "{{prompt}}", "test_split": "test",
            "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "functions.jsonl"}},
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8}}  # fmt: skip
    (tmp_path / "functions.yaml").write_text(yaml.safe_dump(task))
    told = {"name": "x", "tasks": ["functions"], "contamination": {"measure": False}}
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(told))
    with pytest.raises(ConfigError, match=r"functions\.yaml: unit_tests: runs the model's code, .* doesn't allow"):
        Benchmark(*load(tmp_path / "suite.yaml"), quiet=True)
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump({**told, "run_code": True}))
    with contextlib.closing(Benchmark(*load(tmp_path / "suite.yaml"), quiet=True)) as made:
        result = made.score(folder / "model")
    (row,) = result["tasks"]
    assert (row["metric"], row["kind"], row["score"], row["examples"]) == ("pass@1", "unit_tests", 0.4, 5)
    assert row["programs"] == {"passed": 2, "failed": 2, "timed_out": 0, "too_much_output": 1} and row["low"] < 0.4 < row["high"]
    recorded = {**result, "recorded": recording.unrecorded("none")}
    assert "functions: 2 of 5 programs passed their tests, 2 failed, 1 wrote too much" in shown.notes(recorded)
    assert recording.metrics(result)["bench/functions"] == 0.4


def test_a_model_that_is_no_language_model_is_one_line(place, tmp_path):
    folder, _, _, _ = place
    suite = str(folder / "suite" / "suite.yaml")
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    told = json.loads((folder / "model" / "heliostat.json").read_text()) | {"recipe": "heliostat.recipes:TextToImage"}
    (pictures / "heliostat.json").write_text(json.dumps(told))
    assert "isn't a language model" in benchmark(tmp_path, str(pictures), suite, code=2)["error"]["message"]


@pytest.fixture
def followed(place, tmp_path):
    """Creates a run's folder that MLflow knows; returns a function that saves checkpoints of the model's weights in it, by two
    ranks."""
    folder, store, client, _ = place
    made_of = schema.validate(Job, exported.read(folder / "model").job, "job")
    data = plan(made_of, [manifest.read(made_of.sources[0])])
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder / "model")
    weights = {f"master.{name}": one.detach().float().flatten() for name, one in plain.named_parameters()}
    run, run_id = Location(str(tmp_path / "run")), client.create_run("1").info.run_id
    run.join(run_folder.MLFLOW_RUN).write(json.dumps({"token": "", "uri": store, "run_id": run_id}).encode())

    def save(step: int, written: float = 1.0) -> None:
        told = {"job": made_of.dump(), "data": data.dump(), "data_digest": data.digest, "receipt": {"steps": step, "chain": ""}}
        layout.folder(run, step).delete()
        build_checkpoint.save(
            run, step, [build_checkpoint.slices(weights, rank, 2) for rank in range(2)], **told, written=written
        )

    suite = yaml.safe_load((folder / "suite" / "suite.yaml").read_text()) | {"examples": 4, "folder": str(folder / "suite")}
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(suite))
    return run, run_id, save, tmp_path / "suite.yaml"


def driver(run: Location) -> subprocess.Popen:
    """Starts a process that is the run's driver, according to the run's folder."""
    process = subprocess.Popen(["sleep", "300"])
    now = time.time()
    attempt = RecordedAttempt("a", now, now, now, 0, 1, host=socket.gethostname(), pid=process.pid)
    run.join(run_folder.LEDGER, attempt.name).write(json.dumps(dataclasses.asdict(attempt)).encode())
    return process


def test_checkpoints_are_scored_as_they_appear_and_those_that_retention_removes_are_counted(place, followed):
    """The second is removed, and the third saved, while the first is scored. Then the driver ends in the middle of a save."""
    client, (run, run_id, save, suite) = place[2], followed
    save(10)
    save(20)
    process, scored = driver(run), list[int]()

    def told(step: int, result: dict) -> None:
        scored.append(step)
        if step == 10:
            layout.folder(run, 20).delete()
            run_folder.receipt(run, 25).write(b"{}")  # of a checkpoint that came and went meanwhile
            save(30)
        elif step == 30:
            process.kill()
            process.wait()
            layout.folder(run, 40).join("shard-00000-of-00001.safetensors").write(b"cut")

    with contextlib.closing(Benchmark(*load(suite), quiet=True)) as tasks:
        first = Followed(run, tasks, told)
        first.follow(poll_s=0.05)
        made = summary(first)
        assert scored == [10, 30] == [one["step"] for one in made["steps"]]
        assert made["removed"] == dict.fromkeys(("20", "25"), "retention removed its checkpoint before it was scored")
        assert list(made["incomplete"]) == ["40"] and made["failed"] == {}
        curve = client.get_metric_history(run_id, "bench/held_out_choice")
        assert [(point.step, point.value) for point in curve] == [
            (s, made["steps"][0]["scores"]["held_out_choice"]) for s in (10, 30)
        ]

        again = Followed(run, tasks, told)  # another command goes on where this one was
        save(30, written=2.0)  # made again, after the run went back
        late = client.create_model_version("lm", str(run), run_id, tags={tags.STEP: "10"})  # when its scores had been sent
        again.follow(poll_s=0.05)
        scores = client.get_model_version("lm", late.version).tags
        assert float(scores[f"{tags.SCORE}bench/held_out_choice"]) == made["steps"][0]["scores"]["held_out_choice"]
        assert again.results[10]["recorded"]["versions"] == [f"models:/lm/{late.version}"]
        assert scored == [10, 30, 30] and len(client.get_metric_history(run_id, "bench/held_out_choice")) == 3
    changed = yaml.safe_load(suite.read_text()) | {"seed": 5}
    suite.write_text(yaml.safe_dump(changed))
    with (
        contextlib.closing(Benchmark(*load(suite), quiet=True)) as tasks,
        pytest.raises(ConfigError, match=r"other settings\. Rename"),
    ):
        Followed(run, tasks, told).follow()


@pytest.mark.ci
def test_a_job_has_its_checkpoints_scored_while_it_trains(place, tmp_path):
    """Every fourth step and the last one, on the run's own curves. The run waits for the last one."""
    folder, store, client, _ = place
    pages = manifest.read(Location(str(folder / "pages")))
    suite = yaml.safe_load((folder / "suite" / "suite.yaml").read_text()) | {"examples": 4, "folder": str(folder / "suite")}
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(suite))
    changes = {"train.steps": 6, "train.micro_batch_size": 8, "workers": {"count": 1}, "checkpoint": {"every": 2, "keep": 5},
               "evaluate.every": 2, "evaluate.samples": 8, "mlflow.uri": store, "storage": str(tmp_path / "runs"),
               "evaluate.benchmarks": {"suite": str(tmp_path / "suite.yaml"), "every": 4}}  # fmt: skip
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job_on(pages, **changes).dump()))
    done = commands.run("train", str(tmp_path / "job.yaml"), "--json", log=tmp_path / "log", **ENV)
    assert done.returncode == 0, done.err
    run_id = json.loads(done.out.splitlines()[-1])["run_id"]
    assert [point.step for point in client.get_metric_history(run_id, "bench/held_out_cloze")] == [4, 6], done.err
    assert "evaluate.benchmarks" not in done.err


def test_task_files_and_data_sets_of_a_store_are_those_of_the_folder(place, tmp_path, s3_server):
    folder, _, _, _ = place
    store = Location(f"s3://suites/held-out?{stores.bucket(s3_server, 'suites')}")
    for file in (folder / "suite").rglob("*.*"):
        store.join(*file.relative_to(folder / "suite").parts).write(file.read_bytes())
    told = {"name": "far", "tasks": list(held_out.TASKS), "folder": store.uri}
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(told))
    with (
        contextlib.closing(Benchmark(*load(tmp_path / "suite.yaml"), quiet=True)) as far,
        contextlib.closing(Benchmark(*load(folder / "suite" / "suite.yaml"), quiet=True)) as near,
    ):
        for one, other in zip(far.tasks, near.tasks, strict=True):
            assert list(one.task.eval_docs) == list(other.task.eval_docs) and len(one.task.eval_docs) > 5
    store.join("data", "held_out_cloze.jsonl").delete()
    with pytest.raises(ConfigError, match=r"held_out_cloze\.yaml\S*: data_files: s3://suites/held-out/data/held_out_cloze"):
        Benchmark(*load(tmp_path / "suite.yaml"), quiet=True)
