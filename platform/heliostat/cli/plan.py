"""Prints a job's plan: `heliostat plan`, and `heliostat train --dry-run`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from heliostat.cli import completion
from heliostat.cli.common import Report, command, finish, out, print_table, run_folder
from heliostat.cli.groups import TOP
from heliostat.cli.options import ClusterFile, JobFile, Prices, Settings, TrackingUri, flag
from heliostat.errors import ConfigError
from heliostat.terminal import duration
from heliostat.text import plural

GIB = 1 << 30


@command(TOP, example="jobs/gpt-1b.yaml --cluster clusters/aws-h100.yaml")
def plan(
    job: JobFile,
    cluster: ClusterFile = None,
    device: Annotated[str | None, typer.Option(metavar="NAME", help="A device of the price table, for example H100")] = None,
    prices: Prices = None,
    rank: Annotated[bool, flag("--rank", help="Rank the parallelism configurations that fit, by time per step")] = False,
    calibrate: Annotated[
        str | None,
        typer.Option(
            help="Id or folder of a run; the run's measured speed corrects the device's speed",
            metavar="RUN",
            autocompletion=completion.runs,
        ),
    ] = None,
    write: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="With --calibrate: write the measured speed to a file for --prices"),
    ] = None,
    setting: Settings = None,
    mlflow: TrackingUri = None,
) -> None:
    """Show what a job needs: memory, time, cost, expected failures. Fails if the job doesn't fit."""
    from heliostat.plan.plan_file import plan_file

    if write and not calibrate:
        raise ConfigError(f"--out: has an effect only with --calibrate ({write}). Add --calibrate RUN")
    run = run_folder(calibrate, mlflow) if calibrate else None
    result = plan_file(job, setting, cluster, device, prices, run, write, rank)
    if rank:
        show_ranking(result)
    else:
        for line in lines(result):
            out.print(line)
    fits = not rank or result["set"] is not None
    finish(
        result,
        None
        if fits
        else ConfigError(f"{job}: no parallelism configuration fits on {result['workers']} workers. Raise workers.count"),
    )


def show_ranking(p: Report) -> None:
    out.print(f"{p['name']}: {parameters(p)} on {p['workers']} workers of {p['device']['name']} (estimates)")
    rows = [["stage", "parallel", "micro-batch", "checkpointing", "offload", "GiB", "s/step", "MFU", "why"]]
    for one in p["layouts"]:
        keys = one["layout"]
        offload = [k for k in ("optimizer", "param") if keys[f"train.zero.offload.{k}"]]
        speed = [f"{one['speed']['step_s']:.3f}", f"{one['speed']['mfu']:.1%}"]
        checkpointing = replayed(one["activation_checkpointing"])
        rows.append(
            [str(one["stage"]), degrees(one["parallel"]), str(one["micro_batch_size"]), checkpointing, " ".join(offload),
             f"{one['memory']['total'] / GIB:.1f}", *speed, one["why"]]
        )  # fmt: skip
    print_table(rows, (1, 3, 4, 8))
    if p["set"] is not None:
        from heliostat.plan.auto import shown

        out.print("the best    " + shown(p["set"]))
    for note in p["notes"]:
        out.print(f"note        {note}")


def degrees(parallel: dict[str, int]) -> str:
    """Formats the degrees of parallelism above 1, such as `tensor 2`."""
    return ", ".join(f"{name} {n}" for name, n in parallel.items() if n > 1)


def replayed(which: bool | int | str) -> str:
    """Formats the value of `train.activation_checkpointing` for the plan's table: yes, no, selective, or a number of layers."""
    if isinstance(which, bool):
        return "yes" if which else "no"
    return which if isinstance(which, str) else plural(which, "layer")


def parameters(p: Report) -> str:
    """Formats the number of parameters of a planned model. For a mixture of experts, adds the active parameters per token."""
    total, active = p["parameters"]["total"], p["parameters"]["active"]
    return f"{total:,} parameters" + (f" ({active:,} active per token)" if active < total else "")


def _checkpointing(which: bool | int | str) -> str:
    of = f" of {plural(which, 'layer')}" if not isinstance(which, bool | str) else ""
    kind = f"{which} " if isinstance(which, str) else ""
    return f", {kind}activation checkpointing{of}" if which else ""


