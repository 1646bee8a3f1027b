"""Formats the lineage of a model or a run for people, as lines of (depth, text)."""

from __future__ import annotations

from itertools import zip_longest

from heliostat.cluster.capacity import LivingNode
from heliostat.data.ancestry import REFERENCE, WRITER
from heliostat.runs.consumed import ConsumedSource
from heliostat.storage.hub import names
from heliostat.text import plural
from heliostat.tracking.lineage import Lineage, Traced, TracedModel

ROLES = {REFERENCE: "log-probabilities by", WRITER: "answers by"}  # of a parent, by the end of its key


def lines(traced: Lineage) -> list[tuple[int, str]]:
    """Formats a lineage as lines of (depth, text)."""
    out: list[tuple[int, str]] = []
    if model := traced["model"]:
        out += _model_lines(model, 0)
    return out + run_lines(traced["run"], 1 if traced["model"] else 0, set())


def _model_lines(model: TracedModel, depth: int) -> list[tuple[int, str]]:
    aliases = f" ({', '.join('@' + a for a in model['aliases'])})" if model["aliases"] else ""
    scores = "  ".join(f"{k} {v:.5g}" for k, v in model["scores"].items())
    out = [
        (depth, f"model {model['name']} version {model['version']}{aliases}, license {model['license'] or 'unknown'}  {scores}")
    ]
    for entry in model["history"]:
        more = f", in place of version {entry['replaced']}" if entry.get("replaced") else ""
        more += f", version {entry['replaced_by']} took its place" if entry.get("replaced_by") else ""
        more += f", forced in spite of: {'; '.join(entry['overruled'])}" if entry.get("overruled") else ""
        out.append((depth + 1, f"{entry['event']} @{entry['alias']}{more}"))
    return out


def run_lines(run: Traced, depth: int, shown: set[str]) -> list[tuple[int, str]]:
    """Formats a run. `shown`: the ids of runs that an earlier line describes. The function adds this run's id."""
    shown.add(run["run_id"])
    reason = f": {run['reason']}" if run["reason"] else ""
    out = [(depth, f"run {run['name']} ({run['run_id']}), {run['status']}{reason}")]
    below = depth + 1
    for key, other in (("sweep", run["sweep"]), ("reproduces", run["reproduces"])):
        out += [(below, f"{key}: {other}")] if other else []
    for code in run["code"]:
        dirty = f", with uncommitted changes (code/{code['diff']}.diff)" if code["diff"] else ""
        out.append((below, f"code: {code['commit'] or 'no git commit'}{dirty}"))
    out.append((below, f"job: {run['recipe']}, seed {run['job']['seed']}, data seed {run['job']['data_seed']} (job.json)"))
    for change in run["changes"]:
        what = ", ".join(f"{k} {a} -> {b}" for k, (a, b) in ((k, v) for k, v in change.items() if k != "start_step"))
        out.append((below + 1, f"from step {change['start_step'] + 1:,}: {what}"))
    out += [(below, node_line(node)) for node in run["nodes"]]
    for number, a in enumerate(run["attempts"], 1):
        how = "restart" if a["restart"] else "command"
        why = f": {a['reason']}" if a["reason"] else ""
        span = f"steps {a['start_step'] + 1:,} to {a['reached']:,}" if a["reached"] > a["start_step"] else "no step"
        span += f" on {plural(a['workers'], 'worker')}"
        out.append((below, f"attempt {number} ({how}): {span}, {a['outcome'] or 'no recorded end'}{why}"))
    for segment in run["data"]["segments"]:
        out.append((below, f"data of steps {segment['first'] + 1:,} to {segment['end']:,} (plan {segment['digest'][:12]})"))
        out += [(below + 1, _source_line(s)) for s in segment["sources"]]
    if count := run["data"]["replaced_count"]:
        out.append((below, f"{count:,} bad samples were replaced"))
    out += [(below, f"tokenizer {t[:12]}") for t in run["tokenizers"]]
    for c in run["checkpoints"]:
        scores = "  ".join(f"{k} {v:.5g}" for k, v in c["scores"].items())
        out.append((below, f"checkpoint of step {c['step']:,}{' (deleted)' if c['deleted'] else ''}: {c['uri']}  {scores}"))
    for export in run["exports"]:
        what = "adapter" if export["adapter"] else "model"
        out.append((below, f"{what} of step {export['step']:,} exported to {export['folder']}"))
    for parent in run["parents"]:
        at = f", step {parent['step']:,}" if parent["step"] is not None else ""
        changed = f", with {', '.join(keys)} changed" if (keys := parent.get("changed")) else ""
        kind = "a model of the Hugging Face Hub" if names.model(parent["folder"]) else "a folder"
        role = ROLES.get(parent["key"].rpartition(".")[2], "initialized from")
        digest = f", digest {digest}" if (digest := parent.get("digest")) else ""
        if source := parent.get("converted_from"):
            digest += f", converted from {source['file']} {source['digest'][:12]}"
        out.append((below, f"{role} {parent['key']}: {parent['name'] or kind}{at} ({parent['folder']}){digest}{changed}"))
        if parent["run"]:
            out += run_lines(parent["run"], below + 1, shown)
        elif run_id := parent["run_id"]:
            fix = "see above" if run_id in shown else f"not in this tree; run: heliostat run lineage {run_id}"
            out.append((below + 1, f"run {parent['name']} ({run_id}), {fix}"))
    return out


def node_line(node: LivingNode) -> str:
    """Formats a cluster node with its resources in Ray. A private Ray has more CPUs than its machine has cores, because data
    tasks mostly wait for I/O."""
    gpus = f", {node['gpus']:g} GPUs {', '.join(node['accelerators'])}" if node["gpus"] else ""
    return f"node {node['host']} ({node['address']}), {node['cpus']:g} logical CPUs in Ray{gpus}"


def _source_line(s: ConsumedSource) -> str:
    shown = ", ".join(a if a == b else f"{a} to {b}" for a, b in s["ranges"][:3]) + (" ..." if len(s["ranges"]) > 3 else "")
    forgotten = "".join(
        f", made from version {old['digest'][:12]} without the documents {', '.join(old['ids'])}"
        for old in s.get("forgotten", [])
    )
    names_of = [f"{one['name']} {one['digest'][:12]} of " for one in s.get("made_from", [])]
    origin = "".join(f", made from {name}{place}" for name, place in zip_longest(names_of, s.get("inputs", []), fillvalue=""))
    origin += "".join(f", from {name}" for name in s.get("hub", {}).values())
    weights = ", ".join(f"{w:g}" + (f" from step {step + 1:,}" if step else "") for step, w in s["weights"])
    return (f"{s['name']} {s['digest'][:12]}, weight {weights}: {s['samples']:,} samples, {s['epochs']:.2f} epochs, "
            f"{s['shards']['seen']} of {s['shards']['total']} shards ({shown}) of {s['uri']}{origin}{forgotten}")  # fmt: skip
