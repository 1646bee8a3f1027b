"""Tests that progress and log lines fit their terminal, and lose nothing important."""

import inspect
import io
import logging
import re
from datetime import date, datetime

import pytest
from heliostat.cli import main
from heliostat.runs.events import Steps
from heliostat.terminal import duration, fit
from heliostat.training.driver import progress
from rich.console import Console

PARTS = [(1, "loss 6.2277"), (5, "lr 1.00e-03"), (3, "1,234,567 tokens/s"), (4, "MFU 45.6%"), (7, "data wait 0.0%")]


@pytest.mark.parametrize("width", [20, 40, 60, 80, 100, 200])
def test_the_progress_line_fits_every_terminal(width):
    """The least important parts are dropped first. The step stays last, and the remaining time and the loss stay longer than the
    rest."""
    text = progress.line("quickstart", 1_234, 10_000, PARTS, 4000.0, width)
    assert len(text) <= width and text.startswith("quickstart 1,234/10,0"[: width - 1])
    assert ("loss 6.2277" in text) == (width >= 40) and ("ETA 1 h 6 min" in text) == (width >= 60)
    assert ("━" in text) == (width >= 200)
    assert "…" not in text or width == 20


def test_there_is_no_time_to_go_before_two_reports_and_none_at_the_end(caplog):
    """The line doesn't show "ETA 0 s" at the first step."""
    speed = progress.Speed(100)
    assert speed.left() is None
    speed.reached(1, 10.0)
    assert speed.left() is None
    speed.reached(11, 20.0)
    assert speed.left() == 89.0
    speed.reached(100, 120.0)
    assert speed.left() is None
    event = Steps(first=0, loss=[2.0], lr=[0.1], grad_norm=[1.0], seconds=1.0, tokens_per_second=10.0, data_wait=0.0)
    with caplog.at_level(logging.INFO, "heliostat"):
        progress.ProgressReporter(Console(file=io.StringIO()), "x", 0, 10, "tokens").event(event)
    assert caplog.messages == ["step 1/10  loss 2.0000  lr 1.00e-01  10 tokens/s  data wait 0.0%"]


def test_a_log_line_is_whole_on_a_narrow_terminal(monkeypatch):
    """The line follows its time, and text that looks like markup is unchanged."""
    at = io.StringIO()
    monkeypatch.setattr(main, "console", Console(file=at, force_terminal=True, width=40, no_color=True))
    handler = main.Terminal()
    handler.setFormatter(main.LogLines("%(message)s"))
    message = "step 10  held-out: [bold] loss 7.327  perplexity 1520  bits_per_byte 3.067"
    handler.emit(logging.LogRecord("x", logging.INFO, "", 0, message, (), None))
    lines = re.sub(r"\x1b\[[0-9;]*m", "", at.getvalue()).splitlines()
    assert all(len(line) <= 40 for line in lines) and re.match(r"\d\d:\d\d:\d\d step 10", lines[0])
    assert " ".join(" ".join(line[9:] for line in lines).split()) == " ".join(message.split())


def test_log_lines_do_not_write_over_the_live_line():
    """Log lines and the live line share a console."""
    from heliostat.terminal import console

    assert inspect.getmodule(main.Terminal.emit).console is console  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "0 s"), (59.6, "1 min 0 s"), (310, "5 min 10 s"), (12_000, "3 h 20 min"), (187_300, "2 d 4 h")]
)
def test_a_time_is_told_in_its_two_largest_units(seconds, text):
    assert duration(seconds) == text


def test_what_does_not_fit_is_left_out_by_rank():
    assert fit([(0, "name"), (2, "b"), (1, "a")], 7) == "name  a"
    assert fit([(0, "a-very-long-name")], 8) == "a-very-…"


def test_log_lines_have_a_date_from_the_second_day_on_and_always_in_a_file(capsys):
    at = datetime(2026, 11, 27, 0, 0, 5)
    assert main.stamp(at, date(2026, 11, 27)) == "00:00:05" and main.stamp(at, date(2026, 11, 26)) == "2026-11-27 00:00:05"
    record = logging.LogRecord("x", logging.WARNING, "", 0, "told", (), None)
    assert re.fullmatch(
        r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d told", main.LogLines("%(asctime)s %(message)s", main.STAMP).format(record)
    )
