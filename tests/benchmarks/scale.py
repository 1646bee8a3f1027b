"""Measures CPU seconds and MB of the control plane at 64, 1,024, and 16,384 ranks, simulated in one process.

    python -m tests.benchmarks.scale [--ranks 64 1024 16384] [--stage 3]

The functions are the real ones of ranks, mailbox, and driver, with as many ranks, heartbeats, and files; messages between them
are pickled as on the wire. Nothing trains: the tensors (Llama 3 8B with AdamW, 873 of them) have shapes but no memory. The shards
are files of the right size without content, so the figures exclude reading and writing their bytes. Each figure is the median of
--rounds; `rank 0` is the rank with the most work.

    python -m tests.benchmarks.scale --votes 16     # a vote by the tree, and by gloo's ring, among that many real processes
"""

from __future__ import annotations

import gc
import json
import math
import operator
import pickle
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from heliostat.checkpoint import agreement, checksums, index, layout, placement, writing
from heliostat.checkpoint.flat_shard import FlatShard
from heliostat.checkpoint.layout import SavedCheckpoint
from heliostat.checkpoint.placement import ChunkPlace, SealedIndex, Shard, Tensor
from heliostat.data import receipt
from heliostat.plan import zero_layout
from heliostat.storage.locations import Location
from heliostat.training import mailbox
from heliostat.training.driver import attempt, pool, watchdog
from heliostat.training.driver.pool import Member

from tests.benchmarks import harness
from tests.unit.build_index import facts

KINDS = ("master", "exp_avg", "exp_avg_sq")
HIDDEN, INNER, VOCABULARY, KEYS, LAYERS = 4096, 14336, 128_256, 1024, 32
NODE = 8  # ranks
READ = 4  # shards whose indexes are read by rank 0, whatever it restores
STEPS, LANES = 100, 2  # steps between two receipts, lanes of a rank


def shapes() -> dict[str, tuple[int, ...]]:
    layer = {
        "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (KEYS, HIDDEN), "self_attn.v_proj": (KEYS, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN), "mlp.gate_proj": (INNER, HIDDEN), "mlp.up_proj": (INNER, HIDDEN),
        "mlp.down_proj": (HIDDEN, INNER), "input_layernorm": (HIDDEN,), "post_attention_layernorm": (HIDDEN,),
    }  # fmt: skip
    layers = {f"model.layers.{i}.{n}.weight": s for i in range(LAYERS) for n, s in layer.items()}
    ends = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "model.norm.weight": (HIDDEN,)}
    return {**ends, **layers, "lm_head.weight": (VOCABULARY, HIDDEN)}


def timed(action: Callable[[], Any], rounds: int = 1) -> tuple[float, Any]:
    """Returns the median CPU seconds, and the action's result."""
    found, value = [], None
    for _ in range(rounds):
        gc.collect()
        began = time.process_time()
        value = action()
        found.append(time.process_time() - began)
    return statistics.median(found), value


def received(message: bytes) -> Any:
    return pickle.loads(message)  # noqa: S301 (made here)


