"""Compares a GPU's results with the CPU reference implementation: the same call with torch's plain implementation in fp32.

Each function is a part: it yields rows with the compared value, its difference, and the allowed difference.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from tests.gpu import setting

STEPS = 8
LIMITS = {"fp32": 2e-4, "bf16": 2e-2, "fp16": 2e-2}  # relative, of losses; TF32 is off

Row = dict[str, Any]


def row(what: str, difference: float, limit: float, **more: Any) -> Row:
    """Returns a row: the compared value, its difference, and the allowed difference."""
    good = math.isfinite(difference) and difference <= limit
    return {"kind": "correctness", "what": what, "difference": difference, "limit": limit, "ok": good, **more}


def apart(ours: list[float], theirs: list[float]) -> float:
    """Returns the largest relative difference of two curves."""
    return max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))


def _against_plain(what: str, twin: list[float] | None = None, **changes: Any) -> Row:
    """Trains a job with these changes, and compares it with the plain process and the CPU reference implementations of its
    kernels."""
    made = setting.job(setting.TINY, **changes)
    its = setting.recipe(made)
    twin = twin or setting.plain(made, its.plainly(), STEPS)
    found = setting.losses(made, its, setting.engine(made, its), 0, STEPS)
    learned = {"first": twin[0], "last": twin[-1]}
    return row(what, apart(found, twin), LIMITS[made.train.precision], **learned)


def zero(precision: str) -> Iterator[Row]:
    """Compares ZeRO 1 to 3 in one process."""
    setting.start()
    twin = setting.plain(made := setting.job(setting.TINY), setting.recipe(made), STEPS)
    for stage in (1, 2, 3):
        yield _against_plain(f"ZeRO-{stage}, {precision}", twin, **{"train.precision": precision, "train.zero.stage": stage})


def offload() -> Iterator[Row]:
    setting.start()
    twin = setting.plain(made := setting.job(setting.TINY), setting.recipe(made), STEPS)
    for stage in (1, 2, 3):
        changes = {"train.precision": "bf16", "train.zero.stage": stage, "train.zero.offload.optimizer": "cpu"}
        yield _against_plain(f"ZeRO-{stage}, bf16, optimizer on the host", twin, **changes)
    changes["train.zero.offload.param"] = "cpu"
    yield _against_plain("ZeRO-3, bf16, optimizer and weights on the host", twin, **changes)


def optimizers(names: tuple[str, ...] = ("lion", "schedule_free", "sgd", "rmsprop")) -> Iterator[Row]:
    """Compares optimizers other than AdamW."""
    setting.start()
    for name in names:
        changes: dict[str, Any] = {"train.optimizer": {"name": name, "lr": 1e-3}, "train.schedule": {"name": "constant"}}
        made = setting.job(setting.TINY, **changes)
        twin = setting.plain(made, setting.recipe(made), STEPS)
        for stage in (1, 3):
            yield _against_plain(f"{name}, ZeRO-{stage}, fp32", twin, **changes, **{"train.zero.stage": stage})


def muon() -> Iterator[Row]:
    """Compares Muon, which shards whole matrices over the workers."""
    yield from optimizers(("muon",))


def compiled() -> Iterator[Row]:
    """Compares compilation of the whole model, and layer by layer."""
    setting.start()
    for how, stage in ((True, 1), ("blocks", 1), ("blocks", 2)):
        changes = {"train.precision": "bf16", "train.compile": how, "train.zero.stage": stage}
        yield _against_plain(f"torch.compile {'of the whole' if how is True else 'by layers'}, ZeRO-{stage}, bf16", **changes)


def attending(kernel: str) -> Iterator[Row]:
    """Compares jobs that name their attention kernel, for samples of one document and of several, with torch's own on the CPU."""
    setting.start()
    for several in (False, True):
        changes = {
            "train.attention": kernel,
            "train.precision": "bf16",
            "data.document_mask": several,
            "train.micro_batch_size": 1,
        }
        yield _against_plain(f"{kernel}, {'several documents' if several else 'one document'} a sample, bf16", **changes)


def linear8() -> Iterator[Row]:
    """Compares linear layers in float8 with the products of the same rounded numbers in fp32 on the CPU."""
    setting.start()
    for stage in (1, 3):
        made = setting.job(setting.TINY, **{"train.precision": "bf16", "train.zero.stage": stage})
        its = setting.recipe(made, fp8=True)
        twin = setting.plain(made, its, STEPS)
        found = setting.losses(made, its, setting.engine(made, its), 0, STEPS)
        yield row(f"linear layers in float8, ZeRO-{stage}", apart(found, twin), LIMITS["bf16"], first=twin[0], last=twin[-1])


