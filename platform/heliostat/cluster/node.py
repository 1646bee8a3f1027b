"""Runs a command of `ray` on a node, which then forks its workers from a zygote.

    python -m heliostat.cluster.node start --head --block ...    # instead of `ray start --head --block ...`

The zygote lies in the folder that HELIOSTAT_ZYGOTE names. A head starts it, or a node that finds none there, and it ends with
that process; other nodes of the machine take their workers from the same.
"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import Any

from heliostat.cluster import preloads
from heliostat.cluster.zygote import PLACE, SUPPORTED, Zygote, launcher, launching

CUDA = Path("/dev/nvidiactl")  # DeepSpeed's import asks CUDA what there is, which a fork could not use afterwards


def main() -> Any:
    """Runs `ray` with this process's arguments, and returns what it returns."""
    place = Path(os.environ.get(PLACE, ""))
    with contextlib.ExitStack() as stack:
        if SUPPORTED and PLACE in os.environ and {"start", "--block"} <= set(sys.argv):
            if "--head" in sys.argv or not launcher(place).exists():
                early = [] if CUDA.exists() else preloads.early()
                modules = ["ray.data"] if CUDA.exists() else preloads.TRAINING
                drivers = preloads.DRIVERS if "--head" in sys.argv else ()
                stack.callback(Zygote(place, os.environ, modules, early, drivers).end)
            if os.access(launcher(place), os.X_OK):
                stack.enter_context(launching(launcher(place)))
        from ray.scripts.scripts import main as ray

        sys.argv[0] = "ray"
        return ray()


if __name__ == "__main__":
    sys.exit(main())
