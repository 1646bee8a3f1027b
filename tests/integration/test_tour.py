"""The tour (docs/tour.md) and then the README, command by command, in a fresh clone: what a newcomer types works, in that order.

What a command is expected to do is what the page's comment behind it says: "what an error looks like" ends with one line and
exit code 2; "press Ctrl-C while it trains" gets a SIGINT then; `heliostat run ui` one when its page answers. All others succeed.
The clone's `.venv` is the one that runs this test, with the clone's own code first. `make test-slow`; long.
"""

import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = ("docs/tour.md", "README.md")
EACH_S = 1500.0  # the sweep and the diffusion model take minutes on two cores
ENDS_S = 120.0

pytestmark = [pytest.mark.slow, pytest.mark.timeout(5400)]


@dataclass(frozen=True)
class Command:
    text: str
    comment: str


def commands(page: str) -> Iterator[Command]:
    """The commands of a page's shell blocks, in order; `make test` is the suite itself."""
    for block in re.findall(r"^```sh\n(.*?)^```", page, re.MULTILINE | re.DOTALL):
        for line in block.splitlines():
            text, _, comment = line.partition("  # ") if "  # " in line else (line, "", "")
            if text.strip() and not text.startswith("make test"):
                yield Command(text.strip(), comment.strip())


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The last commit in a folder of its own."""
    folder = tmp_path_factory.mktemp("tour") / "heliostat"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], check=True)
    (folder / ".venv").symlink_to(sys.prefix)
    os.utime(folder / "pyproject.toml", (1, 1))  # older than .venv/.installed: make installs nothing into the shared .venv
    assert (folder / ".venv" / ".installed").exists() and (folder / ".venv" / "bin" / "heliostat").exists()
    return folder


def environment(clone: Path) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_", "HELIOSTAT_"))}
    return {**kept, "PYTHONPATH": str(clone / "platform"), "OMP_NUM_THREADS": "1"}


def trains(log: Path) -> bool:
    return bool(re.search(r"\bstep +\d+", log.read_text(errors="replace")))


def answers(log: Path) -> bool:
    found = re.search(r"http://[\d.]+:\d+", log.read_text(errors="replace"))
    try:
        return found is not None and urllib.request.urlopen(f"{found[0]}/health", timeout=5).status == 200
    except OSError:
        return False


def interrupt(process: subprocess.Popen, log: Path, ready: Callable[[Path], bool]) -> int:
    """Ctrl-C as soon as it is ready; the exit code."""
    deadline = time.monotonic() + EACH_S
    while not ready(log):
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all of the foreground's processes
    return process.wait(ENDS_S)


def _heed() -> None:
    """Ctrl-C ends a command, also if this test was started in the background, where shells have it ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def run(command: Command, clone: Path, log: Path) -> int:
    with log.open("w") as out:
        process = subprocess.Popen(["bash", "-c", command.text], cwd=clone, env=environment(clone), stdin=subprocess.DEVNULL,
                                   stdout=out, stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=_heed)  # fmt: skip
        try:
            if "press Ctrl-C" in command.comment:
                return interrupt(process, log, trains)
            if command.text.endswith("heliostat run ui"):
                return interrupt(process, log, answers)
            return process.wait(EACH_S)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
                try:
                    process.wait(ENDS_S)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)


def shown(root: Path) -> list[Command]:
    """The commands of the tour, and those that the README has beyond them: what was run once is not run again."""
    found: dict[str, Command] = {}
    for page in PAGES:
        for command in commands((root / page).read_text()):
            found.setdefault(command.text, command)
    return list(found.values())


def test_every_command_of_the_tour_and_the_readme_works_in_its_order(clone: Path, tmp_path: Path):
    found = shown(clone)
    assert len(found) > 30 and any("what an error looks like" in c.comment for c in found)
    wrong: list[str] = []
    try:
        for number, command in enumerate(found):
            log = tmp_path / f"{number:02}.log"
            started = time.monotonic()
            code = run(command, clone, log)
            said = log.read_text(errors="replace")
            print(f"{time.monotonic() - started:6.1f} s  exit {code}  {command.text}", flush=True)  # noqa: T201
            expected = {2} if "what an error looks like" in command.comment else {0}
            if "press Ctrl-C" in command.comment or command.text.endswith("heliostat run ui"):
                expected = {0, 130}
            lines = said.strip().splitlines() or [""]
            if code not in expected or "Traceback (most recent call last)" in said:
                wrong.append(f"{command.text}: exit {code}: {' | '.join(lines[-5:])}")
            if "no run has trained on" in said:
                wrong.append(f"{command.text}: found nothing: {said}")
            if expected == {2} and len(lines) != 1:
                wrong.append(f"{command.text}: {len(lines)} lines where one says it: {said}")
    finally:
        subprocess.run([".venv/bin/heliostat", "cluster", "down", "clusters/local.yaml"], cwd=clone, env=environment(clone),
                       capture_output=True, timeout=ENDS_S, check=False)  # fmt: skip
    assert wrong == []
