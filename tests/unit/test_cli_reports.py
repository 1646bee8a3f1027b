"""Tests that reports of commands are complete: JSON that every parser accepts, the documented fields, and tables that aren't
truncated."""

import io
import json
import re
from typing import Any

import pytest
from heliostat.chaos import measure
from heliostat.cli import common, main, runs
from heliostat.cli.train import chaos_table
from heliostat.tracking import run_table

from tests.unit.command_line import FILES, NAMES, ROOT, run


def shown(width: int, rows: list[list[str]], left: Any = (0,)) -> list[str]:
    return common.table_lines(rows, left, width)


RUN = {"run_id": "8ab935a8627d4edb9e3ad37ac277bbac", "name": "a-run-with-a-long-name", "experiment": "e", "status": "FINISHED",
       "reason": None, "started": 1.7e9, "ended": None, "step": 100000, "steps": 200000, "train_loss": 6.2277, "eval_loss": 6.254,
       "per_second": 123456.0, "goodput": 0.325, "worker_hours": 12.345, "gpus": 0.0, "sweep": None}  # fmt: skip
CHECKPOINT = {"step": 100, "whole": True, "bytes": 5e9, "written": 1.7e9, "world_size": 64, "zero_stage": 3, "fault": None,
              "metrics": {"loss": 6.25, "perplexity": 520.2, "bits_per_byte": 2.6}, "kept": ["best", "newest"]}  # fmt: skip
SERVING = {"job logs", "model play", "model serve", "run ui"}  # commands without a report
TABLES = {
    "runs": run_table.cells([RUN, RUN]),
    "checkpoints": runs._checkpoint_cells([CHECKPOINT]),
    "chaos": chaos_table([{**measure.broken("kill-worker"), "detected_s": 12.5, "goodput": 0.5}]),
    "goodput": [["part", "seconds", "share", *(f"attempt {i}" for i in range(1, 9))], ["computing", *["1,234.5"] * 10]],
    "trials": [
        ["trial", "status", "step", "loss", *(f"a_rather_long_key_{i}" for i in range(8))],
        ["1", "finished", *["0.001234"] * 10],
    ],
}


def test_json_has_no_nan(capsys):
    """Only Python's parser accepts NaN."""
    common.write_json({"loss": float("nan"), "all": [float("inf"), (1.5, None)]})
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail) == {"loss": None, "all": [None, [1.5, None]]}


def test_every_command_that_reports_has_json():
    """All except commands that stream text, serve, or are groups."""
    without = {
        name
        for name, command in NAMES.items()
        if not hasattr(command, "commands") and "json_" not in {p.name for p in command.params}
    }
    assert without <= SERVING, without


def test_the_page_of_the_command_line_names_every_command_and_every_exit_code():
    """The page also has the fields of its JSON, which scripts and agents rely on."""
    page = (ROOT / "docs" / "cli.md").read_text()
    rows = {
        name for line in page.splitlines() if line.startswith("| `") for name in re.findall(r"`([a-z -]+)`", line.split("|")[1])
    }
    leaves = {name for name, command in NAMES.items() if not hasattr(command, "commands")} - SERVING
    assert leaves - {name.partition(" --")[0] for name in rows} <= {"init"}
    for code in (0, 1, 2, 130):
        assert f"| {code} |" in page and re.search(rf"\b{code} \w", main.__doc__ or "")


def test_the_documented_fields_of_reports_are_those_that_are_printed(monkeypatch, capsys):
    """Checks the reports that are available without a run."""
    page = (ROOT / "docs" / "cli.md").read_text()
    for words, command in (
        (("check", FILES["job"], "--offline"), "check"),
        (("cluster", "list"), "cluster list"),
        (("sweep", "list"), "sweep list"),
    ):
        monkeypatch.chdir(ROOT)
        code, out, _ = run(monkeypatch, capsys, *words, "--json")
        row = next(line for line in page.splitlines() if line.startswith(f"| `{command}` |"))
        assert code == 0 and all(f"`{key}`" in row for key in json.loads(out))
    row = next(line for line in page.splitlines() if line.startswith("| `run list` |"))
    assert all(f"`{key}`" in row for key in RUN)
    row = next(line for line in page.splitlines() if line.startswith("| `debug chaos` |"))
    assert all(f"`{key}`" in row for key in measure.broken("x"))


