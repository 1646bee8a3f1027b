"""Classifies a worker's error by its text: a broken device, a fault of either a device or a program, or a lost peer.

The texts come from the CUDA runtime, cuBLAS, cuDNN, NCCL, gloo, and torch. heliostat compares them in lower case.
"""

from __future__ import annotations

import re
from typing import Literal

from heliostat.text import brief

LONGEST = 500  # maximum number of characters of an error
ADVICE = (  # lines that torch adds to every CUDA error; they don't describe the error itself
    "CUDA kernel errors might be", "For debugging consider", "Compile with `TORCH_USE_CUDA_DSA`", "Search for `cudaError",
)  # fmt: skip

Fault = Literal["device", "unclear", "peer", "other"]

# The device, its driver, or its links are broken: no program causes these.
DEVICE = (
    "ecc error",
    "uncorrectable",
    "nvlink error",
    "hardware stack error",
    "fallen off the bus",
    "gpu is lost",
    "no cuda-capable device",
    "devices are busy or unavailable",
    "device is unavailable",
    "device unavailable",
    "invalid device ordinal",
    "system not yet initialized",
    "cuda unknown error",
    "cuda error: unknown error",
    "cuda error: initialization error",
    "cuda driver initialization failed",
    "launch timed out",
)
XID = re.compile(r"\bxid\b")
# The program, or its compilation target, is at fault: another device gives the same error.
PROGRAM = (
    "device-side assert triggered",
    "out of memory",
    "invalid argument",
    "invalid configuration argument",
    "no kernel image",
    "operation not supported",
    "too many resources requested",
    "named symbol not found",
    "unsupported toolchain",
)
# A program causes these as often as a device: an illegal access, a failed launch, an internal error of a library.
UNCLEAR = ("cuda error", "cuda failure", "unhandled cuda error", "cublas_status_", "cudnn_status_", "hip error")
# A collective or a rendezvous failed, because another worker or the network dropped out.
PEER = (
    "connection closed by peer", "connection reset", "gloo", "nccl", "timed out", "broken pipe", "socket", "failed to recv",
    "distnetworkerror", "diststoreerror", "remote process exited",
)  # fmt: skip


def classify(text: str) -> Fault:
    """Classifies an error from `text`: the name of its type and its message."""
    text = text.lower()
    if any(word in text for word in DEVICE) or XID.search(text):
        return "device"
    computes = any(word in text for word in UNCLEAR)
    if computes and not any(word in text for word in PROGRAM):
        return "unclear"
    if not computes and any(word in text for word in PEER):
        return "peer"
    return "other"


def describe(error: BaseException) -> str:
    """Formats an error as one line: its type and its message."""
    said = message(error)
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


def message(error: BaseException) -> str:
    """Joins the lines of an error's message into one, without CUDA's advice and with at most LONGEST characters."""
    lines = [line.strip() for line in str(error).splitlines()]
    return brief(" ".join(line for line in lines if line and not line.startswith(ADVICE)), LONGEST)
