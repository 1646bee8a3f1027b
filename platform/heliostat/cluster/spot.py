"""Drains this machine's Ray node when its provider announces the end of a spot machine, or Kubernetes deletes a pod.

Ray doesn't watch for spot notices on EC2 and GCE. A draining node gets no new work. A run with workers on a draining node saves a
checkpoint, stops, and continues on other nodes (`training.driver.attempt`).

    python -m heliostat.cluster.spot aws          # in the background, next to `ray start`; EC2 gives about two minutes
    python -m heliostat.cluster.spot gcp          # the same on Google Cloud, which gives 30 seconds
    python -m heliostat.cluster.spot now --seconds 90    # as a Kubernetes preStop hook: drains, returns when no worker is left
"""

from __future__ import annotations

import argparse
import http.client
import json
import logging
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from datetime import UTC, datetime

import psutil

from heliostat.cluster import ray_internals
from heliostat.errors import ClusterError

log = logging.getLogger(__name__)

METADATA = "http://169.254.169.254"  # both clouds use this link-local address, which answers only this machine
POLL_S = 2.0
ANSWER_S = 2.0
AWS_NOTICE_S, GCP_NOTICE_S = 120.0, 30.0  # the time between notice and end that the providers promise
RETRY_S = 5.0
NO_WORK = ("ray::IDLE", "ray::DashboardAgent", "ray::RuntimeEnvAgent")  # Ray's processes on an idle node

Get = Callable[..., tuple[int, str]]


