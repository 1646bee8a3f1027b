"""Declares every tag that heliostat writes to MLflow: of runs, logged models, registered versions, and experiments.

MLflow's UI hides tags that begin with `mlflow.`, so tags that only heliostat itself needs begin with `mlflow.heliostat.`.
FORMERLY has the names of tags in older runs; `value` reads both names.
"""

from __future__ import annotations

from collections.abc import Mapping

# MLflow's own tags, which MLflow's UI shows in special places
USER, NOTE = "mlflow.user", "mlflow.note.content"
SOURCE_NAME, SOURCE_TYPE, COMMIT = "mlflow.source.name", "mlflow.source.type", "mlflow.source.git.commit"
PARENT_RUN = "mlflow.parentRunId"  # makes a run a nested run
KIND, TRAINING = "mlflow.experimentKind", "custom_model_development"  # tag of an experiment: the kind of its page

# of a run
NAME, FOLDER = "heliostat.name", "heliostat.run_folder"  # every run of `heliostat train` has these tags
RECIPE, DIRTY, VERSION = "heliostat.recipe", "heliostat.dirty", "heliostat.version."  # heliostat.version.PACKAGE
TOKEN = "mlflow.heliostat.token"  # identifies a run whose driver died before it recorded the run's id
STEPS = "mlflow.heliostat.steps"  # the last step of the newest command; the param has the last step of the first command
REASON = "heliostat.reason"  # why the run didn't finish
MODEL_URI = "heliostat.model_uri"
SPIKES = "heliostat.spikes"  # steps of loss spikes, comma-separated
CORRUPTION = "heliostat.corruption"  # the newest result of train.sdc_check
BAD_NODES = "heliostat.bad_nodes"  # nodes whose workers failed repeatedly or computed wrong results; one line each
PARENT_RUNS = "heliostat.parent_runs"  # ids of the runs that initialized this run, comma-separated
REPRODUCES = "heliostat.reproduces"  # id of the run that this run reproduces

# of a sweep, its trials, and the versions that it registers
SWEEP, SWEEP_FOLDER, SWEEP_RUN, TRIAL = (f"heliostat.{tag}" for tag in ("sweep", "sweep_folder", "sweep_run", "trial"))
STATUS, PRUNED, CLONES = "heliostat.status", "heliostat.pruned", "heliostat.clones"
BEST_TRIAL, BEST_RUN = "heliostat.best_trial", "heliostat.best_run"

# of a checkpoint's logged model
STEP, PLACE = "heliostat.step", "heliostat.uri"  # STEP is also a tag of models and versions
DATA_DIGEST, RECEIPT = "heliostat.data_digest", "heliostat.receipt"
DELETED = "heliostat.deleted"  # "true" if the checkpoint is deleted, but MLflow doesn't delete its logged model
WORKERS, ZERO_STAGE = "heliostat.workers", "heliostat.zero_stage"
WRITTEN = "mlflow.heliostat.written"  # time when the checkpoint was written, because a step's checkpoint can be written again
LOGGED = "mlflow.heliostat.logged"  # "true" after the checkpoint's scores and run are logged

# of a model, and of a registered version
MADE_OF = "mlflow.heliostat.made_of"  # for a model: step and writing time of its checkpoint; for a version: its model
LICENSE, SCORE = "license", "heliostat.score."  # heliostat.score.NAME
HISTORY = "heliostat.history"  # a JSON list of the version's events, oldest first

FORMERLY = {TOKEN: "heliostat.token", WRITTEN: "heliostat.written", LOGGED: "heliostat.logged", MADE_OF: "heliostat.made_of"}


def source(run: Mapping[str, str]) -> dict[str, str]:
    """Selects the tags about a run's code (source name, type, commit) for the models that the run logs."""
    return {name: run[name] for name in (SOURCE_NAME, SOURCE_TYPE, COMMIT) if name in run}


def value(tags: Mapping[str, str], name: str) -> str | None:
    """Reads a tag by its present name. If there is no tag with that name, reads the tag by its former name."""
    return tags.get(name, tags.get(FORMERLY.get(name, name)))
