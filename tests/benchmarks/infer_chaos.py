"""Kills a worker, a node, and the driver in one `heliostat model infer`, and compares it with an uninterrupted run.

    python -m tests.benchmarks.infer_chaos MODEL [--inputs 20000] [--tokens 4] [--batch 64] [--rounds 1] [--seed 0]

MODEL is an exported folder, as `heliostat model export RUN OUT` writes it. The inputs are short: 2 to 8 words in eight files,
each with one line that isn't JSON and one without a text. The unbroken run has a private Ray with two workers; the others have a
cluster of two nodes (raylets on loopback addresses, one CPU each). In a round, each fault strikes once, in random order, at
random moments:

    worker    SIGKILL to a process that answers a piece of the input
    node      a whole node is killed, and another joins
    driver    SIGKILL to the command, which is started again

Prints the effect of each kill, and checks the answers: whether each input's number appears once and in order; whether the files
of answers and the list of bad inputs equal those of the unbroken run, byte for byte; and how many pieces were answered, and how
many of them again. Exit code 1 if a run lost, repeated, or changed anything.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from heliostat.chaos.nodes import LocalNodes
from heliostat.storage.locations import Location

from tests.benchmarks import harness
from tests.benchmarks.broken.rounds import Round, at_work
from tests.benchmarks.infer import WORDS

FAULTS = ("worker", "node", "driver")
FILES = 8
LIMIT_S = 1500.0  # of a start
EARLY, LATE = 0.05, 0.85  # of the pieces, between which the faults strike


def make_input(folder: Path, inputs: int) -> None:
    """Writes prompts as numbered JSON lines, and two bad lines in each file."""
    folder.mkdir()
    rng = random.Random(0)
    for part in range(FILES):
        numbers = range(part * inputs // FILES, (part + 1) * inputs // FILES)
        rows = [json.dumps({"text": " ".join(rng.choices(WORDS, k=rng.randint(2, 8))), "n": n}) for n in numbers]
        middle = len(rows) // 2
        (folder / f"{part}.jsonl").write_text("\n".join([*rows[:middle], "{", '{"n": -1}', *rows[middle:]]) + "\n")


@dataclass
class Kill:
    """Records a kill: the pieces that were recorded by then, and those in progress."""

    fault: str
    pieces: int
    under_way: int


class Inference:
    """Holds the common parts of the rounds: the model, the input, and how it is answered."""

    def __init__(self, folder: Path, given: argparse.Namespace) -> None:
        self.folder, self.given = folder, given
        make_input(folder / "in", given.inputs)

    def round(self, name: str, rng: random.Random, tasks: int, environment: dict[str, str]) -> Round:
        folder, given = self.folder / name, self.given
        folder.mkdir()
        words = [
            "model",
            "infer",
            str(given.model),
            "--input",
            str(self.folder / "in"),
            "--out",
            str(folder / "out"),
            "--keep",
            "n",
        ]
        words += ["--max-tokens", str(given.tokens), "--batch", str(given.batch), "--seed", str(given.seed)]
        done = Location(str(folder / "out/work/done/infer"))
        return Round(folder, words, done, rng, tasks, environment, limit_s=LIMIT_S)

    def broken(self, round: Round, nodes: LocalNodes) -> list[Kill]:
        """Answers all inputs despite one fault of each kind."""
        faults = round.rng.sample(FAULTS, len(FAULTS))
        moments = sorted(round.rng.sample(range(int(EARLY * round.tasks), int(LATE * round.tasks)), len(faults)))
        run, met = round.start(), list[Kill]()
        for fault, moment in zip(faults, moments, strict=True):
            if not round.until(run, moment):
                break
            roots = [node.process.pid for node in nodes.nodes]
            met.append(Kill(fault, round.count(), len(at_work(roots))))
            if fault == "worker":
                round.struck += round.kill_worker(run, roots)
                continue
            round.struck += 1
            if fault == "node":
                round.kill_node(nodes)
            else:
                round.kill(run, at_work(roots))
                run = round.start()
        round.end(run, in_order=True)
        return met


@dataclass(frozen=True)
class Answers:
    """Holds a run's output: the numbers of its inputs in order, its bad inputs, and the digests of its files by name."""

    record: dict[str, Any]
    numbers: list[int]
    bad: list[tuple[str, str]]
    files: dict[str, str]

    @classmethod
    def of(cls, out: Path) -> Answers:
        record = json.loads((out / "inference.json").read_text())
        names = [one["file"] for one in record["answers_in"]]
        numbers = [int(n) for name in names for n in pq.read_table(out / name)["n"].to_pylist()]
        bad = [(row["id"], row["reason"]) for row in pq.read_table(out / "bad.parquet").to_pylist()]
        there = [*sorted(str(p.relative_to(out)) for p in (out / "answers").iterdir()), "bad.parquet"]
        return cls(record, numbers, bad, {name: hashlib.sha256((out / name).read_bytes()).hexdigest() for name in there})

    def wrong(self, inputs: int, whole: Answers) -> list[str]:
        """Lists lost, repeated, and changed answers, compared with the unbroken run."""
        found = []
        if lost := inputs - len(set(self.numbers)):
            found.append(f"{lost:,} inputs have no answer")
        if repeated := len(self.numbers) - len(set(self.numbers)):
            found.append(f"{repeated:,} inputs are answered again")
        if self.numbers != sorted(self.numbers):
            found.append("the answers are not in the input's order")
        if len(self.bad) != 2 * FILES or self.bad != whole.bad:
            found.append(f"{len(self.bad)} bad inputs are listed")
        if self.record["inputs"] != whole.record["inputs"]:
            found.append("the digest of the inputs is another")
        if differ := sorted(
            name for name in self.files.keys() | whole.files.keys() if self.files.get(name) != whole.files.get(name)
        ):
            found.append(f"{len(differ)} files differ, as {differ[0]}")
        return found