def save() -> Iterator[Row]:
    """Saves during the next steps, and resumes at another stage: the state is equal bit by bit, and the losses within
    rounding."""
    from heliostat.checkpoint import saver as checkpoint
    from heliostat.config import spec
    from heliostat.engine import sharded_state
    from heliostat.numerics import play
    from heliostat.storage.locations import Location

    from tests.unit import build_index

    group = setting.start()
    for stage, other, offload in ((1, 3, None), (3, 2, None), (3, 1, "cpu")):
        given = {"train.precision": "bf16", "train.zero.offload.optimizer": offload}
        at = f"ZeRO-{stage}{', offloaded' if offload else ''}"
        made = setting.job(setting.TINY, **given, **{"train.zero.stage": stage})
        its = setting.recipe(made)
        on = setting.engine(made, its)
        setting.losses(made, its, on, 0, 3)
        saver = checkpoint.Saver(Location(tempfile.mkdtemp()), spec.Checkpoint(every=1), group)
        saver.attach(sharded_state.of(on).optimizer)
        held = play.state(on)
        saver.save(3, sharded_state.of(on).tensors(), build_index.facts(optimizer_steps=sharded_state.of(on).steps))
        expected = setting.losses(made, its, on, 3, 3)
        saver.wait()
        for to in (stage, other):
            made = setting.job(setting.TINY, **given, **{"train.zero.stage": to})
            on = setting.engine(made, its := setting.recipe(made))
            found = checkpoint.open_checkpoint(saver.run, 3)
            checkpoint.load(found, sharded_state.of(on).tensors(whole=True), group)
            sharded_state.of(on).after_load(found.index.resume["optimizer_steps"])
            loaded = play.state(on)
            unequal = sum(not torch.equal(held[name], loaded[name]) for name in held)
            yield row(f"tensors unequal, saved beside training at {at}, loaded at ZeRO-{to}", unequal, 0)
            next_ = apart(setting.losses(made, its, on, 3, 3), expected)
            yield row(f"next losses, saved at {at}, loaded at ZeRO-{to}", next_, 0.0 if to == stage else 2e-2)


def ahead() -> Iterator[Row]:
    """Compares micro-batches that are copied to the device while it computes with the same on the CPU."""
    from heliostat.data.device_streams import on_device

    micros = [{"tokens": torch.randint(0, 1 << 30, (8, 4096), generator=torch.Generator().manual_seed(i))} for i in range(16)]
    load = torch.randn(512, 512, device=setting.DEVICE)
    unequal = 0
    for micro, batch in zip(micros, on_device(micros, setting.DEVICE), strict=True):
        load = F.normalize(load @ load)  # which the next copy runs beside
        unequal += not torch.equal(batch["tokens"].cpu(), micro["tokens"])
    yield row("micro-batches unequal, copied ahead", unequal, 0)


def draws() -> Iterator[Row]:
    """Compares noise and timesteps from samples' keys with the CPU's bits."""
    from heliostat.recipes.images import rows

    keys = torch.arange(1000, 1016)
    ours, right = (rows.draw(7, on, (4, 64, 64), 0.1, 0.1, True).named() for on in (keys.to(setting.DEVICE), keys))
    yield row("numbers of other bits than the CPU's", sum(int((ours[n].cpu() != right[n]).sum()) for n in right), 0)


def attention() -> Iterator[Row]:
    """Compares fused attention kernels, forward and backward, with torch's plain one in fp32 on the CPU."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    kinds = {
        "flash": SDPBackend.FLASH_ATTENTION,
        "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
        "cuDNN": SDPBackend.CUDNN_ATTENTION,
    }
    given = [torch.randn(2, 8, 512, 64, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    for name, kind in kinds.items():
        with sdpa_kernel(kind):
            yield _kernel(f"{name} attention, bf16, causal", _causal, given, torch.bfloat16)


def flex() -> Iterator[Row]:
    """Compares compiled attention within documents of different lengths with a dense mask on the CPU."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    document = torch.repeat_interleave(torch.arange(4), torch.tensor([100, 28, 256, 128]))
    same = (document[:, None] == document[None, :]) & torch.ones(512, 512, dtype=torch.bool).tril()
    there = document.to(setting.DEVICE)

    def within(b: Any, h: Any, q: Any, k: Any) -> Any:
        return (there[q] == there[k]) & (q >= k)

    mask = create_block_mask(within, None, None, 512, 512, device=setting.DEVICE)
    run = torch.compile(flex_attention)
    given = [torch.randn(2, 8, 512, 64, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    yield _kernel("flex attention within documents, bf16", lambda q, k, v: run(q, k, v, block_mask=mask), given, torch.bfloat16,
                  lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=same))  # fmt: skip


def _causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def _kernel(what: str, call: Any, given: list[torch.Tensor], dtype: torch.dtype, twin: Any = None) -> Row:
    """Compares outputs and gradients, relative to their size. The last given tensor is the output's gradient."""
    there = [t.to(setting.DEVICE, dtype).requires_grad_() for t in given[:-1]]
    here = [t.detach().float().cpu().requires_grad_() for t in there]
    made, expected = call(*there), (twin or call)(*here)
    made.backward(given[-1].to(setting.DEVICE, dtype))
    expected.backward(given[-1].to(dtype).float())
    pairs = [(made, expected), *((a.grad, b.grad) for a, b in zip(there, here, strict=True))]
    return row(what, max(float((a.float().cpu() - b).norm() / b.norm()) for a, b in pairs), 2e-2)


def fp8() -> Iterator[Row]:
    """Compares a scaled product of matrices in float8 with the product of the same rounded numbers in fp32 on the CPU."""
    a, b = (torch.randn(n, 256, generator=torch.Generator().manual_seed(n)) for n in (128, 192))
    largest = torch.finfo(torch.float8_e4m3fn).max
    scales = [t.abs().max() / largest for t in (a, b)]
    low = [(t / s).to(torch.float8_e4m3fn) for t, s in zip((a, b), scales, strict=True)]
    twin = (low[0].float() * scales[0]) @ (low[1].float() * scales[1]).T
    there = [t.to(setting.DEVICE) for t in (*low, *scales)]
    made = torch._scaled_mm(there[0], there[1].T, there[2], there[3], out_dtype=torch.bfloat16)
    yield row("float8 matrix product", float((made.float().cpu() - twin).norm() / twin.norm()), 1e-2)
