"""Describes the machines of a plan: devices, links, and prices (`prices.yaml`, with its date). `--prices FILE` overrides
values.

`resolve` chooses a job's device: the given device, else the GPU of the cluster file's GPU pool, else the H100. A job without GPUs
is planned on CPU cores.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, TypedDict, cast

import yaml

from heliostat import schema
from heliostat.config.spec import Job
from heliostat.errors import ConfigError

GIB = 1 << 30
DEFAULT_GPU = "H100"
HOST_BANDWIDTH = 200  # bandwidth of a node's memory in GB/s, for devices without this key in the price table
Machine = dict[str, Any]  # a device's entry in the price table


@dataclass(frozen=True)
class Efficiency:
    """Holds the rates that each kind of work reaches on a device. A rate is a share of the device's peak in the job's
    precision. `memory` is a share of the memory's bandwidth."""

    matmul: float
    convolution: float
    attention: float
    memory: float
    fused: float  # with torch.compile, this share of other operations' memory traffic is left
    launch: float  # minimum seconds of any operation without torch.compile
    fp8: float = 0.8  # share of the float8 peak that linear layers reach with `train.fp8`
    host: float = 0.45  # share of the host memory's bandwidth that an optimizer on the CPU reaches


@dataclass(frozen=True)
class Network:
    """Holds the rates that communication reaches. `rate`: share of a link's peak, for large messages. `overlap`: the share of
    concurrent communication that computing hides. `hop`, `hop_inside`: minimum seconds of a message from one worker to the next,
    between nodes and inside a node."""

    rate: float
    overlap: float
    hop: float = 0.0
    hop_inside: float = 0.0


@dataclass(frozen=True)
class Device:
    """Describes one worker's device: one or more GPUs, a share of a GPU, or CPU cores. Rates are in bytes or FLOP per second."""

    name: str
    memory: float
    flops: float  # peak in the job's precision
    watts: float  # of the device, including its share of the node
    per_node: int
    link: float  # rate to a neighbor in the node
    network: float  # rate from its node to other nodes
    host_memory: float  # bytes of the device's share of the node's memory
    hour: float  # price per hour
    bandwidth: float  # bandwidth of the device's memory
    efficiency: Efficiency
    peaks: Mapping[str, float] = field(default_factory=dict)  # peak by precision
    host_bandwidth: float = 25e9  # bandwidth of its share of the node's memory


class Prices(TypedDict):
    """Holds the price table (`prices.yaml`)."""

    date: str
    currency: str
    energy_per_kwh: float
    pue: float
    node_failures: dict[str, float]
    devices: dict[str, Machine]
    instances: dict[str, Machine]
    efficiency: dict[str, dict[str, float]]
    network: dict[str, float]
    storage: dict[str, float]


def table(over: Path | None = None) -> Prices:
    """Reads the price table `prices.yaml`. The values in the user's file `over` override this table."""
    base = yaml.safe_load(resources.files("heliostat.plan").joinpath("prices.yaml").read_text(encoding="utf-8"))
    return cast(Prices, _merge(base, schema.read_yaml(over), "") if over else base)


def _merge(base: dict[str, object], over: dict[str, object], where: str) -> dict[str, object]:
    """Merges a user's price table into the base. The user's values replace the base's values.

    The user's table may add names to `devices`, `instances`, and `efficiency`. Raises ConfigError for any other key that isn't in
    the base.
    """
    out = dict(base)
    for key, value in over.items():
        path = f"{where}{key}"
        if key not in base and where not in ("devices.", "instances.") and not where.startswith("efficiency."):
            raise ConfigError(f"--prices: {path}: unknown key{schema.nearest(str(key), [str(k) for k in base])}")
        if isinstance(inner := base.get(key), dict):
            if not isinstance(value, dict):
                raise ConfigError(f"--prices: {path}: expected a mapping, got {value!r}")
            value = _merge(inner, value, f"{path}.")
        out[key] = value
    return out


