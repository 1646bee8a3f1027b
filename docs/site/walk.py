"""Runs the commands of a page as they stand, compares their output with the page, or writes it into the page.

    python -m docs.site.walk docs/tutorials/text.md     # runs the page in a clone of the last commit, and refreshes its outputs

A page has three kinds of blocks for this:

    ```yaml or ```python, whose first line is `# NAME`     a file that the reader saves under that name
    ```sh                                                 commands; a comment after two spaces is for the reader
    ```text, directly after ```sh                         what these commands print; a line `...` stands for any lines
    <!-- output -->, there                                the place of such a block, which a refresh writes

A page shows 80 columns: a longer line is broken at a word, and its rest is indented. Numbers, durations, sizes, and digests
differ between runs, so the comparison masks them. `<!-- varies -->` above an output says that its words differ too, for example
text that a model generates. Such a block is refreshed, and not compared.

Comments with a meaning: "what an error looks like" (the command prints one line and ends with exit code 2), "press Ctrl-C" (it
gets a SIGINT once it trains). A command that serves a page gets one once the page answers.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import accumulate, takewhile
from pathlib import Path

ROOT = Path(__file__).parents[2]
EACH_S = 1500.0  # of a command: a sweep or a diffusion model takes minutes on two cores
ENDS_S = 120.0
TOO_LONG = -1  # the exit code of a command that was ended for it
HEAD, TAIL = 5, 9  # lines of a long output that the page shows
COLUMNS = 80
REST, NARROWEST = "    ", 30  # before the rest of a longer line; the columns that a table leaves for it
HOME = "/home/you/heliostat"  # stands for the folder in which the page was run
ELLIPSIS = "..."
ERROR, CTRL_C = "what an error looks like", "press Ctrl-C"

BLOCK = re.compile(r"^(?P<fence>`{3,})(?P<language>\w*)\n(?P<code>.*?)^(?P=fence)\n?", re.MULTILINE | re.DOTALL)
OUTPUT = re.compile(
    r"\n*(?:<!-- (?P<mark>output|varies) -->\n)?(?P<block>(?:(?P<fence>`{3,})text\n(?P<code>.*?)^(?P=fence)\n)?)",
    re.MULTILINE | re.DOTALL,
)
SERVES = re.compile(r"heliostat (run |model )?(ui|play)\b")
MASKS = (
    (re.compile(r"\x1b\[[\d;]*m"), ""),
    (re.compile(r"--prompt ('[^']*'|\S+)"), "--prompt P"),  # of a run's next command: a held-out text's first words
    (re.compile(r"\b(?=[0-9a-f]*\d)[0-9a-f]{8,}\b"), "H"),
    (re.compile(r"[\d][\d,]*(\.\d+)?(e[-+]?\d+)?"), "N"),
    (re.compile(r"\bN (ms|s|min|h)( N (s|min))?\b"), "N s"),
    (re.compile(r"\bN ([KMG]i?)?B\b"), "N B"),
    (re.compile(r"[-─━]{3,}"), "-"),
    (re.compile(r"\s+"), " "),
    (
        re.compile(r"\((?:[a-z][a-z ]* N(?:, |(?=\))))+\)"),
        "(parts)",
    ),  # of a duration: those that took any time, the longest first
)


@dataclass(frozen=True)
class Command:
    """A command of a page, with the comment for its reader."""

    text: str
    comment: str

    @property
    def interrupted(self) -> bool:
        return CTRL_C in self.comment or bool(SERVES.search(self.text))

    @property
    def expected(self) -> set[int]:
        return {2} if ERROR in self.comment else {0, 130} if self.interrupted else {0}


@dataclass(frozen=True)
class Step:
    """A block of a page: a file that it has the reader write, or commands with the output that it shows."""

    file: tuple[str, str] | None = None  # name, text
    commands: tuple[Command, ...] = ()
    shown: str | None = None  # None: the page shows no output
    varies: bool = False
    place: tuple[int, int] | None = None  # of the output's block in the page's text, if it has a place there


@dataclass
class Walk:
    """What running a page gave: faults, and the outputs by place."""

    faults: list[str] = field(default_factory=list)
    outputs: list[tuple[Step, str]] = field(default_factory=list)


def steps(page: str) -> Iterator[Step]:
    """Yields what a page has its reader do, in order."""
    for block in BLOCK.finditer(page):
        code, first = block["code"], block["code"].partition("\n")[0]
        if block["language"] in ("yaml", "python") and re.fullmatch(r"# [\w.-]+\.\w+", first):
            yield Step(file=(first[2:], code))
        elif block["language"] == "sh":
            output = OUTPUT.match(page, block.end())
            typed = tuple(commands(code))
            if output and (output["mark"] or output["block"]):
                yield Step(None, typed, output["code"], output["mark"] == "varies", output.span("block"))
            else:
                yield Step(None, typed)


def commands(code: str) -> Iterator[Command]:
    """Yields the commands of a shell block, each on one line; `make test` is the suite itself."""
    for line in re.sub(r"\\\n\s*", "", code).splitlines():
        text, _, comment = line.partition("  # ")
        if text.strip() and not text.startswith(("make test", "#")):
            yield Command(text.strip(), comment.strip())


def masked(text: str) -> list[str]:
    """Splits an output into lines whose numbers, durations, sizes, digests, and spaces are masked."""
    for pattern, stands in MASKS:
        text = "\n".join(pattern.sub(stands, line).strip() for line in text.splitlines())
    return text.splitlines()


def missing(shown: str, printed: str) -> list[str]:
    """Lists the shown lines that a run did not print in this order. A line may continue in the indented ones below it."""
    lines, left, absent = shown.splitlines(), iter(masked(printed)), []
    while lines:
        rest = takewhile(lambda line: line.startswith(REST), lines[1:])
        wanted = {"".join(masked(line)): count for count, line in enumerate(accumulate([lines[0], *rest], "{} {}".format), 1)}
        count = 1 if {"", ELLIPSIS} & wanted.keys() else next((wanted[line] for line in left if line in wanted), 0)
        if not count:
            absent.append(lines[0])
            left = iter(masked(printed))  # the following lines are searched from the start
        del lines[: count or 1]
    return absent


def abridged(text: str) -> str:
    """Cuts a long output to its first and last lines, and breaks long lines."""
    lines = [line.rstrip() for line in re.sub(r"\x1b\[[\d;]*m", "", text).strip("\n").splitlines()]
    if len(lines) > HEAD + TAIL + 1:
        lines = [*lines[:HEAD], ELLIPSIS, *lines[-TAIL:]]
    return "".join(f"{part}\n" for line in lines for part in broken(line))


def broken(line: str) -> list[str]:
    """Breaks a line at words to what fits in the columns of a page, below its last column of a table; longer words stay."""
    gaps = () if line.lstrip().startswith('"') else re.finditer(r"\S {2,}(?=\S)", line)  # a quoted text is no table
    columns = [gap.end() for gap in gaps if gap.end() <= COLUMNS - NARROWEST]
    indent = " " * max(len(REST) + len(line) - len(line.lstrip()), 0, *columns)
    words = textwrap.TextWrapper(
        COLUMNS, subsequent_indent=indent, replace_whitespace=False, break_long_words=False, break_on_hyphens=False
    )
    return words.wrap(line) or [""]


def refreshed(page: str, outputs: list[tuple[Step, str]]) -> str:
    """Writes outputs into a page, in the places that it has for them."""
    for (begin, end), printed in sorted(((step.place, printed) for step, printed in outputs if step.place), reverse=True):
        text = abridged(printed)
        fence = "`" * max(3, 1 + max(map(len, re.findall(r"^ *(`+)", text, re.MULTILINE)), default=0))
        page = page[:begin] + f"{fence}text\n{text}{fence}\n" + page[end:]
    return page


def clone(folder: Path) -> Path:
    """Clones the last commit into a folder, with the environment that runs this."""
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], check=True)
    (folder / ".venv").symlink_to(sys.prefix)
    for name in ("pyproject.toml", "requirements.lock", "tests/requirements.lock"):
        os.utime(folder / name, (1, 1))  # older than .venv/.installed: make installs nothing into the shared .venv
    return folder


def environment(folder: Path) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_", "HELIOSTAT_"))}
    path = f"{folder}/.venv/bin:{kept['PATH']}"
    return {**kept, "PATH": path, "PYTHONPATH": str(folder / "platform"), "OMP_NUM_THREADS": "1", "COLUMNS": str(COLUMNS)}


def walk(page: str, folder: Path, already: set[str] | None = None) -> Walk:
    """Runs a page's commands in a folder; those in `already` have run there before."""
    result = Walk()
    for step in steps(page):
        if step.file:
            (folder / step.file[0]).write_text(step.file[1])
        printed, due = "", [command for command in step.commands if already is None or command.text not in already]
        for command in due:
            output, faults = run(command, folder)
            printed += output
            result.faults += faults
        if already is not None:
            already.update(command.text for command in due)
        if step.place and due:
            result.outputs.append((step, printed))
            absent = [] if step.varies or step.shown is None else missing(step.shown, printed)
            result.faults += [f"{step.commands[-1].text}: shown, and not printed: {line}" for line in absent]
    return result


