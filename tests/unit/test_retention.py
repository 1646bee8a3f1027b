"""Tests the retention of checkpoints: properties of the rule over random runs, and the files that pruning leaves."""

import json
import math
import random
from pathlib import Path

import pytest
from heliostat.checkpoint.layout import encode, folder, latest, steps
from heliostat.checkpoint.retention import Pruner, retained, survey
from heliostat.cli.main import app
from heliostat.config.spec import Checkpoint as Policy
from heliostat.errors import ConfigError
from heliostat.storage import run_folder
from heliostat.storage.locations import Location
from typer.testing import CliRunner

from tests.seeds import every_seed
from tests.unit.build_index import index
from tests.unit.build_job import job


def _policy(rng: random.Random) -> Policy:
    every = rng.choice([1, 2, 5])
    best = rng.choice([None, {"mode": rng.choice(["min", "max"]), "keep": rng.randrange(1, 4)}])
    keep_every = rng.choice([None, every * rng.randrange(1, 6)])
    return Policy.model_validate({"every": every, "keep": rng.randrange(1, 4), "keep_every": keep_every, "best": best})


def _scores(rng: random.Random, whole: list[int]) -> dict[int, float]:
    return {s: rng.choice([math.nan, math.inf, rng.random(), 0.5]) for s in whole if rng.random() < 0.9}


@every_seed(300)
def test_what_stays_is_the_newest_every_so_many_and_the_best(seed):
    """The result is checked against each rule alone. No other checkpoint stays, and every given reason is true."""
    rng = random.Random(seed)
    policy = _policy(rng)
    whole = rng.sample(range(policy.every, 60 * policy.every, policy.every), rng.randrange(20))
    scores = _scores(rng, whole)
    kept = retained(whole, policy, scores)
    newest = set(sorted(whole)[-policy.keep :])
    periodic = {s for s in whole if policy.keep_every and s % policy.keep_every == 0}
    best = {s for s, reasons in kept.items() if "best loss" in reasons}
    assert kept.keys() == newest | periodic | best and list(kept) == sorted(kept)
    assert {s for s, reasons in kept.items() if "newest" in reasons} == newest
    assert {s for s, reasons in kept.items() if f"every {policy.keep_every}" in reasons} == periodic
    finite = {s: v for s, v in scores.items() if math.isfinite(v)}
    assert len(best) == (min(policy.best.keep, len(finite)) if policy.best else 0)
    sign = -1 if policy.best and policy.best.mode == "max" else 1
    for other in finite.keys() - best:
        assert all((sign * finite[s], -s) < (sign * finite[other], -other) for s in best)


@every_seed(100)
def test_pruning_after_every_save_keeps_what_pruning_at_the_end_would(seed):
    """No rule needs a checkpoint that an earlier prune deleted, so pruning during the run loses nothing."""
    rng = random.Random(seed)
    policy = _policy(rng)
    everything = list(range(policy.every, 30 * policy.every, policy.every))
    scores = _scores(rng, everything)
    present: list[int] = []
    for step in everything:
        present = list(retained([*present, step], policy, scores))
    assert present == list(retained(everything, policy, scores))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"checkpoint.keep_every": 25}, "checkpoint.keep_every: 25 isn't a multiple of checkpoint.every 10. Use 20"),
        ({"checkpoint.keep_every": 4}, "checkpoint.keep_every: 4 isn't a multiple of checkpoint.every 10. Use 10"),
        (
            {"evaluate.benchmarks": {"suite": "suite.yaml", "every": 14}},
            "evaluate.benchmarks.every: 14 isn't a multiple of checkpoint.every 10. Use 10",
        ),
        (
            {"checkpoint.best": {}, "evaluate": None},
            "checkpoint.best: needs scores. Add the section evaluate, or remove checkpoint.best",
        ),
        (
            {"checkpoint.best": {}, "evaluate.every": 4},
            "checkpoint.best: evaluate.every 4 doesn't divide checkpoint.every 10, so some checkpoints would have no "
            "score. Change one of the two keys",
        ),
        (
            {"checkpoint.best": {"metric": "train_loss"}},
            "checkpoint.best.metric: 'train_loss' is a score of the training. Use a score of the evaluation, for example loss",
        ),
    ],
)
def test_a_policy_that_cannot_be_kept_is_refused(changes, message):
    """One line has the keys, their values, and a valid alternative, which is then accepted."""
    with pytest.raises(ConfigError) as e:
        job(**changes)
    assert str(e.value).removeprefix("job.yaml:").strip() == message
    if "Nearest" in message:
        job(**{"checkpoint.keep_every": int(message.rpartition(" ")[2])})
    job(
        **{
            "checkpoint.keep_every": 30,
            "checkpoint.best": {"metric": "perplexity", "mode": "max", "keep": 3},
            "evaluate.every": 5,
        }
    )


