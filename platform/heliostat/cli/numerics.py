"""Shows what `heliostat check JOB --numerics` found: a table, and each parameter that differs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from heliostat.cli.common import out, print_table
from heliostat.errors import NumericsError
from heliostat.terminal import console
from heliostat.validation.check import Checked

SHOWN = 8  # differences


def show(job: Path, checked: Checked, quiet: bool) -> tuple[dict[str, Any], NumericsError | None]:
    """Checks the numerics and prints them unless `quiet`; returns what was found, and the error to end with if they differ."""
    from heliostat.numerics.check import check

    with console.status("playing some steps on two workers, and beside them"):
        found = check(checked)
    if not quiet:
        for line in _played(found["trial"]):
            out.print(line)
        print_table(_table(found["rows"]), left=(0, 4))
    if found["ok"]:
        if not quiet:
            out.print(
                f"{job}: the same numbers as one plain process of torch in fp32, within {found['trial']['precision']}'s limits"
            )
        return found, None
    return found, NumericsError(f"{job}: {explain(found['faults'])}")


def _played(t: dict[str, Any]) -> list[str]:
    where = "GPUs" if t["gpus"] else "CPUs"
    tokens = f" of {t['sequence_length']:,} tokens" if t["sequence_length"] else ""
    return [
        f"{t['model']}; {t['optimizer']}, {t['precision']}, ZeRO stage {t['stage']}, {t['workers']} workers on {where}",
        f"{t['steps']} steps of {t['global_batch']} samples{tokens} in micro-batches of {t['micro_batch']}; "
        f"from step {t['resumed']['step']} also on {t['resumed']['workers']} worker at stage {t['resumed']['stage']}",
    ]


def _table(rows: list[dict[str, Any]]) -> list[list[str]]:
    head = ["", "compared", "worst", "limit", "where"]
    return [head, *([r["what"], f"{r['count']:,}", _number(r["worst"]), _number(r["limit"]), _where(r)] for r in rows)]


def _where(row: dict[str, Any]) -> str:
    return ("" if row["worst"] == 0 else row["where"]) + (f"  DIFFERS ({row['faults']})" if row["faults"] else "")


def _number(value: float) -> str:
    return "0" if value == 0 else f"{value:.1e}"


def explain(faults: list[dict[str, Any]]) -> str:
    """Lists the differences, those with a known cause and the largest first."""
    ordered = sorted(faults, key=lambda f: (f["step"], not f["cause"], -f["difference"]))
    more = f"\n  and {len(ordered) - SHOWN:,} more" if len(ordered) > SHOWN else ""
    return "the numbers differ from those of one plain process\n  " + "\n  ".join(f["text"] for f in ordered[:SHOWN]) + more
