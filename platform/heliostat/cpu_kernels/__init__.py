"""Computes attention and linear layers faster than torch on CPUs; a GPU never uses it.

Start at `attention`.
May import: `config`.

`train.cpu_kernels` switches them off. What they save: docs/benchmarks/train-overhead.md#cpu-kernels
"""

from __future__ import annotations

import torch

from heliostat.config.spec import Job
from heliostat.cpu_kernels import attention, linear


def use(model: torch.nn.Module, job: Job, causal: bool) -> None:
    """Makes the model compute with these kernels where the job trains on CPUs and does not switch them off; changes no state.

    Which: attention of short samples in architectures that it is known to fit, if the model attends to the tokens before each
    (`causal`), and the job names no other; linear layers in fp32, unless the model is compiled, or has shapes alone.
    """
    train = job.train
    if job.workers.gpus or not train.cpu_kernels:
        return
    if causal and train.attention is None and attention.fits(model, job.data.sequence_length):
        attention.use(model)
    if linear.SUPPORTED and train.precision == "fp32" and not train.compile and not any(p.is_meta for p in model.parameters()):
        linear.use(model)
