"""Brings matrices together that ZeRO cut into slices over the workers, each on one of them, and the slices of the results back.

ZeRO gives a worker flat slices of parameters, cut anywhere. Which slices are whose is exchanged once (`Matrix.spans`); after that
every worker knows what it sends and receives. A batch of matrices travels in one all-to-all, each matrix to its owner, and the
results in another: a worker holds its slices, and as many whole matrices as fall to it of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

BATCH = 1 << 24  # elements a worker of one exchange, unless a single matrix is larger

Work = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Matrix:
    """Describes a matrix and the slice [start, start + numel) of it, flattened, that each worker holds."""

    rows: int
    columns: int
    spans: tuple[tuple[int, int], ...]  # of each worker: start, numel
    offset: int  # of this worker's slice in the flat tensor that it steps

    @property
    def numel(self) -> int:
        return self.rows * self.columns


def batches(matrices: list[Matrix], workers: int) -> Iterator[list[tuple[Matrix, int]]]:
    """Divides matrices into batches that are exchanged at once, each with the worker that it falls to: the least loaded."""
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
    """Replaces the matrices of which `flat` holds this worker's slices by what `work` makes of them whole. Collective."""
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
    """Computes the results of this worker's matrices from the workers' slices; the results, cut and ordered as those were."""
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
