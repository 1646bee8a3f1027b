"""Runs a function in process groups of one or several sizes at once, without Ray: gloo, one thread per process.

All processes are forks of one that has imported torch and DeepSpeed, once for all tests. The function is named by its import
path. Its arguments are its process group, besides the default one, a barrier over all processes, and the given arguments. Values
that it yields, on any rank, are returned as plain data with `rank` and `workers` added.
"""

from __future__ import annotations

import gc
import importlib
import json
import multiprocessing
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.integration.forks import SERVER

DEADLINE_S = 240


def run(function: str, sizes: tuple[int, ...], *arguments: str, deadline_s: int = DEADLINE_S) -> list[dict[str, Any]]:
    """Returns everything that the ranks yielded; fails with their output if one of them raised an error."""
    done = SERVER.run(f"{__name__}:main", [str(deadline_s), function, ",".join(map(str, sizes)), *arguments], deadline_s + 30)
    assert done.code == 0, done.err[-5000:]
    return [json.loads(line) for line in done.out.splitlines()]


def _rank(rank: int, workers: int, folder: Path, function: Any, everyone: Any, arguments: list[str], results: int) -> None:
    import torch
    import torch.distributed as dist

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(workers)}  # which DeepSpeed asks for
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group-{workers}", rank=rank, world_size=workers)
    for told in function(dist.new_group(backend="gloo"), everyone, *arguments):
        os.write(results, (json.dumps({"rank": rank, "workers": workers, **told}) + "\n").encode())  # whole lines, from many


def main(given: list[str]) -> int:
    """Runs the ranks in forks of this process, until they end or the deadline; returns 0 if none of them failed."""
    deadline_s, path, sizes, *arguments = given
    results = os.dup(1)
    os.dup2(2, 1)  # DeepSpeed prints, and what is yielded must be alone
    module, _, name = path.partition(":")
    function = getattr(importlib.import_module(module), name)
    context = multiprocessing.get_context("fork")
    groups = [int(n) for n in sizes.split(",")]
    everyone = context.Barrier(sum(groups), timeout=float(deadline_s))
    gc.freeze()  # DeepSpeed collects often, and would look through all that was imported each time
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            context.Process(target=_rank, args=(r, n, Path(folder), function, everyone, arguments, results), daemon=True)
            for n in groups
            for r in range(n)
        ]
        for process in ranks:
            process.start()
        deadline = time.monotonic() + float(deadline_s)
        while any(p.exitcode is None for p in ranks) and not any(p.exitcode for p in ranks) and time.monotonic() < deadline:
            time.sleep(0.02)
    return 0 if all(p.exitcode == 0 for p in ranks) else 1
