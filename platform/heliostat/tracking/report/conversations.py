"""Shows what a run on conversations learns and answers: the audit of its loss masks, and its answers to fixed prompts."""

from __future__ import annotations

import re
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypedDict

from heliostat.recipes.auditing import MarkedText, MaskAudit
from heliostat.tracking.mlflow_client import read_json
from heliostat.tracking.report.frame import table
from heliostat.tracking.run_facts import MASK_AUDIT

if TYPE_CHECKING:  # importing MLflow takes seconds
    from mlflow import MlflowClient

ANSWERS = "answers"
STEP = re.compile(r"step-(\d+)\.json")
MOST = 600  # characters of a prompt or an answer


class AnswerRow(TypedDict):
    """Describes the answer to a prompt, as `recipes.text.answers` writes it."""

    prompt: str
    answer: str
    wanted: str
    finished: bool


class StepAnswers(NamedTuple):
    """Contains the answers of an evaluation after `step` steps."""

    step: int
    rows: list[AnswerRow]


def audit_of(client: MlflowClient, run_id: str) -> MaskAudit | None:
    return read_json(client, run_id, MASK_AUDIT, MaskAudit)


def answers_of(client: MlflowClient, run_id: str) -> list[StepAnswers]:
    """Reads the answers of the first and of the last evaluation."""
    files = sorted(
        (int(match[1]), f.path) for f in client.list_artifacts(run_id, ANSWERS) if (match := STEP.fullmatch(Path(f.path).name))
    )
    ends = dict(files[:1] + files[-1:])
    return [StepAnswers(step, read_json(client, run_id, path, list[AnswerRow]) or []) for step, path in ends.items()]


def mask_section(audit: MaskAudit | None) -> list[str]:
    """Renders the audit: a table of the sources, and conversations whose trained text is colored."""
    if audit is None:
        return []
    cells = {
        "source": lambda s: escape(s["name"]),
        "conversations": lambda s: f"{s['conversations']:,}",
        "rows": lambda s: f"{s['rows']:,} ({s['fill']:.1%} full)",
        "tokens trained": lambda s: f"{s['trained_share']:.1%} of {s['tokens']:,}",
        "rows with nothing to train": lambda s: f"{s['untrained_rows']:,} of {s['sampled_rows']:,} read",
        "ends of turns trained": lambda s: f"{s['trained_ends']:,} of {s['sampled_turns']:,}",
        "template": lambda s: escape(s["template"]),
    }  # name of the column -> its cell of a source
    rows = [[cell(source) for cell in cells.values()] for source in audit["sources"]]
    warnings = [f"<p><b>{escape(warning)}</b></p>" for warning in audit["warnings"]]
    return ["<h2>Loss mask</h2>", table([*cells], rows), *warnings, *(_example(parts) for parts in audit["examples"])]


def _example(parts: list[MarkedText]) -> str:
    spans = (f"<span class='{'trained' if part['trained'] else 'muted'}'>{escape(part['text'])}</span>" for part in parts)
    return f"<pre class='chat'>{''.join(spans)}</pre>"


def answer_section(evaluations: list[StepAnswers]) -> list[str]:
    """Renders the answers: one row per prompt, with the answers of the first and of the last evaluation."""
    if not evaluations or not evaluations[-1].rows:
        return []
    head = ["prompt", *(f"after step {one.step:,}" for one in evaluations), "in the dataset"]
    rows = [
        [_cell(last["prompt"]), *(_answer(one.rows[i]) for one in evaluations if i < len(one.rows)), _cell(last["wanted"])]
        for i, last in enumerate(evaluations[-1].rows)
    ]
    return ["<h2>Answers to held-out prompts</h2>", table(head, rows)]


def _answer(row: AnswerRow) -> str:
    return _cell(row["answer"]) + ("" if row["finished"] else " <span class='muted'>(no end)</span>")


def _cell(text: str) -> str:
    """Escapes a text, and keeps its end if it is too long, because a prompt's last message is the nearest to the answer."""
    return f"<span class='chat'>{escape(text if len(text) <= MOST else '…' + text[-MOST:])}</span>"
