"""Formats a result for people: a table that is at most 80 characters wide, and notes below the table."""

from __future__ import annotations

from heliostat.evaluation.paired import PairedDifference
from heliostat.evaluation.suite import Result, Row

HEAD = ["task", "metric", "score", "95 %", "chance", "centred", "n", "seen"]
NAME, METRIC = 17, 9  # maximum characters, so that a row has 80; the result file has the full names


def rows(result: Result) -> list[list[str]]:
    """Returns the rows of the table. The first row is the header."""
    return [HEAD, *(_row(row) for row in result["tasks"])]


def _row(row: Row) -> list[str]:
    seen = (row["contamination"] or {}).get("contaminated")
    return [
        _short(row["task"], NAME),
        _short(row["metric"], METRIC),
        _number(row["score"]),
        "" if row["low"] is None else _interval(row["low"], row["high"]),
        "" if row["chance"] is None else f"{row['chance']:.2f}",
        "" if row["centred"] is None else f"{row['centred']:+.3f}",
        str(row["examples"]),
        "" if seen is None else f"{seen:.1%}",
    ]


def _number(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.3g}"


def _interval(low: float, high: float) -> str:
    return f"{low:.2f}-{high:.2f}" if max(abs(low), abs(high)) < 10 else f"{low:.3g}-{high:.3g}"


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def difference(one: PairedDifference) -> str:
    """Formats a task's difference from the other model, as in `sums: +0.050 (95 % +0.021 to +0.079): 80 examples better, ...`."""
    if one.difference is None:
        return f"{one.task}: no difference, because the score isn't a mean over examples"
    interval = "" if one.low is None else f" (95 % {one.low:+.3f} to {one.high:+.3f})"
    return (
        f"{one.task}: {one.difference:+.3f}{interval} compared with the other model; "
        f"{one.higher:,} examples score higher, {one.lower:,} lower"
    )


def notes(result: Result) -> list[str]:
    """Returns the notes below the table: mean score, cut examples, contamination, and where MLflow has the scores."""
    average, seen, recorded = result["average"], result["contamination"], result["recorded"]
    lines = []
    if average["centred"] is not None:
        error = "" if average["stderr"] is None else f" ± {1.96 * average['stderr']:.3f}"
        lines.append(
            f"mean of the centered scores: {average['centred']:+.3f}{error} ({average['tasks']} of {average['of']} tasks)"
        )
    lines += [f"{row['task']}: edit similarity of the answers {row['edit_similarity']:.3f} (1 means that all answers are right)"
              for row in result["tasks"] if row.get("edit_similarity") is not None]  # fmt: skip
    lines += [_of_programs(row) for row in result["tasks"] if row.get("programs")]
    lines += _of_contamination(result, seen)
    lines += [f"{row['task']}: {row['truncated']:,} examples are longer than the model's context, so the model saw only the end "
              "of each example"
              for row in result["tasks"] if row["truncated"]]  # fmt: skip
    if recorded["why_not"]:
        lines.append(f"not in MLflow: {recorded['why_not']}")
    else:
        versions = f", and of {', '.join(recorded['versions'])}" if recorded["versions"] else ""
        lines.append(f"in MLflow: bench/TASK of run {recorded['run_id']} at step {recorded['step']:,}{versions}")
    return lines


def _of_programs(row: Row) -> str:
    """Formats the number of programs that passed their tests, failed, or were stopped."""
    ended = row["programs"]
    words = {"failed": "failed", "timed_out": "ran out of time", "too_much_output": "wrote too much"}
    others = "".join(f", {ended[name]:,} {word}" for name, word in words.items() if ended[name])
    return f"{row['task']}: {ended['passed']:,} of {row['examples']:,} programs passed their tests{others}"


def _of_contamination(result: Result, seen: Row | None) -> list[str]:
    if seen is None:
        return ["seen: not measured (contamination.measure: false)"]
    if seen["unknown"]:
        return [f"seen: unknown: {seen['unknown']}"]
    chunks = sum(one["chunks"] for one in seen["datasets"])
    short = sum(row["contamination"]["too_short"] for row in result["tasks"])
    lines = [
        f"seen: examples that share {seen['n']} words in a row with the training data (compared with {chunks:,} chunks of it)"
    ]
    if short:
        lines[0] += f"; {short:,} examples have fewer words, so they aren't compared"
    if seen["damaged"]:
        lines.append(f"seen: {seen['damaged']:,} damaged row groups aren't compared")
    return lines


def line(step: int, result: Result) -> str:
    """Formats a checkpoint's scores as one line."""
    centred = result["average"]["centred"]
    parts = [f"{row['task']} {_number(row['score'])}" for row in result["tasks"]]
    return f"step {step:,}: " + ", ".join([*([] if centred is None else [f"average {centred:+.3f}"]), *parts])


def missed(summary: Result) -> list[str]:
    """Lists the steps of a run without a score, with one line per reason."""
    steps: dict[str, list[int]] = {}
    for what in ("removed", "incomplete", "failed"):
        for step, why in summary[what].items():
            steps.setdefault(why, []).append(int(step))

    def said(some: list[int]) -> str:
        return f"step {some[0]}" if len(some) == 1 else f"{len(some):,} steps, from {some[0]} to {some[-1]}"

    return [f"{said(some)}: not scored: {why}" for why, some in steps.items()]
