"""Types the pages on your own data and model (docs/own/) unchanged, in an empty folder, and compares the output with the pages.

`docs.site.walk` reads and compares a page. Its commands are forks here, which saves their imports.
"""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from docs.site.walk import HOME, Command, missing, steps
from tests.integration import commands

PAGES = Path(__file__).parents[2] / "docs" / "own"

pytestmark = [pytest.mark.timeout(1800)]


def typed(command: Command, folder: Path, log: Path) -> tuple[int, str]:
    """Returns the exit code and the output of a page's command, run in its folder."""
    words = shlex.split(command.text)
    if words[0] == "heliostat":
        process = commands.run(*words[1:], log=log, timeout=900, cwd=folder, OMP_NUM_THREADS="1")
        code, printed = process.returncode or 0, process.err + process.out
    else:
        env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}  # `python` is this one
        done = subprocess.run(command.text, shell=True, cwd=folder, env=env, capture_output=True, text=True, timeout=600)
        code, printed = done.returncode, done.stderr + done.stdout
    return code, printed.replace(str(folder), HOME)


@pytest.mark.parametrize(
    "page",
    [
        pytest.param("text", marks=pytest.mark.ci),
        pytest.param("module", marks=pytest.mark.ci),
        pytest.param("images", marks=pytest.mark.slow),
        pytest.param("hugging-face-model", marks=pytest.mark.slow),
        pytest.param("hugging-face-dataset", marks=pytest.mark.slow),
    ],
)
def test_every_command_of_a_page_works_in_its_order_and_prints_what_is_shown(page, tmp_path, monkeypatch):
    for name in ("MLFLOW_TRACKING_URI", "RAY_ADDRESS"):  # other tests leave them; a reader's shell has none
        monkeypatch.delenv(name, raising=False)
    folder, log, faults = tmp_path / "empty", tmp_path / "log", []
    folder.mkdir()
    for step in steps((PAGES / f"{page}.md").read_text(encoding="utf-8")):
        if step.file:
            (folder / step.file[0]).write_text(step.file[1])
        printed = ""
        for command in step.commands:
            code, output = typed(command, folder, log)
            printed += output
            if code not in command.expected or "Traceback (most recent call last)" in output:
                faults.append(f"{command.text}: exit {code}: {output[-1500:]}")
        if step.shown is not None and not step.varies:
            faults += [f"{step.commands[-1].text}: shown, and not printed: {line}" for line in missing(step.shown, printed)]
    assert faults == []
