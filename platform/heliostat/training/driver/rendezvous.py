"""Gives the workers of an attempt their places, and the rendezvous at which they form a process group.

A file in the session's folder on a private Ray, a TCP port of the first worker elsewhere. Whoever reaches that port can, without
a token, write what the workers read and pose as one of them: on a machine with other users even if it listens on loopback. The
workers of a private Ray are all on one machine, so a file, which nobody else can open, is enough.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Sequence

import ray

from heliostat.cluster import ray_internals
from heliostat.engine.process_group import WorkerPlace
from heliostat.training.driver.pool import Member

ANSWER_S = 30.0


def places(members: Sequence[Member]) -> list[WorkerPlace]:
    """Gives each member its place, in their order: ranks count through node after node."""
    return places_at(members, meeting(members[0]))


def places_at(members: Sequence[Member], rendezvous: str) -> list[WorkerPlace]:
    by_node: dict[str, list[Member]] = {}
    for member in members:
        by_node.setdefault(member.node, []).append(member)
    gpus = {node: tuple(gpu for one in there for gpu in one.gpus) for node, there in by_node.items()}
    return [
        WorkerPlace(
            rank=rank,
            world=len(members),
            local_rank=by_node[member.node].index(member),
            local_world=len(by_node[member.node]),
            rendezvous=rendezvous,
            backend="nccl" if member.gpus else "gloo",
            gpus=gpus[member.node],
        )
        for rank, member in enumerate(members)
    ]


def meeting(first: Member) -> str:
    """Finds a new rendezvous for the Ray that this process is connected to: an earlier group's would be taken for this one's."""
    if os.environ.get("RAY_ADDRESS"):
        return f"tcp://{first.address}:{ray.get(first.actor.free_port.remote(), timeout=ANSWER_S)}"
    return f"file://{ray_internals.session_folder() / f'group-{uuid.uuid4().hex}'}"
