"""Assembles matrices that ZeRO has cut into slices over the workers. Each matrix is assembled on one worker, its owner.

ZeRO gives each worker flat slices of parameters, cut at any element. The workers exchange the slice boundaries once
(`Matrix.spans`), so each worker knows which slices to send and to receive. One all-to-all sends the slices of a batch of matrices
to the owners. Another all-to-all returns slices of the results. So a worker has only two things in memory: its own slices, and
those complete matrices of one batch that it owns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

BATCH = 1 << 24  # elements per worker and exchange, unless a single matrix is larger

Work = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Matrix:
    """Describes a matrix, and the slice [start, start + numel) of its flat elements that each worker has."""

    rows: int
    columns: int
    spans: tuple[tuple[int, int], ...]  # by worker: start, numel
    offset: int  # where this worker's slice begins in its flat tensor

    @property
    def numel(self) -> int:
        return self.rows * self.columns


def batches(matrices: list[Matrix], workers: int) -> Iterator[list[tuple[Matrix, int]]]:
    """Divides matrices into batches, one per exchange. Yields each matrix with its owner, which is the least loaded worker."""
    batch, load = list[tuple[Matrix, int]](), [0] * workers
    for matrix in matrices:
        if batch and sum(load) + matrix.numel > BATCH * workers:
            yield batch
            batch, load = [], [0] * workers
        owner = load.index(min(load))
        load[owner] += matrix.numel
        batch.append((matrix, owner))
    if batch:
        yield batch


def on_whole(work: Work, flat: torch.Tensor, matrices: list[Matrix], device: torch.device) -> None:
    """Applies `work` to complete matrices, and replaces this worker's slices of these matrices in `flat` with the results.
    Collective."""
    rank, workers = dist.get_rank(), dist.get_world_size()
    for batch in batches(matrices, workers):
        batch = sorted(batch, key=lambda item: item[1])  # stable, so in the same order on every worker
        mine = [m for m, owner in batch if owner == rank]
        slices = [flat[m.offset : m.offset + m.spans[rank][1]] for m, _ in batch]
        out = [sum(m.spans[rank][1] for m, owner in batch if owner == to) for to in range(workers)]
        back = [sum(m.spans[source][1] for m in mine) for source in range(workers)]
        received = _exchange(torch.cat(slices).to(device), out, back)
        results = _each(work, received, mine, back)
        here = _exchange(results, back, out).to(flat.device)
        for place, result in zip(slices, here.split([s.numel() for s in slices]), strict=True):
            place.copy_(result)


def _exchange(values: torch.Tensor, out: list[int], back: list[int]) -> torch.Tensor:
    received = values.new_empty(sum(back))
    dist.all_to_all_single(received, values, back, out)
    return received


def _each(work: Work, received: torch.Tensor, mine: list[Matrix], back: list[int]) -> torch.Tensor:
    """Applies `work` to this worker's matrices. Returns the results, cut and ordered like the received slices."""
    results, sources = torch.empty_like(received), received.split(back)
    targets = results.split(back)
    at = [0] * len(back)
    for matrix in mine:
        whole = received.new_empty(matrix.numel)
        for source, (start, numel) in enumerate(matrix.spans):
            whole[start : start + numel] = sources[source][at[source] : at[source] + numel]
        result = work(whole.view(matrix.rows, matrix.columns)).reshape(-1)
        for source, (start, numel) in enumerate(matrix.spans):
            targets[source][at[source] : at[source] + numel] = result[start : start + numel]
            at[source] += numel
    return results
