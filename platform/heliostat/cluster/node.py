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
from heliostat.cluster.private_ray import URGENT, worker_environment
from heliostat.cluster.zygote import PLACE, SUPPORTED, Zygote, launcher, launching

CUDA = Path("/dev/nvidiactl")  # DeepSpeed's import asks CUDA what there is, which a fork could not use afterwards


def main() -> Any:
    """Runs `ray` with this process's arguments, and returns what it returns."""
    os.environ.update({**URGENT, **os.environ})
    place = Path(os.environ.get(PLACE, ""))
    with contextlib.ExitStack() as stack:
        if SUPPORTED and PLACE in os.environ and {"start", "--block"} <= set(sys.argv):
            head = "--head" in sys.argv
            if head or not launcher(place).exists():
                stack.callback(zygote(place, head).end)
            if os.access(launcher(place), os.X_OK):
                stack.enter_context(launching(launcher(place)))
        from ray.scripts.scripts import main as ray

        sys.argv[0] = "ray"
        return ray()


def zygote(place: Path, head: bool) -> Zygote:
    """Starts a node's zygote, with the variables that workers start with: their allocator and threads are those of the process
    that they are forked from, whatever a runtime environment says later."""
    drivers = preloads.DRIVERS if head else ()
    if CUDA.exists():
        return Zygote(place, os.environ, ["ray.data"], drivers=drivers)
    return Zygote(place, {**os.environ, **worker_environment(0)}, preloads.TRAINING, preloads.early(), drivers)


if __name__ == "__main__":
    sys.exit(main())
