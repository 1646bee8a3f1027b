"""Defines the layout of a run's folder. All code that reads or writes there takes its paths from this module.

checkpoints/step-00000100/   shards, and `checkpoint.json`, written last (`checkpoint.layout`)
checkpoints/frozen-DIGEST/   frozen parameters
averages/step-00000100/      snapshots of averages of the weights, in the form of a checkpoint (`checkpoint.snapshots`)
receipts/step-00000100.json  digests of the samples of the steps up to 100 (`data.receipt`)
segments/step-00000000.json  the data plan that the run uses from this step on (`runs.segments`)
quarantine/step-*.jsonl      samples that were replaced (`training.worker.unsealed`)
curves/step-*.json           losses and scores, until MLflow certainly has them (`tracking.local_curves`)
benchmarks/SUITE/step-*.json scores of checkpoints on a suite (`evaluation.follow`)
ledger/ATTEMPT.json          how each attempt spent its time (`runs.goodput`)
lease/00000001.json          the driver that may write here (`lease`)
logs/ATTEMPT.000000.log      logs of a submitted job (`submit.logs`)
stacks/TIME.txt              the stacks of the workers when they stalled
profiles/ID/                 traces of a worker's steps; `profiles/request.json` requests one (`runs.profile`)
run.json                     the id of the MLflow run (`runs.mlflow_id`)
exports.json                 the folders to which checkpoints were exported (`runs.exports`)
attempts.json                each start of the workers: code, machines (`tracking.run_facts`)
unlogged.jsonl               points that MLflow has not accepted yet (`tracking.outbox`)
clone.json                   the last checkpoint that population based training copied here (`tune.trial`)
summary.json, result.json    the results of training, and of the complete run (`runs.summary`)
probe                        empty; the driver writes it to test write access (`training.driver.suspects`)
"""

from __future__ import annotations

from heliostat.errors import ConfigError, DataError
from heliostat.storage.locations import Location

CHECKPOINTS, RECEIPTS, SEGMENTS, QUARANTINE, CURVES = "checkpoints", "receipts", "segments", "quarantine", "curves"
AVERAGES = "averages"
LEDGER, LEASE, LOGS, STACKS, BENCHMARKS, PROFILES = "ledger", "lease", "logs", "stacks", "benchmarks", "profiles"
MLFLOW_RUN, ATTEMPTS, UNLOGGED, CLONE = "run.json", "attempts.json", "unlogged.jsonl", "clone.json"
EXPORTS = "exports.json"
SUMMARY, RESULT, PROBE = "summary.json", "result.json", "probe"
BY_STEP = (SEGMENTS, RECEIPTS, QUARANTINE, CURVES)  # folders whose files are named after the last step that they cover


def require_one_way(resume: bool, overwrite: bool) -> None:
    """Raises ConfigError if a command has both `--resume` and `--overwrite`."""
    if resume and overwrite:
        raise ConfigError("--overwrite: deletes the checkpoints that --resume needs. Pass only one of these options")


def checkpoint(run: Location, step: int) -> Location:
    return run.join(CHECKPOINTS, _name(step))


def averages(run: Location, step: int) -> Location:
    return run.join(AVERAGES, _name(step))


def receipt(run: Location, step: int) -> Location:
    return run.join(RECEIPTS, f"{_name(step)}.json")


def segment(run: Location, step: int) -> Location:
    return run.join(SEGMENTS, f"{_name(step)}.json")


def quarantine(run: Location, step: int) -> Location:
    return run.join(QUARANTINE, f"{_name(step)}.jsonl")


def curves(run: Location, step: int) -> Location:
    return run.join(CURVES, f"{_name(step)}.json")


def benchmark(run: Location, suite: str, step: int) -> Location:
    return run.join(BENCHMARKS, suite, f"{_name(step)}.json")


def step_of(name: str) -> int:
    """Returns the step in the name of a run's file or folder. Raises DataError if the name contains no step."""
    number = name.removeprefix("step-").partition(".")[0]
    if not number.isdecimal():
        raise DataError(f"{name}: isn't named after a step, such as step-00000100.json. Move this file out of the run's folder")
    return int(number)


def _name(step: int) -> str:
    return f"step-{step:08d}"
