"""Checks, before a run starts, whether a class is a recipe, and whether the recipe supports everything that a job needs.

The first recipe protocol had no base classes. If a recipe still uses this protocol, the error has a link to the guide.
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
MARKS = {  # the method by which each ability is recognized
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
GONE = {
    "losses": "return named parts from `loss` instead",
    "added": "return named parts from `loss` instead",
    "frozen_bytes": "`companions` returns the frozen models",
}


def require_class(field: str, path: str, target: object) -> type[Recipe]:
    """Returns `target` if it is a complete recipe class. Otherwise raises ConfigError. `path`: the import path of the class, for
    the message."""
    if not isinstance(target, type):
        raise ConfigError(f"{field}: {path!r} isn't a class. Name a recipe class, for example heliostat.recipes:CausalLM")
    if not issubclass(target, Recipe):
        if all(hasattr(target, name) for name in ("build", "batch", "loss")):
            raise ConfigError(
                f"{field}: {path!r} uses the first recipe protocol. Derive the class from {_named(Recipe)} and the "
                f'classes of the other abilities, and let `loss` return a Loss (see "From the first form" in {GUIDE})'
            )
        raise ConfigError(f"{field}: {path!r} isn't a recipe. Derive the class from {_named(Recipe)} ({GUIDE})")
    _refuse_gone(field, path, target)
    if missing := sorted(target.__abstractmethods__):
        raise ConfigError(
            f"{field}: {path!r} lacks {', '.join(f'`{name}`' for name in missing)}. Add every missing method ({GUIDE})"
        )
    if getattr(target, "kind", None) not in KINDS:
        raise ConfigError(
            f"{field}: {path!r} doesn't define `kind`, the kind of its datasets. Set `kind` to "
            f"{' or '.join(map(repr, KINDS))} in the class ({GUIDE})"
        )
    for name, ability in MARKS.items():
        if hasattr(target, name) and not issubclass(target, ability):
            raise ConfigError(
                f"{field}: {path!r} defines `{name}`, but heliostat never calls `{name}`. Derive the recipe from "
                f"{_named(ability)} ({GUIDE})"
            )
    if issubclass(target, Evaluates) and target.gathered and target.measure is Evaluates.measure:
        raise ConfigError(
            f"{field}: {path!r} lists {', '.join(target.gathered)} in `gathered`, but doesn't define `measure`. "
            f"Define `measure` ({GUIDE})"
        )
    if issubclass(target, Serves) and target.serving is Serves.serving and not issubclass(target, Generates):
        raise ConfigError(
            f"{field}: {path!r} is served through its `generator`, but doesn't define `generator`. Derive the recipe from "
            f"{_named(Generates)}, or define `serving` ({GUIDE})"
        )
    return target


def _refuse_gone(field: str, path: str, target: object) -> None:
    """Raises ConfigError if a recipe defines names of the first protocol, in its class or in its `__init__`."""
    for name, instead in GONE.items():
        if hasattr(target, name):
            raise ConfigError(
                f"{field}: {path!r} defines `{name}`, which heliostat no longer uses. Remove `{name}`: {instead} ({GUIDE})"
            )


def require_abilities(job: Job, recipe: Recipe) -> None:
    """Raises ConfigError if the job asks for an ability that the recipe lacks."""
    _refuse_gone("recipe", job.recipe, recipe)
    if job.evaluate and not isinstance(recipe, Evaluates):
        raise _lacks("evaluate", job, "doesn't support evaluation", Evaluates, "Remove evaluate")
    _require_room_makers(job, recipe)
    if job.train.parallel.sequence > 1:
        if not isinstance(recipe, CutsSamples):
            raise _lacks("train.parallel.sequence", job, "doesn't support sequence parallelism", CutsSamples, "Set this key to 1")
        if _draws(recipe) or (isinstance(recipe, Evaluates) and recipe.gathered):
            raise ConfigError(
                f"train.parallel.sequence: {job.recipe} generates or measures, which needs complete samples, so workers "
                "can't split samples. Set train.parallel.sequence to 1"
            )
    if job.train.parallel.expert > 1 and not isinstance(recipe, DividesExperts):
        raise _lacks("train.parallel.expert", job, "doesn't support expert parallelism", DividesExperts, "Set this key to 1")
    if job.train.parallel.tensor > 1:
        if not isinstance(recipe, DividesMatrices):
            raise _lacks("train.parallel.tensor", job, "doesn't support tensor parallelism", DividesMatrices, "Set this key to 1")
        if (
            _draws(recipe)
            or isinstance(recipe, CouplesSamples)
            or (isinstance(recipe, Evaluates) and recipe.gathered)
            or recipe.balances
        ):
            raise ConfigError(
                "train.parallel.tensor: not supported with recipes that generate, couple samples, balance "
                f"experts, or measure arrays ({job.recipe}). Set this key to 1"
            )
    if job.mlflow.register_as and not isinstance(recipe, Serves):
        raise _lacks("mlflow.register", job, "can't be served, so there is no model to register", Serves, "Remove this key")
    as_answers = isinstance(recipe, Serves) and type(recipe).serving is Serves.serving
    if as_answers and isinstance(recipe, Generates) and not recipe.prompts:
        raise ConfigError(
            f"recipe: {job.recipe!r} defines no `prompts`, but MLflow logs a prompt with the model. "
            f"Add `prompts` to the recipe ({GUIDE})"
        )
    best = job.checkpoint.best
    if best and isinstance(recipe, Evaluates) and best.metric not in recipe.scores:
        raise ConfigError(
            f"checkpoint.best.metric: {best.metric!r} isn't a score of {job.recipe}{nearest(best.metric, list(recipe.scores))}"
        )


def is_language_model(recipe: object) -> bool:
    """Checks whether a recipe, or a recipe class, trains a language model: on tokens, or with the attribute `language_model`."""
    return getattr(recipe, "kind", None) == "tokens" or getattr(recipe, "language_model", False)


def _draws(recipe: Recipe) -> bool:
    return isinstance(recipe, Draws) and getattr(recipe, "draws", True)


def _require_room_makers(job: Job, recipe: Recipe) -> None:
    """Raises ConfigError if the job asks for a memory optimization that the recipe doesn't support."""
    train = job.train
    if train.tiled_loss and not recipe.tiles:
        raise ConfigError(f"train.tiled_loss: {job.recipe} doesn't support a tiled loss. Set this key to false")
    if train.tiled_mlp and not recipe.tiles:
        raise ConfigError(f"train.tiled_mlp: {job.recipe} doesn't support tiled MLPs. Set this key to false")
    if (train.attention or train.fp8) and not recipe.chooses:
        raise ConfigError(
            f"train.{'attention' if train.attention else 'fp8'}: {job.recipe} doesn't let you choose kernels. Remove this key"
        )
    if train.compile == "blocks" and type(recipe).blocks is Recipe.blocks:
        raise ConfigError(
            f"train.compile: 'blocks' isn't supported: {job.recipe} doesn't list its `blocks` ({GUIDE}). Set this key to true"
        )
    if train.activation_offload and not recipe.selects:
        raise ConfigError(f"train.activation_offload: {job.recipe} doesn't support activation offload. Set this key to false")
    if not isinstance(train.activation_checkpointing, bool) and not recipe.selects:
        raise ConfigError(
            f"train.activation_checkpointing: {job.recipe} checkpoints all layers or none. Set this key to true or false"
        )


def _lacks(key: str, job: Job, what: str, ability: type, way: str) -> ConfigError:
    return ConfigError(f"{key}: {job.recipe} {what}. {way}, or derive the recipe from {_named(ability)} ({GUIDE})")


def _named(kind: type) -> str:
    return f"{kind.__module__}.{kind.__name__}"
