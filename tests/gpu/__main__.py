"""Tries all of one machine's GPUs: `python -m tests.gpu [--part NAME ...] [--budget SECONDS] [--out DIR] [--device cpu|twin]`.

Prints a line for each part: pass, fail, or skip; its number; and the cause of a failure. Each part runs in a separate process
with a deadline, so a failure stops no other part. `gpu.json` and `gpu.md` are written to DIR after every part, and each part's
output to DIR/logs. Correctness comes first, then runs, then speed.

On a fresh machine: `make locked && .venv/bin/python -m tests.gpu`. It needs no network and no data. Parts on the engine alone
need neither Ray nor Arrow. `--device` runs the parts without a GPU, with tiny models: on the CPU, or on the second device of
`tests/twin`.
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
import traceback
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tests.gpu import report
from tests.gpu.parts import PARTS, Part

ROOT = Path(__file__).parents[2]
LEAST_S = 20.0  # with less time left, no part begins
PROBE_S = 120.0
HIDDEN = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}  # for parts on a CPU


def child(name: str, result: Path, device: str) -> int:
    """Runs one part, or the probe, in this process; writes its rows one by one, and then the cause of a failure."""
    from tests.gpu import absent, probe

    missing = absent.stand_in()
    if device == "twin":
        from tests.twin import device as twin

        twin.start_deepspeed()
    with result.open("a") as file:

        def write(row: dict[str, Any]) -> None:
            file.write(json.dumps(row) + "\n")
            file.flush()

        try:
            if name == "probe":
                write(probe.probe(missing))
                return 0
            part = next(p for p in PARTS if p.name == name)
            for row in part.call(small=device != "cuda"):
                write(row)
        except Exception as e:  # noqa: BLE001 (whatever fails is the part's result)
            traceback.print_exc()
            write({"cause": cause(e)})
            return 1
    return 0


def cause(error: BaseException) -> str:
    """Describes an error in one line, with the innermost line of this repository in its traceback."""
    frames = [
        f for f in traceback.extract_tb(error.__traceback__) if f.filename.startswith(str(ROOT)) and ".venv" not in f.filename
    ]
    place = f" ({Path(frames[-1].filename).relative_to(ROOT)}:{frames[-1].lineno})" if frames else ""
    words = " ".join(str(error).split("\n\n")[0].split())
    return f"{type(error).__name__}: {words[:200]}{place}"


def run(name: str, deadline_s: float, device: str = "cuda", log: Path = Path(os.devnull)) -> tuple[list[dict[str, Any]], str]:
    """Runs a part in a separate process, with its output in a file; returns its rows, and the reason of its failure, "" if it
    didn't fail."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # also of what a part that is killed leaves
        result = Path(folder) / "rows"
        command = [sys.executable, "-m", "tests.gpu", "--child", name, "--result", str(result), "--device", device]
        environment = {**os.environ, **({} if device == "cuda" else HIDDEN), "TMPDIR": folder, "PYTHONPATH": _path()}
        with log.open("w") as out:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True, env=environment, cwd=ROOT
            )
            try:
                code = process.wait(deadline_s)
                failure = f"ended with {_code(code)}" if code else ""
            except subprocess.TimeoutExpired:
                failure = f"not done within {deadline_s:.0f} s"
            finally:  # also after an interrupt: the process has a session of its own, and would keep the GPU
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        lines = result.read_text().splitlines() if result.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("}")]
    causes = [row["cause"] for row in rows if row.keys() == {"cause"}]
    return [row for row in rows if row.keys() != {"cause"}], causes[-1] if failure and causes else failure


def _path() -> str:
    return os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))


def _code(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def judged(part: Part, has: list[str], left_s: float, device: str, log: Path) -> dict[str, Any]:
    """Runs a part, unless a requirement is missing, and judges it."""
    result: dict[str, Any] = {"name": part.name, "rows": [], "cause": "", "seconds": 0.0}
    if device != "cuda" and part.small is None:
        return {**result, "status": "skip", "cause": "runs on a GPU alone"}
    if device != "cuda":
        has = [*has, *(need for need in part.needs if need.endswith(("gpu", "gpus")) or need == "float8")]
    if missing := [need for need in part.needs if need not in has]:
        return {**result, "status": "skip", "cause": f"needs {', '.join(missing)}"}
    if left_s < LEAST_S:
        return {**result, "status": "skip", "cause": "no time was left; raise --budget, or name it with --part"}
    began = time.monotonic()
    rows, failure = run(part.name, min(part.deadline_s, left_s), device, log)
    result |= {"rows": rows, "seconds": time.monotonic() - began, "number": report.number(rows)}
    wrong = "; ".join(report.wrong(row) for row in rows if not row["ok"])
    failure = failure or wrong or ("" if rows else "no result")
    return {**result, "status": "fail" if failure else "pass", "cause": failure}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--part", nargs="*", default=[], metavar="NAME", help="parts whose names begin so [default: all]")
    parser.add_argument("--budget", type=float, default=600.0, help="seconds in all [default: 600]")
    parser.add_argument("--out", type=Path, default=Path("gpu-numbers"), help="folder of the results [default: gpu-numbers]")
    parser.add_argument("--device", choices=("cuda", "cpu", "twin"), default="cuda", help="where the parts run [default: cuda]")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        return child(given.child, given.result, given.device)
    chosen = [p for p in PARTS if not given.part or p.name.startswith(tuple(given.part))]
    if not chosen:
        parser.error(f"--part: no part begins with {' or '.join(given.part)}. Parts: {', '.join(p.name for p in PARTS)}")
    began, logs = time.monotonic(), given.out / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    rows, failure = run("probe", min(PROBE_S, given.budget), given.device, logs / "probe.log")
    if failure:
        print(f"tests.gpu: the machine couldn't be probed ({failure}). Read {logs / 'probe.log'}", file=sys.stderr)  # noqa: T201
        return 1
    machine = rows[0]
    found: dict[str, Any] = {
        "date": datetime.now(UTC).date().isoformat(),
        "device": given.device,
        "machine": machine,
        "parts": [],
    }
    print(report.line("", "part", "s", "number", f"{machine['gpus']} x {machine['device']}"), flush=True)  # noqa: T201
    for part in chosen:
        log = logs / f"{part.name.replace(' ', '-').replace('=', '-')}.log"
        result = judged(part, machine["has"], given.budget - (time.monotonic() - began), given.device, log)
        found["parts"].append(result)
        found["seconds"] = time.monotonic() - began
        (given.out / "gpu.json").write_text(json.dumps(found, indent=1))
        (given.out / "gpu.md").write_text(report.markdown(found))
        print(report.line(result["status"], part.name, f"{result['seconds']:.0f}", result.get("number", ""), result["cause"]),  # noqa: T201
              flush=True)  # fmt: skip
    return 1 if any(p["status"] == "fail" for p in found["parts"]) else 0


if __name__ == "__main__":
    sys.exit(main())
