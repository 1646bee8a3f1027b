"""Lists the peak FLOP/s of GPUs under the exact names that CUDA and ROCm report. MFU is a share of this peak.

Devices with similar names may differ a lot (H100 PCIe: 756 TFLOP/s, H100 SXM: 989 TFLOP/s), so only complete names match. The
peak is unknown for GPUs that aren't in the list, for virtual GPUs, and for MIG instances, whose names end with their slice (`MIG
1g.10gb`).

The figures are for dense matrices. These figures are half of the figures that data sheets give "with sparsity".
"""

from __future__ import annotations

T = 1e12

BF16 = {  # fp16 has the same peaks
    # NVIDIA A100 data sheet (June 2021): 312 in every variant
    **dict.fromkeys(
        ("NVIDIA A100-SXM4-40GB", "NVIDIA A100-SXM4-80GB", "NVIDIA A100-PCIE-40GB", "NVIDIA A100 80GB PCIe"), 312 * T
    ),
    "NVIDIA A30": 165 * T,  # A30 data sheet
    "NVIDIA A40": 149.7 * T,  # A40 data sheet
    "NVIDIA A10": 125 * T,  # A10 data sheet
    "NVIDIA A10G": 70 * T,  # A10G data sheet, published by AWS for EC2 G5
    "NVIDIA L4": 121 * T,  # L4 data sheet: 242 with sparsity
    "NVIDIA L40": 181.05 * T,  # L40 data sheet
    "NVIDIA L40S": 362.05 * T,  # L40S data sheet: 733 with sparsity
    "NVIDIA H100 80GB HBM3": 989.4 * T,  # H100 data sheet, SXM: 1,979 with sparsity
    "NVIDIA H100 PCIe": 756 * T,  # H100 data sheet of 2023, PCIe: 1,513 with sparsity
    "NVIDIA H100 NVL": 835.5 * T,  # H100 data sheet, NVL: 1,671 with sparsity
    "NVIDIA H200": 989.4 * T,  # H200 data sheet, SXM: 1,979 with sparsity
    "NVIDIA H200 NVL": 835.5 * T,  # H200 data sheet, NVL: 1,671 with sparsity
    "NVIDIA GH200 120GB": 989.4 * T,  # GH200 data sheet: 1,979 with sparsity
    "NVIDIA GH200 480GB": 989.4 * T,
    "NVIDIA GH200 144G HBM3e": 989.4 * T,
    "NVIDIA B200": 2250 * T,  # HGX B200 data sheet: 36 PFLOP/s with sparsity for 8
    "NVIDIA GB200": 2500 * T,  # GB200 NVL72 data sheet: 360 PFLOP/s with sparsity for 72
    "AMD Instinct MI250X": 191.5 * T,  # MI250X data sheet: 383 for two dies, each of which is a device
    "AMD Instinct MI300X": 1307.4 * T,  # MI300X data sheet
    "AMD Instinct MI300X VF": 1307.4 * T,  # a complete MI300X in a virtual machine, for example on Azure
    "AMD Instinct MI325X": 1307.4 * T,  # MI325X data sheet
}
FP16 = {  # GPUs whose matrix units don't support bf16
    "Tesla V100-SXM2-16GB": 125 * T,  # V100 data sheet (January 2020)
    "Tesla V100-SXM2-32GB": 125 * T,
    "Tesla V100-PCIE-16GB": 112 * T,
    "Tesla V100-PCIE-32GB": 112 * T,
    "Tesla T4": 65 * T,  # T4 data sheet
}
BY_PRECISION = {"bf16": BF16, "fp16": BF16 | FP16}


def peak_flops(device_name: str, precision: str) -> float | None:
    """Looks up a device's peak dense FLOP/s by its exact name. Returns None for an unknown name, and for fp32."""
    return BY_PRECISION.get(precision, {}).get(device_name)
