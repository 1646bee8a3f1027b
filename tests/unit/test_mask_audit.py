"""Tests the audit of loss masks before the first step: what it counts, what stops a run, and how it is shown."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from heliostat.data import manifest
from heliostat.data.conversations import FACT, PACKS
from heliostat.errors import ConfigError, DataError
from heliostat.recipes import loading
from heliostat.recipes.auditing import MaskAudit
from heliostat.recipes.text import mask_audit
from heliostat.recipes.text.sft import SFT
from heliostat.storage.locations import Location
from heliostat.tracking.report import conversations as report
from heliostat.validation import audit_lines
from rich.console import Console

from tests.unit import build_conversations
from tests.unit.build_conversations import CHATML, Messages


def audited(folder: Path, **changes: Any) -> MaskAudit:
    data = folder if folder.exists() else build_conversations.packs(folder, **changes)
    recipe = loading.load(build_conversations.sft(data), [manifest.read(Location(str(data)))])
    assert isinstance(recipe, SFT)
    return recipe.audit()


def changed(folder: Path, facts: dict[str, Any] | None = None, rows: Any = lambda rows: rows) -> Path:
    """Writes a dataset whose facts or rows were changed after its counts were made."""
    data = build_conversations.packs(folder.with_name("unchanged"))
    source = manifest.read(Location(str(data)))
    table = rows(pq.read_table(data / "shards/0.parquet").to_pylist())
    known = source.meta[FACT]
    counts = {**known["counts"], **(facts or {}).pop("counts", {})}
    return build_conversations.write(folder, table, PACKS, build_conversations.tokenizer(),
                                     {**known, **(facts or {}), "counts": counts})  # fmt: skip


def test_the_audit_counts_what_the_rows_contain(tmp_path: Path) -> None:
    found = audited(tmp_path / "packs", number=200)
    (source,) = found["sources"]
    rows = pq.read_table(tmp_path / "packs/shards/0.parquet").to_pylist()
    assert source["rows"] == len(rows) and source["conversations"] == 200
    assert source["tokens"] == sum(len(row["tokens"]) for row in rows)
    assert source["trained"] == sum(sum(row["trained"]) for row in rows)
    assert source["fill"] == pytest.approx(source["tokens"] / (96 * len(rows)))
    assert source["untrained_rows"] == 0 and source["sampled_turns"] == source["trained_ends"] > 0
    assert 0 < source["sampled_rows"] < source["rows"], "it reads only some row groups of a larger dataset"
    assert found["warnings"] == []


def test_examples_mark_exactly_the_trained_text(tmp_path: Path) -> None:
    found = audited(tmp_path / "packs")
    assert len(found["examples"]) == mask_audit.EXAMPLES
    for example, chat in zip(found["examples"], build_conversations.conversations(3), strict=True):
        trained = [part["text"] for part in example if part["trained"]]
        assert trained == [f"{message['content']}<|im_end|>" for message in chat if message["role"] == "assistant"]
        text = "".join(part["text"] for part in example)
        assert text == "".join(f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n" for message in chat)


def test_a_dataset_whose_ends_are_not_trained_is_warned_about(tmp_path: Path) -> None:
    found = audited(tmp_path / "packs", end_of_turn=False)
    assert found["sources"][0]["trained_ends"] == 0 < found["sources"][0]["sampled_turns"]
    (warning,) = found["warnings"]
    assert "the model doesn't learn to stop" in warning


def test_a_dataset_of_conversations_that_are_cut_is_warned_about(tmp_path: Path) -> None:
    """Its facts say that ends are trained, and that no conversation reaches its end."""
    source = manifest.read(Location(str(build_conversations.packs(tmp_path / "unended", end_of_turn=False))))
    rows = pq.read_table(tmp_path / "unended/shards/0.parquet").to_pylist()
    known = {**source.meta[FACT], "end_of_turn": True}
    found = audited(build_conversations.write(tmp_path / "cut", rows, PACKS, build_conversations.tokenizer(), known))
    assert "the model doesn't learn to stop" in found["warnings"][0]
    with pytest.raises(ConfigError, match="no trained turn of the rows ends with token 0"):
        audited(changed(tmp_path / "end", {"end": 0}))


def silent(number: int) -> list[Messages]:
    return [[{"role": "user", "content": "amber"}]] * number


def test_rows_with_nothing_to_train_stop_a_run_above_the_bound(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data.sources.0.path: .* 8 of 8 rows \(100.0%\) have no trained token.* above 0.1%"):
        audited(tmp_path / "all", chats=silent(8), pack=False)
    with pytest.raises(ConfigError, match=r"1 of 33 rows \(3.0%\) have no trained token"):
        audited(tmp_path / "some", chats=[*build_conversations.conversations(32), *silent(1)], pack=False)


@pytest.mark.parametrize("name", ["conversations", "tokens", "trained"])
def test_rows_that_contradict_the_facts_are_an_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=rf"the rows have [\d,]+ of '{name}', but the manifest says 7"):
        audited(changed(tmp_path / "changed", {"counts": {name: 7}}))


def test_a_changed_mask_is_an_error(tmp_path: Path) -> None:
    def masked(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{**row, "trained": [False, True, *row["trained"][2:]]} for row in rows]

    with pytest.raises(ConfigError, match=r"of 'trained', but the manifest says"):
        audited(changed(tmp_path / "changed", rows=masked))


def test_a_changed_template_is_an_error(tmp_path: Path) -> None:
    data = build_conversations.packs(tmp_path / "packs")
    (data / "chat_template.jinja").write_text(CHATML + " ")
    with pytest.raises(DataError, match="differs from the template that made the dataset"):
        audited(data)


@pytest.mark.parametrize("colored", [True, False])
def test_the_terminal_shows_trained_text_apart_in_80_columns(tmp_path: Path, colored: bool) -> None:
    file = io.StringIO()
    shown = Console(width=80, force_terminal=colored, color_system="standard" if colored else None, file=file)
    for line in audit_lines.lines(audited(tmp_path / "packs"), colored):
        shown.print(line)
    text = file.getvalue()
    assert ("\x1b[1;32mfjord<|im_end|>" if colored else "⟦fjord<|im_end|>⟧") in text
    assert "96 conversations in 51 rows" in " ".join(text.split())
    assert colored or all(len(line) <= 80 for line in text.splitlines())


def test_the_report_colors_trained_text_and_escapes_it() -> None:
    example = [{"text": "<b>ask</b>", "trained": False}, {"text": "<i>say</i>", "trained": True}]
    audit: Any = {"sources": [], "examples": [example], "warnings": ["<u>"]}
    page = "".join(report.mask_section(audit))
    assert "<span class='trained'>&lt;i&gt;say" in page and "<span class='muted'>&lt;b&gt;ask" in page and "<u>" not in page
    assert report.mask_section(None) == []


def test_the_report_shows_the_first_and_the_last_answers() -> None:
    row: Any = {"prompt": "p", "answer": "<first>", "wanted": "w", "finished": False}
    page = "".join(report.answer_section([report.StepAnswers(10, [row]), report.StepAnswers(20, [{**row, "answer": "last"}])]))
    assert "after step 10" in page and "after step 20" in page and "&lt;first&gt;" in page and "(no end)" in page
    assert report.answer_section([]) == []


def test_long_text_is_shortened_and_the_left_out_characters_are_counted() -> None:
    text = "a" * 500 + "b" * 500
    short = mask_audit.shortened(text)
    assert "600 characters" in short and short.startswith("a" * 200) and short.endswith("b" * 200)
    assert mask_audit.shortened("a" * mask_audit.LONGEST) == "a" * mask_audit.LONGEST
    assert json.dumps(short)
