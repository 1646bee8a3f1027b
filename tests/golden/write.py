"""Writes new golden curves: `python -m tests.golden.write --overwrite`. Computes all of them twice, and writes nothing if the two
differ in a bit. Without `--overwrite`, it lists the curves that would change, and writes nothing."""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
from pathlib import Path

from tests.golden import curves

log = logging.getLogger("tests.golden")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--overwrite", action="store_true", help="replace the files")
    overwrite = parser.parse_args().overwrite
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with tempfile.TemporaryDirectory() as first_data, tempfile.TemporaryDirectory() as second_data:
        first, second = curves.play_all(Path(first_data)), curves.play_all(Path(second_data))
    if unsteady := [f"{case.file} {case.name}" for case in first if first[case] != second[case]]:
        log.error("not written: played twice, these differ: %s", ", ".join(unsteady))
        return 1
    was, _ = curves.read()
    changed = [case for case in first if was.get(case) != first[case]]
    for case in changed:
        log.info("%s %s: %s", case.file, case.name, "changed" if case in was else "new")
    if overwrite:
        curves.write(first)
    log.info("%d of %d curves %s", len(changed), len(first), "written anew" if overwrite else "would change")
    return 0


if __name__ == "__main__":
    sys.exit(main())