def _save(run: Location, step: int, loss: float | None = None, policy: Policy | None = None) -> None:
    """Saves a complete checkpoint without tensors."""
    facts = {"written": 0.0, "world_size": 1, "zero_stage": 1, "metrics": {} if loss is None else {"loss": loss}}
    facts |= {"job": {"checkpoint": (policy or Policy(every=10)).model_dump()}}
    folder(run, step).join("checkpoint.json").write(encode(index(step, **facts)))


def _torn(run: Location, step: int) -> None:
    folder(run, step).join("shard-00000.safetensors").write(b"half")


@pytest.fixture
def run(tmp_path: Path) -> Location:
    return Location(str(tmp_path / "run"))


def test_a_run_that_saves_on_keeps_the_newest_the_periodic_and_the_best(run):
    policy = Policy.model_validate({"every": 10, "keep": 2, "keep_every": 40, "best": {"metric": "loss", "keep": 1}})
    pruner = Pruner(run, policy)
    for step, loss in zip(range(10, 110, 10), [9, 8, 3, 7, 6, 5, 4, 4, 4, 4], strict=True):
        _save(run, step, float(loss), policy)
        pruner.prune(step)
    assert steps(run) == [30, 40, 80, 90, 100]
    assert {r["step"]: r["kept"] for r in survey(run)} == {
        30: ["best loss"], 40: ["every 40"], 80: ["every 40"], 90: ["newest"], 100: ["newest"],
    }  # fmt: skip


def test_a_resumed_run_still_knows_the_best_of_before(run):
    """Another process prunes: the scores come from the checkpoints, not from memory."""
    policy = Policy.model_validate({"every": 10, "keep": 1, "best": {"metric": "loss"}})
    for step, loss in [(10, 1.0), (20, 5.0)]:
        _save(run, step, loss)
    for step in (30, 40):
        _save(run, step, 6.0)
        Pruner(run, policy).prune(step)
    assert steps(run) == [10, 40]


def test_what_dead_saves_left_and_later_steps_are_deleted_after_a_save(run):
    """The run went back from step 50, which couldn't be loaded. That checkpoint must not stay longer than later ones, or replace
    them."""
    _save(run, 10)
    _torn(run, 20)
    _save(run, 50)
    _torn(run, 60)
    _save(run, 30)
    Pruner(run, Policy(every=10, keep=1)).prune(30)
    assert steps(run) == [30]


def _score(run: Location, step: int, value: float, written: float = 0.0, suite: str = "small") -> None:
    told = {"written": written, "tasks": [{"task": "other", "score": 9.0}, {"task": "arc", "score": value, "metric": "acc"}]}
    run_folder.benchmark(run, suite, step).write(json.dumps(told).encode())


