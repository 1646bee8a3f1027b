"""Gives all numbers of one GPU in one go: `python -m tests.gpu [--out DIR] [--budget SECONDS] [--only WORD ...]`.

Needs torch, transformers, deepspeed and heliostat's own wheel, on Python 3.11 or later; no Ray and no network. Correctness first,
then speed, the most telling first; each piece in a process of its own with a deadline, so that a failure stops nothing. Writes
`gpu.json` and `gpu.md` after every piece. Without a GPU, what needs one is skipped by name.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tests.gpu import report
from tests.gpu.pieces import PIECES, Piece

LEAST_S = 20.0  # with less time left, a piece is not begun
PROBE_S = 120.0


def child(name: str, result: Path) -> None:
    """Runs one piece, or the probe, in this process, and writes what it found, row by row."""
    from tests.gpu import absent, probe

    missing = absent.stand_in()
    if name == "probe":
        result.write_text(json.dumps(probe.probe(missing)))
        return
    piece = next(p for p in PIECES if p.name == name)
    with result.open("a") as file:
        for row in piece.call():
            file.write(json.dumps(row) + "\n")
            file.flush()


def run(name: str, deadline_s: float) -> tuple[str, str, str]:
    """Runs a piece in a process of its own: (what it wrote, "" or why it failed, its last words)."""
    with tempfile.TemporaryDirectory() as folder:
        result, said = Path(folder) / "rows", Path(folder) / "said"
        command = [sys.executable, "-m", "tests.gpu", "--piece", name, "--result", str(result)]
        with said.open("w") as out:
            process = subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True)
            try:
                code = process.wait(deadline_s)
                failure = f"exit code {code}" if code else ""
            except subprocess.TimeoutExpired:
                failure = f"not done within {deadline_s:.0f} s"
            finally:  # also when a person interrupts: it is in a session of its own, and would keep the GPU
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        words = said.read_text(errors="replace").strip().splitlines()
        return (result.read_text() if result.exists() else ""), failure, words[-1] if words else ""


def judged(piece: Piece, has: list[str], left_s: float) -> dict[str, Any]:
    """Runs a piece, unless something is lacking, and judges it."""
    told: dict[str, Any] = {"name": piece.name, "rows": [], "reason": "", "seconds": 0.0}
    if lacking := [need for need in piece.needs if need not in has]:
        return {**told, "status": "skipped", "reason": f"needs {', '.join(lacking)}"}
    if left_s < LEAST_S:
        return {**told, "status": "skipped", "reason": "no time was left"}
    began = time.monotonic()
    wrote, failure, words = run(piece.name, min(piece.deadline_s, left_s))
    rows = [json.loads(line) for line in wrote.splitlines() if line.endswith("}")]
    told |= {"rows": rows, "seconds": time.monotonic() - began}
    wrong = [row["what"] for row in rows if not row["ok"]]
    if failure:
        return {**told, "status": "failed", "reason": f"{failure}: {words}"}
    if wrong or not rows:
        return {**told, "status": "failed", "reason": f"wrong: {', '.join(wrong)}" if wrong else "found nothing"}
    return {**told, "status": "passed"}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("gpu-numbers"), help="the folder that gets gpu.json and gpu.md")
    parser.add_argument("--budget", type=float, default=600.0, help="seconds in all")
    parser.add_argument("--only", nargs="*", default=[], help="pieces whose names begin with one of these")
    parser.add_argument("--piece", help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.piece:
        child(asked.piece, asked.result)
        return 0
    chosen = [p for p in PIECES if not asked.only or p.name.startswith(tuple(asked.only))]
    if not chosen:
        parser.error(f"--only: no piece begins so; there are: {', '.join(p.name for p in PIECES)}")
    began = time.monotonic()
    asked.out.mkdir(parents=True, exist_ok=True)
    wrote, failure, words = run("probe", min(PROBE_S, asked.budget))
    if failure:
        print(f"tests.gpu: this machine cannot be looked at: {failure}: {words}", file=sys.stderr)  # noqa: T201
        return 1
    found: dict[str, Any] = {"date": datetime.now(UTC).date().isoformat(), "machine": json.loads(wrote), "pieces": []}
    for piece in chosen:
        told = judged(piece, found["machine"]["has"], asked.budget - (time.monotonic() - began))
        found["pieces"].append(told)
        found["seconds"] = time.monotonic() - began
        (asked.out / "gpu.json").write_text(json.dumps(found, indent=1))
        (asked.out / "gpu.md").write_text(report.markdown(found))
        print(f"{told['status']:8} {piece.name} ({told['seconds']:.0f} s) {told['reason']}", flush=True)  # noqa: T201
    return 1 if any(p["status"] == "failed" for p in found["pieces"]) else 0


if __name__ == "__main__":
    sys.exit(main())