def main() -> None:
    given = harness.arguments(__doc__, model=Path, inputs=20_000, tokens=4, batch=64, rounds=1, seed=0)
    given.model = given.model.absolute()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        wrong = run(Inference(Path(name), given))
    sys.exit("\n".join(wrong))


def run(inference: Inference) -> list[str]:
    given, rows, kills, wrong = inference.given, [], [], []
    whole, began = inference.round("whole", random.Random(0), 0, {"RAY_ADDRESS": ""}), time.monotonic()
    whole.end(whole.start(), in_order=True)
    right = _answers(whole)
    rows.append(_row("unbroken", whole, right, time.monotonic() - began, right.wrong(given.inputs, right)))
    wrong += right.wrong(given.inputs, right)
    with LocalNodes(inference.folder, 2, 1) as nodes:
        for number in range(given.rounds):
            rng, began = random.Random(f"{given.seed} {number}"), time.monotonic()
            round = inference.round(f"broken-{number}", rng, whole.finished, nodes.environment)
            met = inference.broken(round, nodes)
            found, label = _answers(round), f"killed {round.struck} times"
            faulty = found.wrong(given.inputs, right)
            if round.struck < len(FAULTS):
                faulty.append(f"only {round.struck} faults struck")
            rows.append(_row(label, round, found, time.monotonic() - began, faulty))
            kills += [f"| {number} | {one.fault} | {one.pieces:,} of {whole.finished:,} | {one.under_way} |" for one in met]
            wrong += [f"round {number}: {text}" for text in faulty]
    print("| round | killed | pieces answered by then | under way |\n|---|---|---:|---:|", *kills, sep="\n")
    print("\n| run | answers | bad inputs | each once, as unbroken | pieces | of them again | starts | s | CPU s of tasks | "
          "tokens/s of a core |\n|---|---:|---:|---|---:|---:|---:|---:|---:|---:|", *rows, sep="\n", flush=True)  # fmt: skip
    return wrong


def _answers(round: Round) -> Answers:
    """Reads the result of a round; ends the program with its log if there is none."""
    if round.result is None:
        sys.exit(f"{round.folder.name}: no result in {round.starts} starts\n" + (round.folder / "log").read_text()[-3000:])
    return Answers.of(round.folder / "out")


def _row(label: str, round: Round, found: Answers, seconds: float, wrong: list[str]) -> str:
    record = found.record
    pace = record["tokens"] / max(record["cpu_seconds"], 0.1)
    cells = [label, f"{record['answers']:,}", record["bad"], "; ".join(wrong) or "yes", f"{round.finished:,}", round.again,
             round.starts, f"{seconds:.0f}", f"{record['cpu_seconds']:.0f}", f"{pace:,.0f}"]  # fmt: skip
    return f"| {' | '.join(map(str, cells))} |"


if __name__ == "__main__":
    main()
