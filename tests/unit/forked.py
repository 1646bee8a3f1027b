"""The command line in processes of its own, each forked from one that has imported the libraries that models are built with.

Those take seconds, and no command is tested for them. What a command imports beside them is told as in a fresh process.
"""

from __future__ import annotations

import atexit
import functools
import gc
import importlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
LIBRARIES = ("pyarrow.parquet", "torch", "torch._dynamo", "torch.utils.flop_counter", "transformers.generation",
             "transformers.models.auto.modeling_auto", "transformers.models.llama.modeling_llama")  # fmt: skip
HEAVY = ("ray", "deepspeed", "mlflow")
OFFLINE = {"HF_HUB_OFFLINE": "1"}  # read when it is imported


@functools.cache
def _server() -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.unit.forked"]
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **OFFLINE}, **pipes)
    assert process.stdin
    atexit.register(process.stdin.close)
    return process


def run(*arguments: str) -> tuple[int, str, list[str], str]:
    """(exit code, standard output, lines of standard error, heavy modules imported) of a command in the repository's root."""
    server = _server()
    assert server.stdin and server.stdout
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        told = {"arguments": arguments, "environment": {**os.environ, **OFFLINE}, "out": str(out), "err": str(err)}
        server.stdin.write(json.dumps(told) + "\n")
        server.stdin.flush()
        code = json.loads(server.stdout.readline())
        *lines, imported = err.read_text().splitlines()
        return code, out.read_text(), lines, imported.removeprefix("imported: ")


def command(arguments: list[str]) -> int:
    """Runs it in this process, and says in the end which heavy modules are imported; the exit code."""
    sys.argv = ["heliostat", *arguments]
    from heliostat.cli.main import main

    code: Any = 0
    try:
        main()
    except SystemExit as e:
        code = e.code or 0
    sys.stderr.write(f"imported: {','.join(name for name in HEAVY if name in sys.modules)}\n")
    return code


def _forked(told: dict[str, Any]) -> int:
    for number, path in enumerate((os.devnull, told["out"], told["err"])):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), number)
    os.environ.clear()
    os.environ.update(told["environment"])
    return command(told["arguments"])


def serve() -> int:
    for name in LIBRARIES:
        importlib.import_module(name)
    assert not [name for name in HEAVY if name in sys.modules]
    gc.freeze()  # what was imported is not looked through, and copied, in every process
    while line := sys.stdin.readline():
        if not (child := os.fork()):
            return _forked(json.loads(line))
        _, status = os.waitpid(child, 0)
        sys.stdout.write(f"{os.waitstatus_to_exitcode(status)}\n")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(serve())
