"""Checks, before anything starts, whether a class is a recipe, and whether a recipe can do what a job asks of it.

A recipe of the protocol's first form, which had no base classes, gets an error of its own that points to the guide.
"""

from __future__ import annotations

from heliostat.config.spec import Job
from heliostat.errors import ConfigError
from heliostat.recipes.protocol import (
    GUIDE,
    CouplesSamples,
    CutsSamples,
    DividesExperts,
    DividesMatrices,
    Draws,
    Evaluates,
    Exports,
    Generates,
    Paints,
    Recipe,
    Serves,
)
from heliostat.schema import nearest

KINDS = ("tokens", "rows")
MARKS = {  # the method that an ability is known by
    "evaluate": Evaluates,
    "save_config": Exports,
    "generator": Generates,
    "canvas": Paints,
    "serving": Serves,
    "gallery": Draws,
    "couple": CouplesSamples,
    "exchange": CutsSamples,
    "exchange_tokens": DividesExperts,
    "divided_matrices": DividesMatrices,
}
GONE = {"losses": "`loss` returns named parts", "added": "`loss` returns named parts", "frozen_bytes": "`companions` tells them"}


def require_class(field: str, path: str, target: object) -> type[Recipe]:
    """Returns the class if it is a complete recipe, else raises ConfigError; `path` is its import path, for the message."""
    if not isinstance(target, type):
        raise ConfigError(f"{field}: {path!r} is not a class")
    if not issubclass(target, Recipe):
        if all(hasattr(target, name) for name in ("build", "batch", "loss")):
            raise ConfigError(
                f"{field}: {path!r} is of the protocol's first form; derive it from {_named(Recipe)} and what it can do "
                f'in addition, and let `loss` return a Loss: {GUIDE}, "From the first form"'
            )
        raise ConfigError(f"{field}: {path!r} is no recipe: it does not derive from {_named(Recipe)} ({GUIDE})")
    _refuse_gone(field, path, target)
    if missing := sorted(target.__abstractmethods__):
        raise ConfigError(f"{field}: {path!r} lacks {', '.join(f'`{name}`' for name in missing)} ({GUIDE})")
    if getattr(target, "kind", None) not in KINDS:
        raise ConfigError(f"{field}: {path!r} must say `kind`, the datasets it eats: {' or '.join(map(repr, KINDS))} ({GUIDE})")
    for name, ability in MARKS.items():
        if hasattr(target, name) and not issubclass(target, ability):
            raise ConfigError(
                f"{field}: {path!r} has `{name}`, which nothing would call; derive it from {_named(ability)} ({GUIDE})"
            )
    if issubclass(target, Evaluates) and target.gathered and target.measure is Evaluates.measure:
        raise ConfigError(f"{field}: {path!r} gathers {', '.join(target.gathered)}, but has no `measure` that uses it ({GUIDE})")
    if issubclass(target, Serves) and target.serving is Serves.serving and not issubclass(target, Generates):
        raise ConfigError(
            f"{field}: {path!r} is served as its `generator` answers, and has none; derive it from {_named(Generates)}, or give "
            f"it `serving` ({GUIDE})"
        )
    return target


def _refuse_gone(field: str, path: str, target: object) -> None:
    """Raises ConfigError for names of the protocol's first form, in a class or set by its `__init__`."""
    for name, instead in GONE.items():
        if hasattr(target, name):
            raise ConfigError(f"{field}: {path!r} has `{name}`, which is not asked for any more: {instead} ({GUIDE})")


def require_abilities(job: Job, recipe: Recipe) -> None:
    """Raises ConfigError if the job asks for something that the recipe cannot do."""
    _refuse_gone("recipe", job.recipe, recipe)
    if job.evaluate and not isinstance(recipe, Evaluates):
        raise _lacks("evaluate", job, "is not scored", Evaluates, "remove evaluate")
    _require_room_makers(job, recipe)
    if job.train.parallel.sequence > 1:
        if not isinstance(recipe, CutsSamples):
            raise _lacks("train.parallel.sequence", job, "cuts no samples", CutsSamples, "set it to 1")
        if isinstance(recipe, Draws) or (isinstance(recipe, Evaluates) and recipe.gathered):
            raise ConfigError(f"train.parallel.sequence: {job.recipe} draws or measures whole samples; set it to 1")
    if job.train.parallel.expert > 1 and not isinstance(recipe, DividesExperts):
        raise _lacks("train.parallel.expert", job, "divides no experts", DividesExperts, "set it to 1")
    if job.train.parallel.tensor > 1:
        if not isinstance(recipe, DividesMatrices):
            raise _lacks("train.parallel.tensor", job, "divides no matrices", DividesMatrices, "set it to 1")
        if isinstance(recipe, Draws | CouplesSamples) or (isinstance(recipe, Evaluates) and recipe.gathered) or recipe.balances:
            raise ConfigError(
                f"train.parallel.tensor: {job.recipe} draws, couples samples, balances experts or measures arrays, which is not "
                "tried; set it to 1"
            )
    if job.mlflow.register_as and not isinstance(recipe, Serves):
        raise _lacks("mlflow.register", job, "is not served, so there is no model to register", Serves, "remove it")
    as_answers = isinstance(recipe, Serves) and type(recipe).serving is Serves.serving
    if as_answers and isinstance(recipe, Generates) and not recipe.prompts:
        raise ConfigError(f"recipe: {job.recipe!r} gives no `prompts`, and MLflow logs one with the model; add some ({GUIDE})")
    best = job.checkpoint.best
    if best and isinstance(recipe, Evaluates) and best.metric not in recipe.scores:
        raise ConfigError(
            f"checkpoint.best.metric: {best.metric!r} is no score of {job.recipe}{nearest(best.metric, list(recipe.scores))}"
        )


def _require_room_makers(job: Job, recipe: Recipe) -> None:
    """Raises ConfigError if the job asks for a way to save memory that the recipe does not have."""
    train = job.train
    if train.tiled_loss and not recipe.tiles:
        raise ConfigError(f"train.tiled_loss: {job.recipe} computes no loss in tiles; set it to false")
    if train.tiled_mlp and not recipe.tiles:
        raise ConfigError(f"train.tiled_mlp: {job.recipe} computes no MLPs in tiles; set it to false")
    if (train.attention or train.fp8) and not recipe.chooses:
        raise ConfigError(f"train.{'attention' if train.attention else 'fp8'}: {job.recipe} has no choice of kernels; remove it")
    if train.compile == "blocks" and type(recipe).blocks is Recipe.blocks:
        raise ConfigError(f"train.compile: blocks: {job.recipe} does not list its `blocks` ({GUIDE}); set it to true")
    if train.activation_offload and not recipe.selects:
        raise ConfigError(f"train.activation_offload: {job.recipe} leaves no activations to the host; set it to false")
    if not isinstance(train.activation_checkpointing, bool) and not recipe.selects:
        raise ConfigError(f"train.activation_checkpointing: {job.recipe} checkpoints all layers or none; set it to true or false")


def _lacks(key: str, job: Job, what: str, ability: type, way: str) -> ConfigError:
    return ConfigError(f"{key}: {job.recipe} {what}; derive it from {_named(ability)} ({GUIDE}), or {way}")


def _named(kind: type) -> str:
    return f"{kind.__module__}.{kind.__name__}"
