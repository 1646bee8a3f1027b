"""Tests that MFU divides by the peak of the installed GPU: names match exactly, and an unknown GPU has no peak."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from heliostat.cluster.peak_flops import BF16, peak_flops
from heliostat.errors import ConfigError
from heliostat.plan import hardware
from heliostat.training.worker.step_reports import StepReports

from tests.unit.build_job import job

PEAKS = [  # as torch.cuda.get_device_name and nvidia-smi -L report them, TFLOP/s in bf16
    ("NVIDIA H100 80GB HBM3", 989.4), ("NVIDIA H100 PCIe", 756), ("NVIDIA H100 NVL", 835.5), ("NVIDIA H200", 989.4),
    ("NVIDIA GH200 480GB", 989.4), ("NVIDIA B200", 2250), ("NVIDIA GB200", 2500), ("AMD Instinct MI300X", 1307.4),
    ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA A100-SXM4-40GB", 312), ("NVIDIA A100 80GB PCIe", 312),
    ("NVIDIA A100-PCIE-40GB", 312),
    ("NVIDIA A10", 125), ("NVIDIA A10G", 70), ("NVIDIA L4", 121), ("NVIDIA L40", 181.05), ("NVIDIA L40S", 362.05),
]  # fmt: skip
UNKNOWN = [
    "NVIDIA A100-SXM4-80GB MIG 1g.10gb", "NVIDIA H100 80GB HBM3 MIG 3g.40gb", "GRID A100-4C", "NVIDIA GeForce RTX 4090",
    "NVIDIA H20", "NVIDIA A100X", "NVIDIA RTX A1000", "nvidia h200", "H100", "",
]  # fmt: skip


@pytest.mark.parametrize(("name", "peak"), PEAKS)
def test_each_variant_of_a_gpu_has_its_own_peak(name, peak):
    assert peak_flops(name, "bf16") == peak_flops(name, "fp16") == peak * 1e12
    assert peak_flops(name, "fp32") is None


@pytest.mark.parametrize("name", UNKNOWN)
def test_an_unknown_gpu_has_no_peak(name):
    """Neither has a slice of a known GPU, because its name doesn't show its share of the peak."""
    assert peak_flops(name, "bf16") is None and peak_flops(name, "fp16") is None


@pytest.mark.parametrize(("name", "peak"), [("Tesla V100-SXM2-16GB", 125), ("Tesla V100-PCIE-16GB", 112), ("Tesla T4", 65)])
def test_gpus_without_bf16_have_a_peak_in_fp16_alone(name, peak):
    assert peak_flops(name, "fp16") == peak * 1e12 and peak_flops(name, "bf16") is None


def test_mfu_of_an_unknown_gpu_is_left_out_and_said_once(monkeypatch):
    notices: list[str] = []
    reports: Any = object.__new__(StepReports)
    reports.job, reports._reported_peak = job(**{"train.precision": "bf16"}), False
    reports.engine = SimpleNamespace(device=torch.device("cuda"), module=None)
    reports.context = SimpleNamespace(world=2, posts=SimpleNamespace(notice=notices.append))
    reports.recipe = SimpleNamespace(flops_per_sample=lambda model: 1e12)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA L40S MIG 1g")
    assert reports._mfu(1, 1.0) is None and reports._mfu(1, 1.0) is None
    assert notices == ["train/mfu isn't reported: heliostat doesn't know the peak FLOP/s of 'NVIDIA L40S MIG 1g' in bf16"]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA L40S")
    samples = reports.job.train.global_batch_size
    assert reports._mfu(10, 2.0) == pytest.approx(samples * 1e12 * 10 / 2 / (2 * 362.05e12)) and len(notices) == 1


def test_the_price_tables_gpus_are_found_by_their_exact_names():
    """Otherwise a plan would silently use other rates and another price."""
    devices = hardware.table()["devices"]
    found = {name: hardware.find(name, 1e12, devices) for name in (*(name for name, _ in PEAKS), *UNKNOWN)}
    assert {name: device for name, device in found.items() if device} == {
        "NVIDIA H100 80GB HBM3": "H100", "NVIDIA H200": "H200", "NVIDIA B200": "B200",
        "NVIDIA A100-SXM4-80GB": "A100", "NVIDIA L4": "L4",
    }  # fmt: skip
    for name, device in found.items():
        if device:  # both tables say the same
            assert devices[device]["tflops"]["bf16"] == pytest.approx(BF16[name] / 1e12, rel=1e-3)


def test_a_device_of_ones_own_prices_is_found_by_its_name():
    devices = {"L40S": {"memory_gib": 48}, "mine": {"memory_gib": 80, "names": ["NVIDIA H100 PCIe"]}}
    assert hardware.find("NVIDIA L40S", 48 * hardware.GIB, devices) == "L40S"
    assert hardware.find("NVIDIA H100 PCIe", 79 * hardware.GIB, devices) == "mine"
    assert hardware.find("NVIDIA L40", 48 * hardware.GIB, devices) is None
    with pytest.raises(ConfigError, match=r"devices\.mine\.names: expected a list"):
        hardware.find("x", 1e12, {"mine": {"memory_gib": 80, "names": "x"}})


def test_a_machine_type_that_is_not_in_the_table_is_no_h100():
    """It was planned as an H100, regardless of its GPUs."""
    made, table = job(**{"workers.gpus": 1, "train.precision": "bf16"}), hardware.table()
    assert hardware.resolve(made, table, None, "p4de.24xlarge").name == "A100"
    missing = r"machine type 'p4d\.24xlarge' .* isn't in the price table. Did you mean 'p4de\.24xlarge'\? Pass --device NAME"
    with pytest.raises(ConfigError, match=missing):
        hardware.resolve(made, table, None, "p4d.24xlarge")
    assert hardware.resolve(made, table, "H200", "p4d.24xlarge").name == "H200"
    assert hardware.resolve(job(), table, None, "m7i.2xlarge").name == "cpu"
