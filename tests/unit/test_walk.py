"""Tests that `docs.site.walk` runs a page's commands, compares their output with the page, and refreshes it."""

import pytest

from docs.site import walk

PAGE = """# A page

```yaml
# notes.yaml
name: notes
```

```sh
cat notes.yaml    # the file
echo 12 documents after 3 s
```

```text
# notes.yaml
...
99 documents after 1 min 2 s
```
"""


def test_a_page_is_run_and_compared_but_for_numbers_and_durations(tmp_path):
    assert walk.walk(PAGE, tmp_path).faults == []
    assert (tmp_path / "notes.yaml").read_text() == "# notes.yaml\nname: notes\n"
    (fault,) = walk.walk(PAGE.replace("documents after 1", "files after 1"), tmp_path).faults
    assert "shown, and not printed: 99 files after 1 min 2 s" in fault


def test_lines_in_another_order_are_a_fault():
    assert walk.missing("a\nb\n", "a\nx\nb\n") == []
    assert walk.missing("b\na\n", "a\nb\n") == ["a"]


def test_a_page_is_refreshed_in_the_blocks_that_it_has(tmp_path):
    page = walk.refreshed(PAGE, walk.walk(PAGE, tmp_path).outputs)
    assert page == PAGE.replace("...\n99 documents after 1 min 2 s", "name: notes\n12 documents after 3 s")
    assert walk.walk(page, tmp_path).faults == []


def test_an_output_whose_words_differ_is_refreshed_and_not_compared(tmp_path):
    page = "```sh\necho a\n```\n\n<!-- varies -->\n```text\nb\n```\n"
    result = walk.walk(page, tmp_path)
    assert result.faults == [] and walk.refreshed(page, result.outputs) == page.replace("\nb\n", "\na\n")


def test_a_place_without_an_output_gets_one(tmp_path):
    page = "```sh\necho a\n```\n\n<!-- output -->\n\nText.\n"
    result = walk.walk(page, tmp_path)
    assert result.faults == []
    written = walk.refreshed(page, result.outputs)
    assert written == "```sh\necho a\n```\n\n<!-- output -->\n```text\na\n```\n\nText.\n"
    assert walk.refreshed(written, walk.walk(written, tmp_path).outputs) == written


@pytest.mark.parametrize(
    ("command", "faults"),
    [
        ("false", 1),
        ("exit 2  # what an error looks like", 0),
        ("echo a; echo b; exit 2  # what an error looks like", 1),
        ("true  # what an error looks like", 1),
        ("echo 'Traceback (most recent call last)'", 1),
        ("echo step 12; sleep 60  # press Ctrl-C while it trains", 1),  # bash ends by the signal, and not with 130
    ],
)
def test_what_a_command_is_expected_to_do_is_in_its_comment(command, faults, tmp_path):
    assert len(walk.run(next(walk.commands(command)), tmp_path)[1]) == faults


def test_a_long_output_is_cut_to_its_first_and_last_lines():
    text = "".join(f"{i}\n" for i in range(100))
    assert walk.abridged(text).split() == [*map(str, range(5)), "...", *map(str, range(91, 100))]
    assert walk.missing(walk.abridged(text), text) == []


def test_a_line_of_more_columns_than_a_page_shows_is_broken_and_compared_as_one():
    text = "memory     " + ", ".join(f"part {i} 0.003{i}" for i in range(9)) + "\n    indented\n"
    shown = walk.abridged(text)
    assert all(len(line) <= walk.COLUMNS for line in shown.splitlines()) and len(shown.splitlines()) == 3
    assert walk.missing(shown, text.replace("0.0", "17.")) == []
    assert walk.missing(shown.replace("part 8", "share 8"), text)[0].startswith("memory")


def test_parts_of_a_duration_may_come_in_any_order_and_number():
    shown = "goodput 41.3% (idle 131.3, starting 89.7)\n"
    assert walk.missing(shown, "goodput 60.0% (starting 21.0, idle 4.0, checkpoint 0.5)\n") == []
    assert walk.missing(shown, "goodput 60.0% (idle: 4.0)\n") == [shown.strip()]


def test_an_output_with_the_fence_of_a_block_stays_inside_its_block(tmp_path):
    page = "```sh\nprintf '```sh\\nfalse\\n```\\n'\n```\n\n<!-- output -->\n\nText.\n"
    written = walk.refreshed(page, walk.walk(page, tmp_path).outputs)
    assert written.endswith("<!-- output -->\n````text\n```sh\nfalse\n```\n````\n\nText.\n")
    assert [step.shown for step in walk.steps(written)] == ["```sh\nfalse\n```\n"]
    assert walk.walk(written, tmp_path).faults == []


def test_a_command_that_does_not_end_is_a_fault_and_the_page_continues(tmp_path, monkeypatch):
    monkeypatch.setattr(walk, "EACH_S", 0.2)
    result = walk.walk("```sh\nsleep 60\necho a\n```\n\n```text\na\n```\n", tmp_path)
    assert len(result.faults) == 1 and "sleep 60: exit -1" in result.faults[0]


def test_commands_that_an_earlier_page_has_run_are_neither_run_nor_compared(tmp_path):
    page = "```sh\ntouch here\n```\n\n```text\nmade\n```\n"
    assert walk.walk(page, tmp_path, {"touch here"}).faults == [] and not (tmp_path / "here").exists()
    assert len(walk.walk(page, tmp_path, set()).faults) == 1 and (tmp_path / "here").exists()


def test_a_command_on_several_lines_is_one():
    code = "heliostat train job.yaml \\\n    --set a='b  c'  # for the reader\nmake test\n"
    assert [*walk.commands(code)] == [walk.Command("heliostat train job.yaml --set a='b  c'", "for the reader")]


def test_the_prompt_of_a_next_command_may_be_another():
    shown = "Next:  heliostat model generate models:/a/1 --prompt '# A\n       page' --mlflow uri\n"
    assert walk.missing(shown, "Next:  heliostat model generate models:/a/2 --prompt word --mlflow uri\n") == []