def _size(n: float) -> str:
    """Formats bytes in GB, or in MB below 0.1 GB."""
    return f"{n / 1e9:.2f} GB" if n >= 1e8 else f"{n / 1e6:.2f} MB"


def _length(days: float) -> str:
    """Formats the duration of a run in days. Below a tenth of a day, uses hours, minutes, and seconds."""
    return f"{days:.2f} days" if days >= 0.1 else duration(days * 86400)


def lines(p: Report) -> list[str]:
    """Formats a plan for a terminal, one topic per line."""
    from heliostat.plan import memory

    m, s, r, c, link = p["memory"], p["speed"], p["run"], p["checkpoint"], p["communication"]
    name = p["device"]["name"]
    digits = 2 if m["total"] >= GIB else 4
    text = [
        f"{p['name']}: {parameters(p)} on {p['workers']} workers of {name} (estimates; counts are exact)",
        f"memory     {m['total'] / GIB:.{digits}f} of {m['device'] / GIB:.0f} GiB per worker: {memory.parts(m, digits)}"
        + (f"; host memory {m['host'] / GIB:.1f}" if m["host"] >= 0.05 * GIB else ""),
        "compute    "
        + (f"{p['flops']['per_token']:.3g} FLOPs per token, " if r["tokens"] else "")
        + f"{p['flops']['per_sample']:.3g} per sample",
        f"network    {_size(link['bytes_per_step'])} per step and worker, {link['seconds_per_step']:.2f} s, "
        f"{link['exposed_s']:.2f} s of it not overlapped"
        + (f"; {_size(link['between_nodes'])} of weights and gradients leave each node" if link["between_nodes"] else ""),
        f"speed      {s['step_s']:.2f} s per step, "
        + (f"{s['tokens_per_second']:,.0f} tokens/s, " if r["tokens"] else "")
        + f"{s['samples_per_second']:,.2f} samples/s, MFU {s['mfu']:.1%}",
        f"run        {_length(r['days'])} at goodput {r['goodput']:.1%}, {r['failures']:.1f} failures expected, "
        f"{r['energy_kwh']:,.1f} kWh, cost {r['cost']:,.2f} (prices of {p['device']['prices']}; energy only "
        f"{r['energy_cost']:,.2f})",
        f"checkpoint {_size(c['bytes'])}, {c['upload_s']:.1f} s to storage, training waits {c['blocked_s']:.2f} s; every "
        f"{c['every']} steps (recommended: every {c['recommended_every']:,}, at one failure in "
        f"{c['hours_between_failures']:,.0f} hours)",
    ]
    if best := p["recommended"]:
        text.append(
            f"best       ZeRO stage {best['stage']}, micro-batch {best['micro_batch_size']}"
            f"{_checkpointing(best['activation_checkpointing'])}"
            f"{', optimizer in host memory' if best['offload_optimizer'] else ''}: {best['speed']['step_s']:.2f} s per step, "
            f"MFU {best['speed']['mfu']:.1%}"
        )
    return text + [f"note       {note}" for note in p["notes"]]


def show_dry_run(job: Path, settings: list[str], workers: int | None) -> None:
    from heliostat.plan.dryrun import dry_run

    result = dry_run(job, settings, workers)
    data = result["data"]
    out.print(
        f"{result['name']}: {result['parameters']:,} parameters at ZeRO stage {result['stage']} on {result['workers']} ranks; "
        f"state per rank {result['smallest_share'] / GIB:.2f} to {result['largest_share'] / GIB:.2f} GiB"
    )
    out.print(
        f"checkpoint: {result['shards']} shards, {result['tensors']:,} tensors, {result['chunks']:,} slices, "
        f"{result['checkpoint_bytes']:,} bytes, {result['index_bytes']:,} of them for the index"
    )
    out.print(
        f"step: {data['samples_per_rank']} samples per rank in {data['accumulation']} micro-batches of "
        f"{data['micro_batch_size']}; {data['lanes']} virtual ranks, {data['lanes_per_rank']} per rank"
        + (f"; {result['note']}" if result["note"] else "")
    )
    out.print(f"dry run passed in {result['seconds']:.1f} s; nothing was started")
    finish(result)