def run(command: Command, folder: Path) -> tuple[str, list[str]]:
    """Runs a command; returns what it prints, and what is wrong with it."""
    began = time.monotonic()
    with tempfile.NamedTemporaryFile("r", errors="replace") as log:
        try:
            code = _run(command, folder, Path(log.name))
        except (TimeoutError, subprocess.TimeoutExpired):
            code = TOO_LONG
        printed = log.read().replace(str(folder), HOME)
    print(f"{time.monotonic() - began:6.1f} s  exit {code}  {command.text}", file=sys.stderr, flush=True)  # noqa: T201
    lines, faults = printed.strip().splitlines() or [""], []
    if code not in command.expected or "Traceback (most recent call last)" in printed:
        faults.append(f"{command.text}: exit {code}: {' | '.join(lines[-5:])}")
    if "no run has trained on" in printed:
        faults.append(f"{command.text}: found nothing: {printed}")
    if command.expected == {2} and len(lines) != 1:
        faults.append(f"{command.text}: an error has one line, and not {len(lines)}: {printed}")
    return printed, faults


def _run(command: Command, folder: Path, log: Path) -> int:
    with log.open("w") as out:
        process = subprocess.Popen(["bash", "-c", command.text], cwd=folder, env=environment(folder), stdin=subprocess.DEVNULL,
                                   stdout=out, stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=_heed)  # fmt: skip
        try:
            if command.interrupted:
                return _interrupt(process, log, trains if CTRL_C in command.comment else answers)
            return process.wait(EACH_S)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
                try:
                    process.wait(ENDS_S)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)


