"""Where a worker's time goes: seconds by part, in wall-clock, measured where the loop already stands still."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

PEAK_BF16 = {  # dense FLOP/s, from the makers' data sheets
    "H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "A10": 125e12, "MI300X": 1307e12,
}  # fmt: skip


class Ledger:
    """`with ledger("data"): ...` adds the seconds to a part; parts do not nest."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[part] += time.perf_counter() - started


def peak_flops(device_name: str, precision: str) -> float | None:
    """Peak FLOP/s of a device by name, None where it is not known (CPUs, other GPUs, fp32)."""
    if precision == "fp32":
        return None
    return next((peak for name, peak in PEAK_BF16.items() if name in device_name), None)
