"""Tests that for any content of a file that heliostat reads, a person gets an answer, or one line with the file and the fault.

Here with a fixed seed and for some seconds. By hand, `HELIOSTAT_FUZZ=50 HELIOSTAT_FUZZ_SEED=7 pytest tests/unit/test_fuzz.py -s`
runs fifty times as many rounds, with another seed, and prints the results.
"""

import os
import sys

import pytest

from tests.unit import fuzzing
from tests.unit.fuzz_targets import TARGETS

TIMES = float(os.environ.get("HELIOSTAT_FUZZ", "1"))
SEED = int(os.environ.get("HELIOSTAT_FUZZ_SEED", "17"))


@pytest.fixture
def made(tmp_path, monkeypatch):
    """Keeps the valid files apart from the mutated copies, and restores the workspace after the test."""
    monkeypatch.chdir(fuzzing.ROOT)
    folder = tmp_path / "right"
    folder.mkdir()
    return folder


@pytest.mark.timeout(0 if TIMES > 1 else 600)
@pytest.mark.parametrize("kind", TARGETS)
def test_a_mutated_file_is_read_or_refused_in_one_line(made, tmp_path, kind):
    """There is no traceback, no hang, no use of gigabytes, and no control characters; and the valid files are read."""
    make, rounds = TARGETS[kind]
    target = make(made)
    target.read(fuzzing.fresh(target, tmp_path))
    report = fuzzing.run(target, SEED, round(rounds * TIMES), tmp_path)
    sys.stdout.write(f"\n{kind}: {report}\n")
    if report.bad:
        pytest.fail(f"{kind}: {report}", pytrace=False)
    assert report.refused > rounds / 10
