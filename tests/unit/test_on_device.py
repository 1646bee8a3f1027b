"""A step's micro-batches come to the device whole and in order; on a CPU they are what the recipe made, uncopied. The way to
a GPU is held to this one by `tests.gpu`."""

import torch
from heliostat.training.worker.micro_batches import on_device


def test_batches_come_in_order():
    micros = [{"tokens": torch.full((2, 3), i), "labels": torch.full((2,), -i)} for i in range(3)]
    got = list(on_device(micros, torch.device("cpu")))
    assert [[batch[name].tolist() for name in batch] for batch in got] == [[m[name].tolist() for name in m] for m in micros]
    assert all(batch["tokens"] is micro["tokens"] for batch, micro in zip(got, micros, strict=True))
