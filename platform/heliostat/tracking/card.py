"""Writes the model card from the job and the run: `README.md` of the exported folder, with the header that model hubs read."""

from __future__ import annotations

import json
from pathlib import Path

from heliostat.config.spec import Job
from heliostat.data.manifest import Manifest
from heliostat.tracking.parents import ParentModel, parents

FILE = "README.md"


def note(job: Job, manifests: list[Manifest]) -> str:
    """Describes a new run in Markdown, as MLflow's UI shows it: what is trained, on what, and where to look."""
    length = f" of {job.data.sequence_length:,} tokens" if job.data.sequence_length else ""
    what = f"`{job.recipe}`: {job.train.steps:,} steps of {job.train.global_batch:,} samples{length}"
    lines = [job.card.summary, f"{what}, {job.train.precision}, ZeRO stage {job.train.zero.stage}."]
    for source, m in zip(job.data.sources, manifests, strict=True):
        size = f"{m.tokens:,} tokens" if m.tokens else f"{m.rows:,} samples"
        lines.append(f"- data: **{_name(m)}**, {size}, weight {source.weight:g}")
    lines.append("The whole run on one page is `report.html`, among the artifacts.")
    return "\n\n".join(line for line in lines if line)


def license_of(job: Job, origins: list[ParentModel]) -> str:
    """Determines the license of a job's model.

    It is the job's own; else that of the models it was initialised from, if they agree; else `unknown`.
    """
    inherited = {p["license"] for p in origins}
    only = next(iter(inherited)) if len(inherited) == 1 else None
    return job.card.license or only or "unknown"


def write(folder: Path, job: Job, run_id: str, step: int, scores: dict[str, float], manifests: list[Manifest]) -> None:
    (folder / FILE).write_text(text(job, run_id, step, scores, manifests, parents(job)))


def text(
    job: Job, run_id: str, step: int, scores: dict[str, float], manifests: list[Manifest], origins: list[ParentModel]
) -> str:
    names = [_name(m) for m in manifests]
    header = {"license": license_of(job, origins).lower(), "datasets": names, "tags": ["heliostat"]}
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in header.items()), "---", f"# {job.name}", ""]
    lines += [job.card.summary, ""] if job.card.summary else []
    lines += [
        f"Trained with heliostat for {step:,} steps of {job.train.global_batch:,} samples (`{job.recipe}`, "
        f"{job.train.precision}), MLflow run `{run_id}`. License: {license_of(job, origins)}.",
        "",
    ]
    for title, said in (("Intended use", job.card.intended_use), ("Limitations", job.card.limitations)):
        lines += [f"## {title}", "", said or "Not stated.", ""]
    lines += ["## Data", "", "| dataset | weight | rows | tokens | digest |", "|---|---|---|---|---|"]
    lines += [
        f"| {name} | {source.weight:g} | {m.rows:,} | {m.tokens:,} | `{m.digest[:12]}` |"
        for name, source, m in zip(names, job.data.sources, manifests, strict=True)
    ]
    if origins:
        lines += ["", "## Initialised from", ""]
        lines += [
            f"- `{p['key']}`: {p['name'] or p['folder']}" + (f", run `{p['run_id']}`" if p["run_id"] else "") for p in origins
        ]
    if scores:
        lines += ["", "## Held-out scores", "", *(f"- {key.replace('_', ' ')}: {value:.6g}" for key, value in scores.items())]
    return "\n".join(lines) + "\n"


def _name(manifest: Manifest) -> str:
    return str(manifest.meta.get("name", manifest.location.name))
