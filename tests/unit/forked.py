"""Runs the command line in processes that are forked from one with the models' libraries imported.

Importing these libraries takes seconds, and no test of a command needs a fresh import. The other imports of a command are
reported as in a fresh process.
"""

from __future__ import annotations

import sys
from typing import Any

from tests.fork_server import ForkServer

HEAVY = ("ray", "deepspeed", "mlflow")
OFFLINE = {"HF_HUB_OFFLINE": "1"}  # read when it is imported
SERVER = ForkServer(
    ("pyarrow.parquet", "torch", "torch._dynamo", "torch.utils.flop_counter", "transformers.generation",
     "transformers.models.auto.modeling_auto", "transformers.models.llama.modeling_llama"), OFFLINE
)  # fmt: skip


def run(*arguments: str) -> tuple[int, str, list[str], str]:
    """Runs a command in the repository's root; returns (exit code, standard output, lines of standard error, heavy imported
    modules)."""
    done = SERVER.run(f"{__name__}:command", arguments)
    *lines, imported = done.err.splitlines()
    return done.code, done.out, lines, imported.removeprefix("imported: ")


def command(arguments: list[str]) -> int:
    """Runs a command in this process, prints the heavy imported modules at the end, and returns the exit code."""
    sys.argv = ["heliostat", *arguments]
    from heliostat.cli.main import main

    code: Any = 0
    try:
        main()
    except SystemExit as e:
        code = e.code or 0
    sys.stderr.write(f"imported: {','.join(name for name in HEAVY if name in sys.modules)}\n")
    return code
