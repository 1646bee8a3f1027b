"""Queries a cluster's dashboard over HTTP. Every request has a deadline. If a token exists, every request contains this token."""

from __future__ import annotations

import http.client
import json
import os
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any, TypedDict

from heliostat.cluster import private

TIMEOUT_S = 10.0


def headers(token: str | None) -> dict[str, str]:
    """Returns the HTTP header with the token; empty without a token."""
    return {"Authorization": f"Bearer {token}"} if token else {}


def own_token() -> str | None:
    """Reads the user's token from the places where Ray stores it; None if there is no token.

    The places are, in this order: RAY_AUTH_TOKEN, the file of RAY_AUTH_TOKEN_PATH, and ~/.ray/auth_token.
    """
    if token := os.environ.get("RAY_AUTH_TOKEN"):
        return token
    default = Path.home() / ".ray" / "auth_token"
    private.tighten(default)
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or default)
    return (path.read_text().strip() or None) if path.is_file() else None


def get(url: str, token: str | None = None, timeout: float = TIMEOUT_S) -> tuple[int, Any]:
    """Requests a URL and returns (HTTP status, decoded JSON or None). The status is 0 if there is no valid answer."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers(token)), timeout=timeout) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as e:
        return e.code, None
    except (OSError, ValueError, http.client.HTTPException):
        return 0, None


def probe(url: str, token: str | None = None) -> int:
    """Probes a Jobs API and returns the HTTP status: 200 for a success, 401 for a missing token, 403 for a wrong token, or 0 if
    there is no answer."""
    return get(f"{url}/api/version", token, 3.0)[0]


class ClusterMember(TypedDict):
    """Describes a node that belongs to the cluster, or that belonged to the cluster earlier."""

    id: str
    address: str
    alive: bool
    head: bool
    cpus: float
    gpus: float
    labels: dict[str, str]


def node_table(url: str, token: str | None) -> list[ClusterMember]:
    """Lists every node that ever belonged to the cluster; empty if the cluster doesn't answer."""
    status, raw = get(f"{url}/api/v0/nodes?limit=10000&detail=1", token)
    if status != 200 or not raw.get("result"):
        return []
    return [
        {
            "id": n["node_id"],
            "address": n["node_ip"],
            "alive": n["state"] == "ALIVE",
            "head": bool(n.get("is_head_node")),
            "cpus": (n.get("resources_total") or {}).get("CPU", 0.0),
            "gpus": (n.get("resources_total") or {}).get("GPU", 0.0),
            "labels": n.get("labels") or {},
        }
        for n in raw["data"]["result"]["result"]
    ]


def actor_alive(url: str, token: str | None, name: str) -> bool:
    """Checks whether an actor with this name is alive; False if the cluster doesn't answer."""
    wanted = urllib.parse.urlencode({"filter_keys": "name", "filter_predicates": "=", "filter_values": name, "limit": 10000})
    status, raw = get(f"{url}/api/v0/actors?{wanted}", token)
    return status == 200 and bool(raw["result"]) and any(a["state"] == "ALIVE" for a in raw["data"]["result"]["result"])
