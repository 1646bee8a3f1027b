"""Declares every tag that heliostat writes to MLflow: of runs, logged models, registered versions and experiments.

MLflow's UI shows all tags but those that begin with `mlflow.`: so what only the machinery needs begins with `mlflow.heliostat.`.
A tag that was called otherwise in runs recorded before has its former name in FORMERLY; `value` reads both.
"""

from __future__ import annotations

from collections.abc import Mapping

# MLflow's own, which its UI shows in places of their own
USER, NOTE = "mlflow.user", "mlflow.note.content"
SOURCE_NAME, SOURCE_TYPE, COMMIT = "mlflow.source.name", "mlflow.source.type", "mlflow.source.git.commit"
PARENT_RUN = "mlflow.parentRunId"  # makes a nested run
KIND, TRAINING = "mlflow.experimentKind", "custom_model_development"  # of an experiment: what its page is for

# of a run
NAME, FOLDER = "heliostat.name", "heliostat.run_folder"  # of every run that `heliostat train` makes
RECIPE, DIRTY, VERSION = "heliostat.recipe", "heliostat.dirty", "heliostat.version."  # and a package's name
TOKEN = "mlflow.heliostat.token"  # finds a run whose driver died before it wrote the run's id down
STEPS = "mlflow.heliostat.steps"  # that its newest command is to come to; the param is of the first command
REASON = "heliostat.reason"  # why it did not finish
MODEL_URI = "heliostat.model_uri"
SPIKES = "heliostat.spikes"  # steps, comma-separated
CORRUPTION = "heliostat.corruption"  # what train.sdc_check found last
BAD_NODES = "heliostat.bad_nodes"  # on which workers failed again and again or computed wrongly; a line each
PARENT_RUNS = "heliostat.parent_runs"  # run ids that it was initialised from, comma-separated
REPRODUCES = "heliostat.reproduces"  # a run id

# of a sweep, its trials, and the versions that it registers
SWEEP, SWEEP_FOLDER, SWEEP_RUN, TRIAL = (f"heliostat.{tag}" for tag in ("sweep", "sweep_folder", "sweep_run", "trial"))
STATUS, PRUNED, CLONES = "heliostat.status", "heliostat.pruned", "heliostat.clones"
BEST_TRIAL, BEST_RUN = "heliostat.best_trial", "heliostat.best_run"

# of a checkpoint's logged model
STEP, PLACE = "heliostat.step", "heliostat.uri"  # the step also of a model, and of a version
DATA_DIGEST, RECEIPT = "heliostat.data_digest", "heliostat.receipt"
DELETED = "heliostat.deleted"  # "true" of one that is gone, where MLflow does not let its logged model be deleted
WORKERS, ZERO_STAGE = "heliostat.workers", "heliostat.zero_stage"
WRITTEN = "mlflow.heliostat.written"  # when: a checkpoint of the same step that was made again is another one
LOGGED = "mlflow.heliostat.logged"  # "true" once it has its scores and its run

# of a model, and of a registered version
MADE_OF = "mlflow.heliostat.made_of"  # of a model: its checkpoint's step, and when that was written; of a version: its model
LICENSE, SCORE = "license", "heliostat.score."  # and the score's name
HISTORY = "heliostat.history"  # a JSON list of what happened to the version, oldest first

FORMERLY = {TOKEN: "heliostat.token", WRITTEN: "heliostat.written", LOGGED: "heliostat.logged", MADE_OF: "heliostat.made_of"}


def source(run: Mapping[str, str]) -> dict[str, str]:
    """Selects from a run's tags where its code comes from (source name, type, commit), for the models that it logs."""
    return {name: run[name] for name in (SOURCE_NAME, SOURCE_TYPE, COMMIT) if name in run}


def value(tags: Mapping[str, str], name: str) -> str | None:
    """Reads a tag by its present name, or by its former one."""
    return tags.get(name, tags.get(FORMERLY.get(name, name)))