def get(url: str, method: str = "GET", headers: dict[str, str] | None = None) -> tuple[int, str]:
    """Queries the metadata service without a proxy, and returns (HTTP status, text). Raises OSError if the service gives no
    valid answer."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    request = urllib.request.Request(url, method=method, headers=headers or {})
    try:
        with direct.open(request, timeout=ANSWER_S) as answer:
            return answer.status, answer.read(65536).decode(errors="replace")
    except urllib.error.HTTPError as e:
        return e.code, ""
    except http.client.HTTPException as e:  # the answer isn't HTTP
        raise OSError(f"{type(e).__name__}: {e}") from e


def aws_notice(url: str = METADATA, ask: Get = get) -> float | None:
    """Returns the seconds until EC2 ends this spot instance; None without a notice. Raises ClusterError if the service reports
    an error.

    Uses a session token (IMDSv2), because instances with `HttpTokens: required` need a token.
    """
    status, token = ask(f"{url}/latest/api/token", "PUT", {"X-aws-ec2-metadata-token-ttl-seconds": "60"})
    if status != 200:
        raise ClusterError(f"{url}: returned no session token (HTTP {status})")
    status, text = ask(f"{url}/latest/meta-data/spot/instance-action", "GET", {"X-aws-ec2-metadata-token": token})
    if status == 404:  # no notice
        return None
    if status != 200:
        raise ClusterError(f"{url}: spot/instance-action answered HTTP {status}")
    try:
        until = datetime.strptime(json.loads(text)["time"], "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
    except (ValueError, KeyError, TypeError):
        return AWS_NOTICE_S  # this is a notice, even if its text can't be read
    return max(0.0, (until - datetime.now(UTC)).total_seconds())


def gcp_notice(url: str = METADATA, ask: Get = get) -> float | None:
    """Returns the seconds until Google Cloud ends this spot machine; None without a notice.

    Raises ClusterError if the metadata service reports an error.
    """
    status, text = ask(f"{url}/computeMetadata/v1/instance/preempted", "GET", {"Metadata-Flavor": "Google"})
    if status != 200:
        raise ClusterError(f"{url}: instance/preempted answered HTTP {status}")
    return GCP_NOTICE_S if text.strip() == "TRUE" else None


NOTICES = {"aws": aws_notice, "gcp": gcp_notice}


def drain(seconds: float, reason: str, address: str | None = None, node_ip: str | None = None) -> str:
    """Drains this machine's Ray node, which will end in `seconds`, and returns the node's id. Raises ClusterError if the drain
    fails.

    `reason`: a text for Ray's records. `address`: address of Ray's state server, by default the state server on this machine.
    `node_ip`: the node's address, by default this machine's address.
    """
    import ray
    from ray.core.generated import autoscaler_pb2, gcs_pb2

    preemption = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")  # type: ignore[attr-defined]
    alive = gcs_pb2.GcsNodeInfo.GcsNodeState.ALIVE  # type: ignore[attr-defined]
    try:
        client = ray_internals.state_client(address or "auto")
        here = node_ip or ray.util.get_node_ip_address()
        nodes = client.get_all_node_info(timeout=RETRY_S).items()
        mine = [key.hex() for key, n in nodes if n.node_manager_address == here and n.state == alive]
        if len(mine) != 1:
            raise ClusterError(f"{len(mine)} Ray nodes run at {here}, expected one. Pass --node-ip")
        until = int((time.time() + seconds) * 1000)  # the protocol requires milliseconds since the epoch
        accepted, why = client.drain_node(mine[0], preemption, reason, until)
    except (ConnectionError, ray.exceptions.RayError) as e:
        raise ClusterError(f"can't reach Ray's state server: {str(e).splitlines()[0] if str(e) else type(e).__name__}") from e
    if not accepted:
        raise ClusterError(f"Ray rejected the drain: {why}")
    return mine[0]


def watch(notice: Callable[[], float | None], drains: Callable[[float], str], poll_s: float = POLL_S) -> None:
    """Polls `notice` until this function returns a number of seconds, then drains the node. Retries until the drain succeeds.

    Raises ClusterError if this number of seconds passes before a drain succeeds. Warns once when the metadata service stops
    answering.
    """
    deaf = False
    while True:
        try:
            left = notice()
            if deaf:
                log.info("the metadata service answers again")
            deaf = False
        except (OSError, ClusterError) as e:
            if not deaf:
                log.warning("no answer about spot notices (%s). Trying again", e)
            deaf, left = True, None
        if left is not None:
            break
        time.sleep(poll_s)
    log.warning("the provider ends this machine in %.0f s: draining the machine's Ray node", left)
    deadline = time.monotonic() + left
    while True:
        try:
            log.warning("node %s is draining", drains(max(0.0, deadline - time.monotonic())))
            return
        except ClusterError as e:
            log.warning("%s", e)
        if time.monotonic() >= deadline:
            raise ClusterError("the node didn't drain in time")
        time.sleep(min(poll_s, 1.0))


def working() -> bool:
    """Checks whether Ray still runs a training worker, an actor, or a task on this machine."""
    names = ((p.info["cmdline"] or [""])[0] for p in psutil.process_iter(["cmdline"]))
    return any(name.startswith("ray::") and not name.startswith(NO_WORK) for name in names)


def leave(seconds: float, drains: Callable[[float], str], busy: Callable[[], bool] = working) -> bool:
    """Drains the node at once, and waits at most `seconds` until no worker runs on the node.

    Returns True if no worker runs on the node anymore. Returns False if workers still run, or if the drain fails.
    """
    deadline = time.monotonic() + seconds
    try:
        log.warning("node %s is draining", drains(seconds))
    except ClusterError as e:
        log.warning("%s", e)
        return False
    while (busy_workers := busy()) and time.monotonic() < deadline:
        time.sleep(0.5)
    return not busy_workers


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m heliostat.cluster.spot", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("who", choices=[*NOTICES, "now"], help="source of the notice: a provider, or `now`")
    parser.add_argument(
        "--seconds",
        type=float,
        default=90.0,
        help="with `now`: maximum number of seconds to wait until the node's workers have ended [default: 90]",
    )
    parser.add_argument("--url", default=METADATA, help=f"URL of the metadata service [default: {METADATA}]")
    parser.add_argument("--address", help="address of Ray's state server [default: the server that this machine uses]")
    parser.add_argument("--node-ip", help="address of the node [default: the address that Ray uses]")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)

    def drains(seconds: float) -> str:
        return drain(seconds, f"notice of {options.who}", options.address, options.node_ip)

    if options.who == "now":
        leave(options.seconds, drains)
        return 0  # Kubernetes would only log that the hook failed, and the log above already has the reason
    try:
        watch(lambda: NOTICES[options.who](options.url), drains)
    except ClusterError as e:
        log.error("%s", e)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
