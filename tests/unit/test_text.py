"""Tests that text from data reaches a terminal as text: no control character in it moves the cursor, colors, or reverses the
writing."""

import io
import logging
import unicodedata

import pytest
from heliostat.cli import common, main, runs
from heliostat.text import brief, printable

EVIL = "\x1b[2J\x1b]0;title\x07\x9b31m\u202egnp.exe\u2066\r\x00\x7f"


def test_no_control_character_and_no_override_of_direction_is_left():
    """For all of Unicode's. Other characters stay the same, and nothing is escaped twice."""
    everything = "".join(map(chr, range(0x110000)))
    shown = printable(everything)
    assert not {c for c in shown if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp")}
    assert not {
        c for c in shown if unicodedata.bidirectional(c) in ("LRE", "LRO", "RLE", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
    }
    assert printable("Grüße, 世界 🌍 \\x1b") == "Grüße, 世界 🌍 \\x1b" and printable(shown) == shown
    assert printable("\x1b[2J") == "\\x1b[2J" and printable("\u202ea") == "\\u202ea" and printable("a\nb\tc") == "a\\nb\\tc"


def test_line_breaks_and_tabs_stay_where_they_are_asked_for():
    assert printable("a\n\tb\r\x1b", lines=True) == "a\n\tb\\r\\x1b"


def test_a_librarys_words_are_one_line():
    """The first line, truncated. An exception without a message is shown as its class."""
    assert brief(ValueError("\n  first \x1b\nsecond")) == "first \\x1b"
    assert brief(KeyError()) == "KeyError" and brief("") == ""
    assert len(brief("x" * 10_000)) == 300 and brief("x" * 10_000).endswith("xxx ...")


@pytest.mark.parametrize("full", [False, True])
def test_a_sample_with_control_characters_is_shown_escaped(monkeypatch, full):
    """In whole or in part, including its place, and the reason of a bad sample. Text that looks like markup isn't interpreted."""
    shown = io.StringIO()
    monkeypatch.setattr(runs, "out", common.Printer(file=shown, highlight=False, soft_wrap=True))
    bad = {"shard": f"s{EVIL}", "row_group": 0, "row": 0, "reason": EVIL}
    place = {"lane": 0, "place": 0, "source": "d", "shard": f"{EVIL}.parquet", "row_group": 0, "row": 0, "epoch": 0}
    runs._print_sample({**place, "text": f"[bold]{EVIL}\n\tmore", "replaces": bad}, full)
    text = shown.getvalue()
    assert printable(text, lines=True) == text and text.count("\\x1b[2J") >= 3 and "[bold]" in text
    assert text.endswith("more\n") == full  # on a line of its own, behind a tab


def test_a_log_line_with_control_characters_is_written_escaped():
    """Warnings contain names of files."""
    record = logging.LogRecord("x", logging.WARNING, "", 0, "%s: cannot be read", (EVIL,), None)
    assert main.LogLines("%(message)s").format(record) == f"{printable(EVIL)}: cannot be read"


def test_an_error_with_control_characters_is_written_escaped(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["heliostat", "data", "index", f"/nowhere/{EVIL.replace(chr(0), '')}"])
    with pytest.raises(SystemExit) as end:
        main.main()
    error = capsys.readouterr().err
    assert end.value.code == 2 and printable(error, lines=True) == error and "\\x1b[2J" in error


def test_ctrl_c_is_said_in_a_word(monkeypatch, capsys):
    """typer turns it into an exit without a message."""
    from heliostat.data import index

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(index, "index", interrupted)
    monkeypatch.setattr("sys.argv", ["heliostat", "data", "index", "/nowhere"])
    with pytest.raises(SystemExit) as end:
        main.main()
    assert end.value.code == 130 and capsys.readouterr().err.strip() == "interrupted"