def test_the_best_by_a_benchmark_is_known_when_its_score_comes(run):
    """The score comes after the save. A score of another checkpoint of the step doesn't count, nor a damaged one, nor one without
    a number."""
    policy = Policy.model_validate({"every": 10, "keep": 2, "best": {"metric": "bench/arc", "mode": "max"}})
    pruner = Pruner(run, policy)
    for step in range(10, 80, 10):
        _save(run, step, policy=policy)
        pruner.prune(step)
        if step == 20:
            _score(run, 20, 0.4)
            run_folder.benchmark(run, "cut", 20).write(b"{")
        if step == 40:
            _score(run, 30, 0.9, written=5.0)
            _score(run, 40, 0.3, suite="another")
    assert steps(run) == [20, 60, 70]
    assert {row["step"]: row["kept"] for row in survey(run)}[20] == ["best bench/arc"]
    _score(run, 60, 0.5)
    _save(run, 80, policy=policy)
    pruner.prune(80)
    assert steps(run) == [60, 70, 80]


def test_the_best_by_a_benchmark_needs_no_evaluation():
    job(**{"checkpoint.best": {"metric": "bench/arc", "mode": "max"}, "evaluate": None})
    job(**{"checkpoint.best": {"metric": "bench/arc", "mode": "max"}, "evaluate.every": 4})


def test_a_damaged_index_is_never_the_best_and_never_stops_a_prune(run):
    policy = Policy.model_validate({"every": 10, "keep": 1, "best": {"metric": "loss"}})
    _save(run, 10, 0.1)
    _save(run, 20, 0.2)
    _save(run, 30, 0.3)
    text = folder(run, 10).join("checkpoint.json").read()
    folder(run, 10).join("checkpoint.json").write(text.replace(b"0.1", b"0.0"))
    Pruner(run, policy).prune(30)
    assert steps(run) == [20, 30]


def test_the_survey_says_what_is_torn_and_why(run):
    _save(run, 10, 0.5)
    _torn(run, 20)
    whole, torn = survey(run)
    assert (whole["whole"], whole["kept"], whole["metrics"]) == (True, ["newest"], {"loss": 0.5})
    assert whole["bytes"] == len(folder(run, 10).join("checkpoint.json").read())
    assert (torn["whole"], torn["bytes"], torn["kept"]) == (False, 4, [])
    assert torn["fault"].endswith("no complete checkpoint here (checkpoint.json is missing)")
    json.dumps([whole, torn])


def test_the_command_lists_them_in_columns_and_as_json(run):
    """The table has the rule that keeps each checkpoint. `--json` prints one object on the last line."""
    (Path(run.path) / "receipts").mkdir(parents=True)
    assert _cli(run).split() == ["no", "checkpoint", "in", str(run)]
    _save(run, 10, 0.5)
    _save(run, 20)
    _torn(run, 30)
    head, *lines = _cli(run).splitlines()
    assert head.split() == ["step", "written", "MB", "workers", "ZeRO", "kept", "as", "scores"]
    assert [line.split()[0] for line in lines] == ["10", "20", "30"]
    assert (
        lines[0].endswith("newest   loss 0.5")
        and " incomplete " in lines[2]
        and lines[2].endswith("(checkpoint.json is missing)")
    )
    report = json.loads(_cli(run, "--json").splitlines()[-1])
    assert report == {"run_folder": str(run), "checkpoints": survey(run)}


def _cli(run: Location, *arguments: str) -> str:
    result = CliRunner().invoke(app, ["run", "checkpoints", str(run), *arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_the_latest_is_passed_over_if_damaged_and_may_be_asked_for_before_a_step(run, caplog):
    for step in (10, 20, 30):
        _save(run, step)
    _torn(run, 40)
    file = folder(run, 30).join("checkpoint.json")
    file.write(file.read().replace(b'"world_size": 1', b'"world_size": 2'))
    found = latest(run)
    assert found is not None and found.step == 20
    assert [r.message for r in caplog.records] == [
        f"{folder(run, 40)}: no complete checkpoint here (checkpoint.json is missing). Using the previous checkpoint",
        f"{file}: its bytes have changed since they were written (CRC-32). Using the previous checkpoint",
    ]
    earlier = latest(run, before=20)
    assert earlier is not None and earlier.step == 10
    assert latest(run, before=10) is None