def resolve(job: Job, prices: Prices, name: str | None = None, instance: str | None = None) -> Device:
    """Returns the device of each of the job's workers, with rates and prices. Raises ConfigError if the price table lacks the
    device, or if the device doesn't suit the job.

    `name`: a device of the table. `instance`: a machine type of the table, which may have its own price and network.
    """
    gpus, cores = job.workers.gpus, job.workers.cpus
    if instance and gpus and not name and instance not in prices["instances"]:
        near = schema.nearest(instance, list(prices["instances"]))
        raise ConfigError(
            f"machine type {instance!r} of the cluster file isn't in the price table{near}{'' if near.endswith('?') else '.'} "
            "Pass --device NAME, or add this machine type to `instances` in --prices FILE"
        )
    rented = prices["instances"].get(instance or "", {})
    name = name or (rented.get("device", DEFAULT_GPU) if gpus else "cpu")
    if name not in prices["devices"]:
        raise ConfigError(f"device {name!r} isn't in the price table{schema.nearest(name, list(prices['devices']))}")
    if (name == "cpu") == bool(gpus):
        raise ConfigError(f"workers.gpus: {gpus:g} given, but the plan is for {name}. Set workers.gpus, or pass another --device")
    raw = prices["devices"][name] | {k: v for k, v in rented.items() if k != "device"}
    try:
        units = cores if name == "cpu" else gpus  # `Device` describes the share of one worker
        return Device(
            name=name,
            memory=raw["memory_gib"] * GIB * units,
            flops=raw["tflops"][job.train.precision] * 1e12 * units,
            watts=max(raw["watts"], raw["node_watts"] / raw["per_node"]) * units,
            per_node=max(1, int(raw["per_node"] / units)),
            link=raw["link"] * 1e9,
            network=raw["network"] * raw["per_node"] * 1e9,
            host_memory=raw["host_memory_gib"] * GIB / raw["per_node"] * units,
            hour=raw["hour"] * units,
            bandwidth=raw["bandwidth"] * 1e9 * units,
            efficiency=efficiency(prices, name),
            peaks={precision: peak * 1e12 * units for precision, peak in raw["tflops"].items()},
            host_bandwidth=raw.get("host_bandwidth", HOST_BANDWIDTH) * 1e9 / raw["per_node"] * units,
        )
    except (KeyError, TypeError) as e:
        raise ConfigError(f"--prices: devices.{name}: {e} is missing, or isn't a number. Add this value to the price file") from e


def find(name: str, memory: float, devices: Mapping[str, Machine]) -> str | None:
    """Finds a GPU among the table's devices, by its exact CUDA name and its `memory` in bytes; None if this GPU isn't in the
    table.

    A device's `names` are the names that CUDA reports. If a device has no `names`, its name in the table is used, with or without
    "NVIDIA " before it.
    """
    return next((d for d, known in devices.items() if name in names(d, known) and memory > 0.9 * known["memory_gib"] * GIB), None)


def names(device: str, known: Machine) -> list[str]:
    """Returns the names that CUDA reports for a device of the table."""
    listed = known.get("names", [device, f"NVIDIA {device}"])
    if not isinstance(listed, list):
        raise ConfigError(f"--prices: devices.{device}.names: expected a list of names, got {listed!r}")
    return listed


def cost(used: list[dict[str, Any]], prices: Prices) -> float | None:
    """Computes the cost of devices, in the price table's currency, from the `seconds` that each device was in use. Returns None
    if one of the devices isn't in the price table.

    Each item of `used` has a `name`: `cpu` for one core, or a GPU's CUDA name. A GPU also has the bytes of its `memory`.
    """
    devices, total = prices["devices"], 0.0
    for one in used:
        if (known := "cpu" if one["name"] == "cpu" else find(one["name"], one["memory"], devices)) is None:
            return None
        total += one["seconds"] / 3600 * devices[known]["hour"]
    return total


def efficiency(prices: Prices, name: str) -> Efficiency:
    """Reads a device's efficiency from the price table. The device's own entry overrides values of the default entry `other`."""
    raw, known = {**prices["efficiency"]["other"], **prices["efficiency"].get(name, {})}, list(Efficiency.__dataclass_fields__)
    for key, value in raw.items():
        if key not in known:
            raise ConfigError(f"--prices: efficiency.{name}.{key}: unknown key{schema.nearest(str(key), known)}")
        if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
            raise ConfigError(f"--prices: efficiency.{name}.{key}: expected a number above 0, got {value!r}")
    return Efficiency(**raw)


def network(prices: Prices) -> Network:
    """Reads the rates of communication from the price table."""
    return Network(**prices["network"])