class Ranks:
    """Simulates the ranks of a ZeRO stage, each with its slices of the state."""

    def __init__(self, world: int, stage: int) -> None:
        self.world, self.stage, self.shapes = world, stage, shapes()
        self.sizes = {n: math.prod(s) for n, s in self.shapes.items()}
        self._owned = zero_layout.slices(self.shapes, stage, world) if stage in (1, 2) else None

    def owned(self, rank: int) -> list[zero_layout.Slice]:
        if self._owned:
            return self._owned[rank]
        return [s for n in self.shapes if (s := zero_layout._own(n, self.sizes[n], rank, self.world, 1))[2]]

    def state(self, rank: int) -> dict[str, torch.Tensor]:
        return {
            f"{kind}.{name}": FlatShard(torch.empty(numel, device="meta"), start, self.sizes[name])
            for name, start, numel in self.owned(rank)
            for kind in KINDS
        }

    def shard(self, rank: int) -> Shard:
        """Returns a shard's entry in `checkpoint.json`; only for ranks whose indexes are read."""
        size = 4 * len(KINDS) * sum(n for _, _, n in self.owned(rank)) + 4096
        sealed = index.seal(self.index(rank)) if rank < READ else SealedIndex(65_536, 4294967295)
        return Shard(f"shard-{rank:05d}.safetensors", size, sealed)

    def index(self, rank: int) -> bytes:
        """Returns a shard's index, with a checksum of ten digits for each block."""
        places, offset = {}, 4096
        for name, start, numel in self.owned(rank):
            for kind in KINDS:
                sums = [4294967295] * -(-4 * numel // checksums.BLOCK)
                places[f"{kind}.{name}"] = ChunkPlace(start, numel, offset, sums)
                offset += 4 * numel
        return index.encode({"tensors": places})

    def part(self, rank: int) -> placement.WrittenPart:
        """Returns the result of `writing.part` for a rank, without a tensor for each slice."""
        tensors = {
            f"{kind}.{name}": Tensor("F32", [self.sizes[name]], [[0, 1, start, numel]])
            for name, start, numel in self.owned(rank)
            for kind in KINDS
        }
        return placement.WrittenPart([self.shard(rank)], tensors)

    def branch(self, rank: int) -> placement.WrittenPart:
        """Returns the part of a rank, merged with all those below it in the tree."""
        return self.merge(self.part(rank), [pickle.dumps(self.branch(c)) for c in agreement.children(rank, self.world)])

    def branch_at_once(self, rank: int) -> placement.WrittenPart:
        """Returns the same, without merging rank after rank, if every tensor is split by itself."""
        if self._owned:
            return self.branch(rank)
        stop, tensors = min(rank + (rank & -rank or self.world), self.world), {}
        for name, numel in self.sizes.items():
            per = -(-numel // self.world)
            whole, at = max(0, min(stop, numel // per) - rank), rank * per
            runs = [[0, whole, at, per]] if whole else []
            if (left := numel - (rank + whole) * per) > 0 and rank + whole < stop:
                runs.append([whole, 1, at + whole * per, left])
            if runs:
                tensors |= {f"{kind}.{name}": Tensor("F32", [numel], [list(run) for run in runs]) for kind in KINDS}
        return placement.WrittenPart([self.shard(r) for r in range(rank, stop)], tensors)

    def merge(self, part: placement.WrittenPart, messages: list[bytes]) -> placement.WrittenPart:
        for message in messages:
            part = placement.merge(part, received(message))
        return part


def save(ranks: Ranks, rounds: int) -> tuple[dict[str, Any], bytes]:
    """Plans a save; returns the row, and the bytes of `checkpoint.json`."""
    state = ranks.state(0)

    def plan() -> placement.WrittenPart:
        return writing.part(ranks.shard(0), writing.mine(state, 0, ranks.world))

    planning, own = timed(plan, rounds)
    assert own == ranks.part(0)
    few = Ranks(24, ranks.stage)
    assert all(few.branch(c) == few.branch_at_once(c) for c in agreement.children(0, few.world))
    messages = [pickle.dumps(ranks.branch_at_once(child)) for child in agreement.children(0, ranks.world)]

    def finish() -> bytes:
        whole = ranks.merge(ranks.part(0), messages)
        return layout.encode(index.root(100, {"format": layout.FORMAT, **facts(world_size=ranks.world)}, whole))

    root_s, root = timed(finish, rounds)
    held = timed(lambda: layout.encode(layout.decode(root)), rounds)[0]
    return {
        "plan, any rank, s": planning,
        "plan, rank 0, s": planning + root_s,
        "longest hold of the interpreter, s": held,
        "received by rank 0, MB": sum(map(len, messages)) / 1e6,
        "checkpoint.json, MB": len(root) / 1e6,
        "a shard's index, MB": len(ranks.index(0)) / 1e6,
    }, root


def lay_out(ranks: Ranks, root: bytes, run: Location) -> Location:
    """Creates the folder of a checkpoint: files of the right sizes, with the first ranks' indexes as content."""
    place = layout.folder(run, 100)
    folder = Path(place.path)
    folder.mkdir(parents=True)
    for name, size in layout.files(layout.decode(root)):
        with (folder / name).open("wb") as f:
            f.truncate(size)
    for rank in range(min(READ, ranks.world)):
        (folder / f"shard-{rank:05d}.json").write_bytes(ranks.index(rank))
    place.join(layout.INDEX).write(root)
    return place


def restore(ranks: Ranks, run: Location, rounds: int) -> dict[str, Any]:
    """Opens the checkpoint, and plans reads on the same number of ranks and on half as many."""
    opening, found = timed(lambda: layout.open_checkpoint(run, 100), rounds)
    message = pickle.dumps(found)

    def read(other: Ranks) -> tuple[int, int]:
        """Plans all reads without the bytes; returns the size of the indexes, and the requests."""
        told: SavedCheckpoint = received(message)
        state = other.state(0)
        needed = {s for n, t in state.items() for s in told.needed(n, t.start, t.local.numel())}  # type: ignore[attr-defined]
        told.fetch_places(sorted(needed))
        parts: dict[int, list[checksums.Slice]] = {}
        for name, tensor in state.items():
            for shard, part in told.slices(name, tensor.start, tensor.local):  # type: ignore[attr-defined]
                parts.setdefault(shard, []).append(part)
        return sum(told.index.shards[s].index.bytes for s in needed), sum(len(checksums.runs(p)) for p in parts.values())

    same, (size, _) = timed(lambda: read(ranks), rounds)
    half, (more, _) = timed(lambda: read(Ranks(max(1, ranks.world // 2), ranks.stage)), rounds)
    return {
        "restore, rank 0, s": opening + same,
        "restore, any rank, s": same,
        "resize to half, any rank, s": half,
        "read by any rank, MB": (len(message) + size) / 1e6,
        "read on a resize, MB": (len(message) + more) / 1e6,
    }


def driver(world: int, rounds: int) -> dict[str, Any]:
    """Sends heartbeats through the mailbox to the driver's monitor, at their real rate."""
    state, hosts = mailbox.MailboxState(), [f"{r // NODE:056x}" for r in range(world)]

    def beat() -> None:
        for rank in range(world):
            pickle.dumps(state.heartbeat(*received(pickle.dumps((0, rank, 5, {"pid": rank, "node": hosts[rank]})))))

    beats = timed(beat, rounds)[0] / mailbox.interval(world)
    drained, message = timed(lambda: pickle.dumps(state.drain()), rounds)

    def take() -> dict[int, dict[str, Any]]:
        now = time.monotonic()
        heartbeats = received(message)[1]
        return {r: {**p, "moved": now - p["moved"], "at": now - p["at"]} for r, p in heartbeats.items()}

    taken, heartbeats = timed(take, rounds)
    look = timed(
        lambda: (
            Counter(p["node"] for p in heartbeats.values()),
            watchdog.stalled(heartbeats, world, time.monotonic(), 1e9, 0.0),
        ),
        rounds,
    )[0]
    return {
        "driver, share of a core": taken / attempt.POLL_S + look / attempt.LOOK_S,
        "mailbox, share of a core": beats + drained / attempt.POLL_S,
        "heartbeats a drain, MB": len(message) / 1e6,
    }


def start(world: int, rounds: int) -> dict[str, Any]:
    members = [Member(r, None, r, f"{r // NODE:056x}", "10.0.0.1", (str(r % NODE),)) for r in range(world)]
    placing, places = timed(lambda: pool.places_at(members, "tcp://10.0.0.1:1"), rounds)
    sent = timed(lambda: [pickle.dumps(p) for p in places], rounds)[0]
    return {"places of all ranks, s": placing + sent}


def step(world: int, rounds: int) -> dict[str, Any]:
    """Measures a step's share: the vote's hops, a rank's peers, and the receipts of some steps on their way to rank 0."""
    one = np.zeros((STEPS, LANES), np.int64)
    branches = [min(1 << n, world - child) for n, child in enumerate(agreement.children(0, world))]
    messages = [pickle.dumps([one.copy() for _ in range(branch)]) for branch in branches]

    def seal() -> str:
        parts = [one]
        for message in messages:
            parts = operator.add(parts, received(message))
        return receipt.extend(receipt.GENESIS, receipt.step_digests(receipt.in_lane_order(parts)))

    return {
        "hops of a vote": 2 * (world - 1).bit_length(),
        "neighbours of rank 0": len(agreement.children(0, world)),
        f"receipt of {STEPS} steps, rank 0, s": timed(seal, rounds)[0],
        "receipts to rank 0, MB": sum(map(len, messages)) / 1e6,
    }


def simulate(world: int, stage: int, rounds: int, folder: Path) -> dict[str, Any]:
    ranks, run = Ranks(world, stage), Location(str(folder / f"run-{world}-{stage}"))
    saved, root = save(ranks, rounds)
    lay_out(ranks, root, run)
    return {
        **start(world, rounds), **step(world, rounds), **saved, **restore(ranks, run, rounds), **driver(world, rounds)
    }  # fmt: skip


def vote(group: Any, everyone: Any, rounds: str) -> Iterator[dict[str, Any]]:
    """Yields the medians of a vote by the tree and by a ring all-reduce, interleaved, in milliseconds; and the group's
    descriptors."""
    import torch.distributed as dist

    where, code = agreement.Channel(group), torch.zeros((), dtype=torch.int32)
    taken: dict[str, list[float]] = {"tree": [], "ring": []}
    for _ in range(int(rounds)):
        for name, act in (
            ("tree", lambda: agreement.down(where, agreement.up(where, 1, max))),
            ("ring", lambda: dist.all_reduce(code, dist.ReduceOp.MAX, group=group)),
        ):
            dist.barrier(group)
            began = time.perf_counter()
            act()
            taken[name].append((time.perf_counter() - began) * 1e3)
    if dist.get_rank() == 0:
        yield {n: statistics.median(t) for n, t in taken.items()} | {"descriptors": len(list(Path("/proc/self/fd").iterdir()))}


def table(columns: dict[int, dict[str, Any]]) -> None:
    harness.head("", *(f"{world:,} ranks" for world in columns))
    for name in next(iter(columns.values())):
        harness.row(name, *(f"{column[name]:,.3g}" for column in columns.values()))


def main() -> None:
    ranks_ = {"type": int, "nargs": "+", "default": []}
    options = harness.arguments(__doc__, ranks=ranks_, stage=3, rounds=5, votes=0)
    if options.votes:
        from tests.integration import ranks

        (row,) = ranks.run("tests.benchmarks.scale:vote", (options.votes,), "200")
        print(json.dumps(row))
        return
    with tempfile.TemporaryDirectory(prefix="heliostat-scale-") as folder:
        columns = {}
        for world in options.ranks:
            columns[world] = simulate(world, options.stage, options.rounds, Path(folder))
            table(columns)


if __name__ == "__main__":
    main()