def _interrupt(process: subprocess.Popen[bytes], log: Path, ready: Callable[[Path], bool]) -> int:
    """Presses Ctrl-C as soon as the command is ready; returns its exit code."""
    deadline = time.monotonic() + EACH_S
    while process.poll() is None and not ready(log):
        if time.monotonic() > deadline:
            raise TimeoutError(log.read_text()[-3000:])
        time.sleep(0.2)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all processes in the foreground
    return process.wait(ENDS_S)


def _heed() -> None:
    """Lets Ctrl-C end a command, also if this program was started in the background, where shells have it ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def trains(log: Path) -> bool:
    return bool(re.search(r"\bstep +\d+", log.read_text(errors="replace")))


def answers(log: Path) -> bool:
    address = re.search(r"http://[\d.]+:\d+", log.read_text(errors="replace"))
    try:
        return address is not None and urllib.request.urlopen(f"{address[0]}/health", timeout=5).status == 200
    except OSError:
        return False


def main(pages: list[str]) -> None:
    with tempfile.TemporaryDirectory() as base:
        for page in pages:
            path = ROOT / page
            text = path.read_text(encoding="utf-8")
            result = walk(text, clone(Path(base) / path.stem))
            path.write_text(refreshed(text, result.outputs), encoding="utf-8")
            sys.stdout.write("\n".join([f"{page}: refreshed", *result.faults, ""]))


if __name__ == "__main__":
    main(sys.argv[1:])
