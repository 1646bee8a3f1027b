"""Describes a model's origin, and writes the model card: `README.md` in the exported folder, with the header that model hubs
read.

A model's parents are the folders of every `pretrained: FOLDER` in the job, and the runs that made these folders. If `heliostat
model export` made the folder, or if the folder is part of a registered model, its `heliostat.json` names the run. For a parent
from the Hugging Face Hub, the card shows the commit, and the license from the parent's own card.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NotRequired

from typing_extensions import TypedDict

from heliostat.config import pretrained
from heliostat.config.spec import Job
from heliostat.data import ancestry, conversations
from heliostat.data.manifest import Manifest
from heliostat.data.manifest_table import ERRORS
from heliostat.recipes import model_origins
from heliostat.recipes.model_origins import ModelOrigin
from heliostat.storage.records import Json

FILE = "README.md"


class ParentModel(ModelOrigin):
    """Describes a folder or Hub model on which another model depends. `parents.json` contains a list of these entries.

    `key`: the key of the job whose model initializes the other model. For the reference model of a dataset of preferences, the
    key of the dataset, and `.reference`. For the model that wrote a dataset's texts, the key of the dataset, and `.writer`.
    """

    key: str
    changed: NotRequired[dict[str, Json]]  # keys of the job next to `pretrained`; older records lack this field


class Parents(TypedDict):
    parents: list[ParentModel]


def parents(job: Job) -> list[ParentModel]:
    """Describes each folder or Hub model from which the job's model is initialized."""
    return [
        {"key": key, "changed": changed, **model_origins.of(named, pretrained.folder(named, job.mlflow.uri))}
        for key, named, changed in _folders(job.model, "model")
    ]


def models_of_data(manifests: list[Manifest]) -> list[ParentModel]:
    """Describes the models that computed the datasets' log-probabilities, or wrote their texts, in the job's order."""
    return [{"key": f"data.sources.{number}.{role}", **model_origins.ORIGIN.build(raw, one.location)}
            for number, one in enumerate(manifests) for role, raw in ancestry.models_of(one).items()]  # fmt: skip


def _folders(tree: Mapping[str, Json], prefix: str) -> Iterator[tuple[str, str, dict[str, Json]]]:
    for key, value in tree.items():
        if key == "pretrained" and isinstance(value, str):
            yield f"{prefix}.{key}", value, {name: other for name, other in tree.items() if name != key}
        elif isinstance(value, Mapping):
            yield from _folders(value, f"{prefix}.{key}")
        elif isinstance(value, list):
            for number, one in enumerate(value):
                if isinstance(one, Mapping):
                    yield from _folders(one, f"{prefix}.{key}.{number}")


def note(job: Job, manifests: list[Manifest]) -> str:
    """Describes a new run in Markdown for MLflow's UI: recipe, steps, data, and where the report is."""
    length = f" of {job.data.sequence_length:,} tokens" if job.data.sequence_length else ""
    what = f"`{job.recipe}`: {job.train.steps:,} steps of {job.train.global_batch_size:,} samples{length}"
    lines = [job.card.summary, f"{what}, {job.train.precision}, ZeRO stage {job.train.zero.stage}."]
    for source, m in zip(job.data.sources, manifests, strict=True):
        size = f"{tokens:,} tokens" if (tokens := conversations.tokens(m)) else f"{m.rows:,} samples"
        lines.append(f"- data: **{_name(m)}**, {size}, weight {source.weight:g}")
    lines.append("`report.html`, one of the run's artifacts, shows the complete run on one page.")
    return "\n\n".join(line for line in lines if line)


def license_of(job: Job, origins: list[ParentModel]) -> str:
    """Returns the license of a job's model.

    If the job has a license, returns this license. Else, if all models that initialized the job's model have the same license,
    returns that license. In all other cases, returns `unknown`.
    """
    inherited = {p["license"] for p in origins}
    only = next(iter(inherited)) if len(inherited) == 1 else None
    return job.card.license or only or "unknown"


def write(folder: Path, job: Job, run_id: str, step: int, scores: dict[str, float], manifests: list[Manifest]) -> None:
    """Writes the model's card into an exported folder."""
    (folder / FILE).write_text(text(job, run_id, step, scores, manifests, parents(job)))


def text(
    job: Job, run_id: str, step: int, scores: dict[str, float], manifests: list[Manifest], origins: list[ParentModel]
) -> str:
    """Renders a model's card as Markdown."""
    names = [_name(m) for m in manifests]
    header = {"license": license_of(job, origins).lower(), "datasets": names, "tags": ["heliostat"]}
    if on_hub := [name.repo for _, name in pretrained.on_hub(job)]:
        header["base_model"] = on_hub
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in header.items()), "---", f"# {job.name}", ""]
    lines += [job.card.summary, ""] if job.card.summary else []
    lines += [
        f"Trained with heliostat for {step:,} steps of {job.train.global_batch_size:,} samples (`{job.recipe}`, "
        f"{job.train.precision}), MLflow run `{run_id}`. License: {license_of(job, origins)}.",
        "",
    ]
    for title, said in (("Intended use", job.card.intended_use), ("Limitations", job.card.limitations)):
        lines += [f"## {title}", "", said or "Not stated.", ""]
    lines += ["## Data", "", "| dataset | weight | rows | tokens | digest |", "|---|---|---|---|---|"]
    lines += [
        f"| {name} | {source.weight:g} | {m.rows:,} | {conversations.tokens(m):,} | `{m.digest[:12]}` |"
        for name, source, m in zip(names, job.data.sources, manifests, strict=True)
    ]
    lines += _stored(manifests)
    lines += _features(job, manifests)
    if origins:
        lines += ["", "## Initialized from", ""]
        lines += [
            f"- `{p['key']}`: {p['name'] or p['folder']}" + (f", run `{p['run_id']}`" if p["run_id"] else "") for p in origins
        ]
    if scores:
        lines += ["", "## Held-out scores", "", *(f"- {key.replace('_', ' ')}: {value:.6g}" for key, value in scores.items())]
    return "\n".join(lines) + "\n"


def _stored(manifests: list[Manifest]) -> list[str]:
    """Describes the error that storing added to the datasets' latents and embeddings."""
    lines = [
        f"- {_name(m)}: `{column}` stored as {one['dtype']}, with a relative error of {one['relative_error']:.2%}"
        for m in manifests
        for column, one in m.meta.get(ERRORS, {}).items()
    ]
    return ["", *lines] if lines else []


def _features(job: Job, manifests: list[Manifest]) -> list[str]:
    """Describes the stored features that the model was aligned with (`model.repa`), and the error that storing added."""
    stored = [(m, m.meta["features"]) for m in manifests if job.model.get("repa") and m.meta.get("features")]
    lines = [
        f"- {_name(m)}: features of the image model `{one['model'][:12]}`, stored as {one['dtype']}, with a relative error of "
        f"{one['relative_error']:.2%} and a cosine error of {one['cosine_error']:.1e}"
        for m, one in stored
    ]
    return ["", "## Aligned with", "", *lines] if lines else []


def _name(manifest: Manifest) -> str:
    return str(manifest.meta.get("name", manifest.location.name))
