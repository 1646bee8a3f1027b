"""Makes the pictures of the documentation from real runs: `python -m docs.site.pictures [NAME ...]`, all of them unless named.

    resumed     trains a short quickstart twice, kills a worker of the second run, resumes it on one worker: two losses, one curve
    goodput     where the seconds of that second run went
    terminal    the output of `make run`
    samples     what the digits quickstart draws, from its last evaluation
    mlflow      MLflow's page of the quickstart's run (needs chromium and chromedriver)
    funnel      what each stage of curation leaves of Python's standard library
    stream      when CPUs read and a GPU scores, in a pipeline on two nodes of Ray (the GPU is only one in name)

They go to `docs/images/`. Runs that exist already are not trained again: delete `.heliostat/runs/NAME` for that.
SVG pictures follow the reader's light or dark color scheme.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

import heliostat
from heliostat.chaos.process import Command, workers
from heliostat.chaos.servers import ServerProcess
from heliostat.curation import reasons
from heliostat.data import manifest
from heliostat.runs import goodput
from heliostat.storage.locations import Location
from heliostat.tracking import ui
from heliostat.tracking.report import svg as charts
from PIL import Image
from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.text import Text

from docs.site import walk
from tests.benchmarks import stream_scoring
from tests.integration import browser
from tests.waiting import until

ROOT = walk.ROOT
IMAGES = ROOT / "docs" / "images"
RUNS = ROOT / ".heliostat" / "runs"
STORE, HOST = f"sqlite:///{ROOT}/.heliostat/mlflow.db", "127.0.0.1"
WAIT_S = 1800.0
STEPS, KILLED = 120, 70  # of the two runs whose losses are compared; the step at which a worker dies
FIRST, LAST = 8, 4  # lines of a terminal's picture: at the beginning, and before the generated text
SHORT = {"train.steps": STEPS, "evaluate.every": 40, "checkpoint.every": 20, "train.log_every": 1, "mlflow.register": "null"}
STYLE = """svg { --text: #1f2328; --faint: #656d76; --line: #d8dee4; --one: #1f77b4; --two: #d1495b; --three: #b3640b;
font: 13px system-ui, "DejaVu Sans", sans-serif; }
@media (prefers-color-scheme: dark) { svg { --text: #e6edf3; --faint: #9198a1; --line: #30363d; --one: #58a6ff; --two: #ff7b72;
--three: #e3b341; } }
text { fill: var(--faint); } .strong { fill: var(--text); font-weight: 600; } .end { text-anchor: end; }
line { stroke: var(--line); } polyline { fill: none; stroke-linejoin: round; }"""


class Drawing:
    """Collects the marks of an SVG picture of `width` by `height` pixels; `title` says in words what it shows."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.width, self.height, self.title, self.marks = width, height, title, list[str]()

    def text(self, x: float, y: float, text: str, kind: str = "") -> None:
        self.marks.append(f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}">{escape(text)}</text>')

    def line(self, x1: float, y1: float, x2: float, y2: float, extra: str = "") -> None:
        self.marks.append(f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" {extra}/>')

    def curve(self, points: list[tuple[float, float]], extra: str) -> None:
        self.marks.append(f'<polyline points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}" {extra}/>')

    def bar(self, x: float, y: float, width: float, height: float, color: str) -> None:
        self.marks.append(f'<rect x="{x:.2f}" y="{y:.1f}" width="{max(width, 0.5):.2f}" height="{height:.1f}" fill="{color}"/>')

    def write(self, name: str) -> None:
        size = f'viewBox="0 0 {self.width} {self.height}" width="{self.width}"'
        head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">'
        text = [head, f"<title>{escape(self.title)}</title>", f"<style>{STYLE}</style>", *self.marks, "</svg>"]
        save(name, "\n".join(text) + "\n")


def save(name: str, text: str) -> None:
    (IMAGES / name).write_text(text, encoding="utf-8")


def heliostat_(*words: object) -> str:
    """Runs a command of heliostat in the repository; returns its standard output."""
    command = [sys.executable, "-m", "heliostat", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True, env=walk.environment(ROOT)).stdout


def settings(values: dict[str, object]) -> list[str]:
    return [word for key, value in values.items() for word in ("--set", f"{key}={value}")]


def quickstart(name: str, **more: object) -> list[str]:
    return ["jobs/quickstart.yaml", *settings({"name": name, **SHORT, **more})]


def unbroken_and_resumed() -> tuple[heliostat.Run, heliostat.Run]:
    """Trains the job once without a fault, and once with a worker killed and the rest of the steps on one worker."""
    if not (RUNS / "unbroken" / "result.json").exists():
        heliostat_("train", *quickstart("unbroken"), "--overwrite")
    if not (RUNS / "resumed" / "result.json").exists():
        with tempfile.NamedTemporaryFile() as log:
            words = [*quickstart("resumed"), "--set", "retries.max=0", "--overwrite"]
            with Command(words, Path(log.name), {"OMP_NUM_THREADS": "1"}) as command:
                command.until(lambda: command.step >= KILLED, WAIT_S, f"step {KILLED}")
                os.kill(workers(command.process.pid)[0].pid, signal.SIGKILL)
                command.wait(WAIT_S)
        heliostat_("train", *quickstart("resumed", **{"workers.count": 1}), "--resume")
    return heliostat.Run(RUNS / "unbroken"), heliostat.Run(RUNS / "resumed")


def resumed() -> None:
    """Draws the loss of the run that was killed over that of the unbroken one."""
    whole, broken = (run.losses() for run in unbroken_and_resumed())
    start = unbroken_and_resumed()[1].goodput()["attempts"][-1]["start_step"]
    apart = max(abs(whole[step] - broken[step]) for step in whole)
    left, top, width, height = 46, 56, 640, 210
    levels = charts.ticks(min(whole.values()), max(whole.values()), 5)
    drawing = Drawing(left + width + 14, top + height + 40, (
        f"Training loss of two runs over {STEPS} steps. In one, a worker is killed after step {KILLED}, and the run resumes from "
        f"step {start} on one worker. The curves coincide: the largest difference is {apart:.1e}."
    ))  # fmt: skip

    def at(step: float, loss: float) -> tuple[float, float]:
        return left + width * (step - 1) / (STEPS - 1), top + height * (levels[-1] - loss) / (levels[-1] - levels[0])

    for level in levels:
        y = at(1, level)[1]
        drawing.line(left, y, left + width, y)
        drawing.text(left - 8, y + 4, f"{level:g}", "end")
    for step in (1, *range(20, STEPS + 1, 20)):
        drawing.text(at(step, 0)[0] + 6, top + height + 18, f"{step}", "end")
    drawing.text(left, top + height + 35, "optimizer step")
    drawing.text(left, 16, f"Training loss. Largest difference between the two runs: {apart:.1e}", "strong")
    parts = (
        ("unbroken", whole, 1, STEPS, 'style="stroke: var(--one); stroke-width: 6; opacity: .35"'),
        (f"two workers, one killed after step {KILLED}", broken, 1, start, 'style="stroke: var(--two); stroke-width: 1.5"'),
        (f"on one worker from step {start}", broken, start, STEPS, 'style="stroke: var(--three); stroke-width: 1.5"'),
    )
    for number, (name, losses, first, last, look) in enumerate(parts):
        drawing.curve([at(step, losses[step]) for step in range(first, last + 1)], look)
        x = left + (0, 110, 400)[number]
        drawing.line(x, 34, x + 18, 34, look)
        drawing.text(x + 24, 38, name)
    drawing.line(at(start, 0)[0], top, at(start, 0)[0], top + height, 'stroke-dasharray="4 3"')
    drawing.write("resumed.svg")


def goodput_() -> None:
    """Draws where the seconds of the run that was killed went, attempt by attempt, on one axis of time."""
    report = unbroken_and_resumed()[1].goodput()
    attempts, total = report["attempts"], report["total_s"]
    first, left, width, high = attempts[0]["started"], 10, 676, 30
    shares = sorted(((s, p) for p, s in report["parts"].items() if s >= 0.05), reverse=True)
    drawing = Drawing(left + width + 14, 110 + 20 * -(-len(shares) // 4), (
        f"Every second of a run with a killed worker: {', '.join(f'{part} {seconds:.1f} s' for seconds, part in shares)}."
    ))  # fmt: skip
    drawing.text(left, 16, f"{total:,.0f} seconds, every one attributed. Goodput {report['goodput']:.0%}", "strong")
    for attempt in attempts:
        x = attempt["started"] - first
        (gap, before), *_ = attempt["before"].items()
        workers_ = f"{attempt['workers']} worker{'s' * (attempt['workers'] > 1)}"
        drawing.text(left + width * x / total, 38, f"{workers_}, steps {attempt['start_step'] + 1} to {attempt['reached']}")
        x -= before
        for part, seconds in [(gap, before), *((part, attempt["parts"][part]) for part in goodput.PARTS)]:
            if seconds > 0:
                drawing.bar(left + width * x / total, 44, width * seconds / total, high, goodput.COLOURS[part])
            x += seconds
    for number, (seconds, part) in enumerate(shares):
        x, y = left + 170 * (number % 4), 104 + 20 * (number // 4)
        drawing.bar(x, y - 10, 11, 11, goodput.COLOURS[part])
        drawing.text(x + 17, y, f"{part} {seconds:,.1f} s")
    drawing.write("goodput.svg")


def terminal() -> None:
    """Runs `make run` in a clone of the last commit, and draws what it prints."""
    with tempfile.TemporaryDirectory() as base:
        printed, faults = walk.run(walk.Command("make run", ""), walk.clone(Path(base) / "heliostat"))
    if faults:
        raise SystemExit("\n".join(faults))
    draw_terminal("make run", printed, "make-run.svg")


def draw_terminal(command: str, printed: str, name: str) -> None:
    """Draws a command's first lines, its last steps, and what follows them, at 80 columns."""
    console = Console(record=True, width=walk.COLUMNS, file=Path(os.devnull).open("w"), highlight=True)  # noqa: SIM115
    console.print(Text(f"$ {command}", style="bold green"))
    lines = re.sub(r"\x1b\[[\d;]*m", "", printed).strip().splitlines()
    end = next(number for number, line in enumerate(lines) if line.startswith("prompt: "))
    for line in (*lines[:FIRST], walk.ELLIPSIS, *lines[max(FIRST, end - LAST) :]):
        for part in walk.broken(line.replace(str(ROOT), walk.HOME)):
            console.print(part, markup=False)
    look = re.sub(r"@font-face \{\{.*?\}\}\s*", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)  # fonts of another server
    save(name, console.export_svg(title="heliostat", code_format=look, unique_id="terminal"))


def quickstart_run(name: str, pipeline: str) -> str:
    """Trains a quickstart's job if it has no finished run here; returns the MLflow run id."""
    if not (RUNS / name / "result.json").exists():
        heliostat_("data", "prepare", f"pipelines/{pipeline}.yaml")
        heliostat_("train", f"jobs/{name}.yaml", "--resume")
    return str(heliostat.Run(RUNS / name).run_id)


def store() -> Any:
    from mlflow import MlflowClient  # takes seconds

    return MlflowClient(STORE)


def samples() -> None:
    """Takes the last grid that the digits quickstart drew while it trained."""
    run_id = quickstart_run("quickstart-diffusion", "quickstart-images")
    last = max(artifact.path for artifact in store().list_artifacts(run_id, "images/samples"))
    with tempfile.TemporaryDirectory() as folder, Image.open(store().download_artifacts(run_id, last, folder)) as grid:
        grid.convert("L").quantize(16).save(IMAGES / "digits.png", optimize=True)


def said(driver: Any) -> str:
    return str(driver.execute_script("return document.body.innerText"))


def mlflow() -> None:
    """Photographs MLflow's page of the quickstart's run."""
    run_id = quickstart_run("quickstart", "quickstart")
    experiment, key = store().get_run(run_id).info.experiment_id, secrets.token_hex(20)
    with tempfile.TemporaryDirectory() as base:
        keys, shot = Path(base) / "keys", Path(base) / "shot.png"
        keys.touch(mode=0o600)
        keys.write_text(f"{key}\n")
        own = ui.environment(STORE, HOST, keys)
        with ServerProcess(ui.command(HOST, "PORT"), "/health", Path(base) / "log", own) as server:
            driver = browser.chromium(1280, 1000)
            try:
                driver.get(f"http://{server.endpoint}/#key={key}")
                until(lambda: "Model registry" in said(driver), "MLflow's first page")
                driver.get(f"http://{server.endpoint}/#/experiments/{experiment}/runs/{run_id}")
                until(lambda: "About this run" in said(driver) and "train/loss" in said(driver), "the run's page")
                driver.save_screenshot(str(shot))
            finally:
                driver.quit()
        with Image.open(shot) as image:
            image.convert("RGB").quantize(96, dither=Image.Dither.NONE).save(IMAGES / "mlflow-run.png", optimize=True)


FUNNEL = {
    "name": "funnel", "pipeline": "heliostat.pipelines:TextPipeline", "input": "python:stdlib",
    "output": ".heliostat/data/funnel", "tokenizer": {"vocab_size": 2048},
    "stages": [{"stage": "code"}, {"stage": "detect_secrets"}, {"stage": "pii", "kinds": ["email", "ip"]},
               {"stage": "minhash", "ngram": 5}],
}  # fmt: skip


def funnel() -> None:
    """Curates Python's standard library with the stages of pipelines/starcoder.yaml, and draws what each of them leaves."""
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as pipeline:
        pipeline.write(json.dumps(FUNNEL))
        pipeline.flush()
        heliostat_("data", "prepare", pipeline.name)
    parts = reasons.funnel(manifest.read(Location(str(ROOT / ".heliostat/data/funnel"))))
    most = max(part["documents"] for part in parts.values())
    left, width, row = 120, 240, 26
    parts = {name.partition(" ")[2] or name: part for name, part in parts.items()}
    drawing = Drawing(700, 34 + row * len(parts), "Documents left after each stage: " + ", ".join(
        f"{name} {part['kept']:,} of {part['documents']:,}" for name, part in parts.items()))  # fmt: skip
    drawing.text(10, 16, "Files of Python's standard library that each stage keeps, and why it drops the others", "strong")
    for number, (name, part) in enumerate(parts.items()):
        y = 30 + row * number
        drawing.text(left - 10, y + 15, name, "end")
        drawing.bar(left, y + 3, width, 16, "var(--line)")
        drawing.bar(left, y + 3, width * part["kept"] / most, 16, "var(--one)")
        dropped: list[tuple[int, str]] = sorted(((n, reason) for reason, n in part["dropped"].items()), reverse=True)
        why = ", ".join(f"{n:,} {reason}" for n, reason in dropped[:2]) + (", ..." if len(dropped) > 2 else "")
        drawing.text(left + width + 10, y + 15, f"{part['kept']:,} kept" + (f"; dropped: {why}" if why else ""))
    drawing.write("funnel.svg")


STREAM = {"read": ("CPUs read and filter", "var(--one)"), "stages-2": ("a GPU scores", "var(--two)"),
          "stages-3": ("CPUs filter and write", "var(--three)")}  # fmt: skip


def stream() -> None:
    """Prepares 16 MB of texts on two nodes, one with a logical GPU, and draws when each task of the stream began and ended."""
    with tempfile.TemporaryDirectory() as folder:
        stream_scoring.make_input(Path(folder), 16, 1.0)
        draw_stream(stream_scoring.prepare(Path(folder) / "run", Path(folder), 1).spans)


def draw_stream(spans: list[tuple[str, float, float]]) -> None:
    """Draws when tasks began and ended, one row per part of the stream."""
    first, last = min(begin for _, begin, _ in spans), max(end for *_, end in spans)
    share, left, width, row = stream_scoring.overlap(spans), 150, 500, 26
    numbers = {kind: sum(name == kind for name, *_ in spans) for kind in STREAM}
    drawing = Drawing(left + width + 30, 60 + row * len(STREAM), (
        f"Times of the tasks of a stream over {last - first:.0f} seconds. The GPU scores during {share:.0%} of the time in "
        f"which the CPUs read. Tasks: {', '.join(f'{STREAM[kind][0]} {number}' for kind, number in numbers.items())}."
    ))  # fmt: skip
    drawing.text(10, 16, f"The GPU scores during {share:.0%} of the time in which the CPUs read", "strong")
    for number, (kind, (what, color)) in enumerate(STREAM.items()):
        y = 30 + row * number
        drawing.text(left - 10, y + 13, what, "end")
        drawing.bar(left, y, width, 18, "var(--line)")
        for begin, end in ((begin, end) for name, begin, end in spans if name == kind):
            scale = width / (last - first)
            drawing.bar(left + scale * (begin - first), y, max(scale * (end - begin) - 0.8, 0.8), 18, color)
    for at in charts.ticks(0, last - first, 5):
        if at <= last - first:
            drawing.text(left + width * at / (last - first), 46 + row * len(STREAM), f"{at:g} s")
    drawing.write("stream.svg")


PICTURES: dict[str, Callable[[], Any]] = {
    "terminal": terminal, "resumed": resumed, "goodput": goodput_, "samples": samples, "mlflow": mlflow, "funnel": funnel,
    "stream": stream,
}  # fmt: skip


if __name__ == "__main__":
    for one in sys.argv[1:] or PICTURES:
        PICTURES[one]()
        sys.stdout.write(f"{one}: drawn\n")