def test_the_columns_of_runs_name_their_units():
    """Four workers for an hour are four worker-hours."""
    head, row, _ = TABLES["runs"]
    assert row[head.index("worker-hours")] == "12.345"


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("name", TABLES)
def test_no_table_is_cut(name, width):
    """Every cell is shown completely, in lines of at most the terminal's width. In a pipe, lines have their full width."""
    rows = TABLES[name]
    found = shown(width, rows)
    assert all(len(line) <= width for line in found)
    for row in rows:
        assert all(any(cell in line for line in found) for cell in row)
    assert len(common.table_lines(rows)) == len(rows)


def test_the_commands_tables_go_through_the_terminals_width(monkeypatch):
    at = io.StringIO()
    monkeypatch.setattr(common, "out", common.Printer(file=at, force_terminal=True, width=80, highlight=False, soft_wrap=True))
    common.print_table(TABLES["runs"], left=range(4))
    assert max(map(len, at.getvalue().splitlines())) <= 80 and RUN["run_id"] in at.getvalue()
    at = io.StringIO()
    monkeypatch.setattr(common, "out", common.Printer(file=at, width=80, highlight=False, soft_wrap=True))
    common.print_table(TABLES["runs"], left=range(4))
    assert len(at.getvalue().splitlines()) == len(TABLES["runs"])


def test_columns_are_aligned():
    assert common.table_lines([["name", "n"], ["a", "100"]]) == ["name    n", "a     100"]
    assert common.table_lines([["name", "n"], ["a", "100"]], width=5) == ["name", "      n", "a", "    100"]
    assert common.table_lines([]) == []


def test_what_a_dataset_leaves_out_is_named_by_its_stage_and_its_reason():
    """Reports number the stages, so that two stages of one kind differ. They were shown as `1 0 symbols: symbols`."""
    from heliostat.curation.prepare_report import explain

    dropped = {"0 symbols: symbols": 1, "1 gopher_quality: short": 2, "3 gopher_quality: short": 3, "empty": 4}
    report = {"up_to_date": True, "documents": 5, "tokens": 6, "dropped": dropped, "duplicates": 0, "listed": None,
              "dataset": "d", "chunks": 1, "digest": "0" * 12, "written_by": None, "hub": {}, "stored": {}, "rearranged": None,
              "conversations": None, "recorded_every": 1}  # fmt: skip
    assert explain(report)[1:] == ["dropped: 4 empty, 5 gopher_quality: short, 1 symbols"]
    assert "records only one document in 1,000 (record_documents: sample)" in explain(report | {"recorded_every": 1000})[2]
    assert "records only crashed and unread documents" in explain(report | {"recorded_every": 0})[2]


def test_a_dataset_of_packs_is_reported_as_conversations_in_rows():
    """A row holds several conversations. The report called the conversations rows."""
    from heliostat.curation.prepare_report import explain

    counts = {"conversations": 400, "tokens": 900, "trained": 90, "turns": 400, "trained_ends": 400, "padding": 380}
    facts = {"form": "packs", "sequence_length": 128, "turns": "all", "counts": counts}
    report = {"up_to_date": True, "documents": 400, "tokens": 0, "dropped": {}, "duplicates": 0, "listed": None,
              "dataset": "d", "chunks": 1, "digest": "0" * 12, "written_by": None, "hub": {}, "stored": {}, "rearranged": None,
              "conversations": facts, "recorded_every": 1}  # fmt: skip
    assert explain(report)[0] == f"dataset d is up to date: 400 conversations, 1 chunks, digest {'0' * 12}"
    assert explain(report)[2] == "conversations: 400 with 900 tokens, in 10 rows that are 70.3% full"
    report["conversations"] = facts | {"form": "preferences"}
    assert ": 400 preferences, " in explain(report)[0]
    counts |= {"cut": 1, "split": 2}
    report["conversations"] = facts
    assert explain(report)[4:] == ["1 conversations cut to sequence_length", "2 conversations split at sequence_length"]
    report["conversations"] = facts | {"turns": "each"}  # these were reported as split at sequence_length, too
    assert explain(report)[4:] == [
        "1 conversations with turns cut or left out at sequence_length",
        "2 conversations made into one conversation per turn",
    ]
