"""Keeps the port that Ray Serve opens in each replica, for calls by gRPC, on the node's address: loopback on a private Ray."""

from __future__ import annotations

from typing import Any

EVERYWHERE = "[::]:"


def confine() -> None:
    """Makes Serve bind the port to the node's address; called while a replica is built, which is before the port is opened.

    Ray 2.60 opens it on all addresses, whether or not calls go by gRPC; they do not.
    """
    import ray
    from ray.serve._private import replica

    module: Any = replica
    open_port = module.add_port_to_grpc_server
    address = ray.util.get_node_ip_address()

    def confined(server: Any, given: str) -> Any:
        return open_port(server, given.replace(EVERYWHERE, f"{address}:"))

    module.add_port_to_grpc_server = confined
