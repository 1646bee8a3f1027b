"""Warns about settings that fail at the first `ray up` on AWS or Google Cloud, and about open ports in any cluster file.

Ray's launcher accepts files with such settings, so the problems appear only when you already pay for machines. The rules come
from the providers' documentation and from the code of Ray 2.60's launcher. None of the rules was tested on a cloud.

A process that reaches Ray's ports can run code on the cluster (CVE-2023-48022), unless Ray requires a token.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator

from heliostat.cluster.cluster_file import ClusterFile, Section, groups

BROAD_SCOPE = "https://www.googleapis.com/auth/cloud-platform"
A3_DISKS = ("pd-balanced", "pd-ssd", "hyperdisk-balanced")  # A3 High doesn't support the default, pd-standard
SPOT_WATCHER = "heliostat.cluster.spot"
PRIVATE_REGISTRY = re.compile(r"\.dkr\.ecr\.[\w-]+\.amazonaws\.com$|-docker\.pkg\.dev$|^(?:\w+\.)?gcr\.io$")


def warnings(cluster: ClusterFile) -> Iterator[str]:
    """Yields warnings about a launcher file for AWS or Google Cloud; none for other files."""
    if cluster.kind != "launcher" or cluster.provider not in ("aws", "gcp"):
        return
    yield from _image(cluster)
    yield from _registry(cluster)
    yield from _docker(cluster)
    yield from _spot(cluster)
    yield from _aws(cluster) if cluster.provider == "aws" else _gcp(cluster)


def _nodes(cluster: ClusterFile) -> Iterator[tuple[str, Section, Section, bool]]:
    """Yields for every node type: (key of its node_config, node_config, node type, whether the node type has GPUs)."""
    for name, node in (cluster.raw.get("available_node_types") or {}).items():
        yield f"available_node_types.{name}.node_config", node.get("node_config") or {}, node, bool(_gpus(node))


def _gpus(node: Section) -> float:
    return (node.get("resources") or {}).get("GPU", 0)


def _image(cluster: ClusterFile) -> Iterator[str]:
    missing = [k for k in ("setup_commands", "head_setup_commands", "worker_setup_commands") if k not in cluster.raw]
    if cluster.raw.get("docker") and missing:
        yield (
            f"{', '.join(missing)}: not set, so Ray uses its defaults, which install packages without fixed "
            "versions into the running image. Set them to []"
        )
    if not cluster.raw.get("docker"):
        return
    as_root = any(("--user=root" in o or "-u=root" in o or "--user=0" in o) for _, o in docker_options(cluster))
    for target in cluster.raw.get("file_mounts") or {}:
        if target.startswith("/root/") and not as_root:
            yield (
                f"file_mounts: only root can read {target}, and the user in clusters/Dockerfile is ray. Put the file below "
                "/home/ray, and set RAY_AUTH_TOKEN_PATH to this place"
            )


def _registry(cluster: ClusterFile) -> Iterator[str]:
    """Warns about images in a private registry if no command logs in to the registry. Ray runs `docker pull` without a login."""
    nodes = (cluster.raw.get("available_node_types") or {}).values()
    registries = [
        *(cluster.raw.get("initialization_commands") or []),
        *(c for n in nodes for c in n.get("initialization_commands") or []),
    ]
    for image in sorted({pool.image for pool in cluster.pools if pool.image}):
        host = image.partition("/")[0]
        if PRIVATE_REGISTRY.search(host) and not any("docker" in c and host in c for c in registries):
            yield (
                f"initialization_commands: no command logs in to {host}, so the nodes can't pull {image}. "
                "Add a `docker login` command"
            )


def _docker(cluster: ClusterFile) -> Iterator[str]:
    """Warns about missing `docker run` options that containers with GPUs need."""
    if not cluster.raw.get("docker"):
        return
    shared = [word for where, words in docker_options(cluster) if where.startswith("docker.") for word in words]
    for _, config, node, gpus in _nodes(cluster):
        if not gpus:
            continue
        own = [str(option) for option in (node.get("docker") or {}).get("worker_run_options") or []]
        words = " ".join([*shared, *own])
        name = next(n for n, t in cluster.raw["available_node_types"].items() if t is node)
        where = f"available_node_types.{name}.docker.worker_run_options"
        if "--gpus" not in words and "NVIDIA_VISIBLE_DEVICES" not in words:
            yield f"{where}: the container sees no GPU. Add --gpus=all (or --env=NVIDIA_VISIBLE_DEVICES=all)"
        efa = any(str(card.get("InterfaceType", "")).startswith("efa") for card in config.get("NetworkInterfaces") or [])
        if efa and "/dev/infiniband" not in words:
            yield f"{where}: the container has no EFA devices, so NCCL falls back to TCP. Add --device=/dev/infiniband"
        if efa and "memlock" not in words:
            yield f"{where}: EFA locks more memory than the container's limit allows. Add --ulimit=memlock=-1:-1"


def _spot(cluster: ClusterFile) -> Iterator[str]:
    spot = [pool.name for pool in cluster.pools if pool.spot and not pool.head]
    if spot and not any(SPOT_WATCHER in c for c in cluster.raw.get("worker_start_ray_commands") or []):
        yield (
            f"worker_start_ray_commands: {', '.join(spot)} are spot machines, and Ray doesn't watch for their "
            f"termination notice. Start `python -m {SPOT_WATCHER} {cluster.provider}` in the background. Otherwise you lose the "
            "steps since the last checkpoint when a machine ends"
        )


def _aws(cluster: ClusterFile) -> Iterator[str]:
    head = cluster.raw.get("head_node_type")
    if not cluster.raw["provider"].get("use_internal_ips"):
        yield (
            "provider.use_internal_ips: every node gets a public address. Set this key to true, with private subnets, to "
            "keep the nodes inside the VPC"
        )
    for where, config, node, _ in _nodes(cluster):
        if "/latest/" in str(config.get("ImageId", "")):
            yield (f"{where}.ImageId: the latest image changes, so later nodes may boot another image. Set an image id (ami-...)")
        if "IamInstanceProfile" not in config:
            of_head = "Ray creates a profile for the head, with AmazonEC2FullAccess and AmazonS3FullAccess"
            others = "the nodes have no credentials for the datasets"
            is_head = cluster.raw["available_node_types"].get(head) is node
            yield (f"{where}.IamInstanceProfile: not set, so {of_head if is_head else others}. Set a profile (docs/clusters.md)")
        if (config.get("MetadataOptions") or {}).get("HttpTokens") != "required":
            yield (
                f"{where}.MetadataOptions: {{HttpTokens: required}} is missing, so a forged request can read the "
                "node's credentials. Add this option"
            )
        for disk in config.get("BlockDeviceMappings") or []:
            if "Ebs" in disk and not disk["Ebs"].get("Encrypted"):
                yield (f"{where}.BlockDeviceMappings: {disk.get('DeviceName', 'a disk')} isn't encrypted. Add Encrypted: true")
        for card in config.get("NetworkInterfaces") or []:
            if card.get("AssociatePublicIpAddress"):
                yield (
                    f"{where}.NetworkInterfaces: the node gets a public address. Remove AssociatePublicIpAddress, and "
                    "use a private subnet"
                )


def _gcp(cluster: ClusterFile) -> Iterator[str]:
    yield from _gcp_addresses(cluster)
    for where, config, node, gpus in _nodes(cluster):
        for disk in config.get("disks") or []:
            kind = str((disk.get("initializeParams") or {}).get("diskType", "pd-standard")).rpartition("/")[2]
            if str(config.get("machineType", "")).rpartition("/")[2].startswith("a3-") and kind not in A3_DISKS:
                yield (f"{where}.disks: A3 machines don't support {kind}. Set initializeParams.diskType: {' or '.join(A3_DISKS)}")
        image = " ".join(str((d.get("initializeParams") or {}).get("sourceImage", "")) for d in config.get("disks") or [])
        if "/images/family/" in image:
            yield f"{where}.disks: an image family changes, so later nodes may boot another image. Set a fixed image"
        items = {i.get("key"): str(i.get("value")) for i in (config.get("metadata") or {}).get("items") or []}
        if gpus and "nvidia" not in image and items.get("install-nvidia-driver", "").lower() != "true":
            yield (
                f"{where}: the GPUs have no driver. Use an image with a GPU driver, or set metadata.items "
                "install-nvidia-driver: 'True'"
            )
        for account in config.get("serviceAccounts") or []:
            if BROAD_SCOPE in (account.get("scopes") or []):
                yield (
                    f"{where}.serviceAccounts: the scope cloud-platform gives access to every service. List only the scopes "
                    "that nodes need"
                )
        is_head = cluster.raw["available_node_types"].get(cluster.raw.get("head_node_type")) is node
        if not is_head and not config.get("serviceAccounts"):
            yield (
                f"{where}.serviceAccounts: not set, so the nodes have no credentials for the datasets. Set an account with "
                "the least permissions"
            )


def _gcp_addresses(cluster: ClusterFile) -> Iterator[str]:
    """Warns about machines with a public address. If the file has no `networkInterfaces` for a machine, Ray gives this machine a
    public address."""
    for where, config, _, _ in _nodes(cluster):
        interfaces = config.get("networkInterfaces")
        if not interfaces:
            yield (
                f"{where}.networkInterfaces: not set, so Ray gives the machine a public address. Set a "
                "subnetwork without accessConfigs, and set provider.use_internal_ips: true"
            )
        elif any(card.get("accessConfigs") or card.get("ipv6AccessConfigs") for card in interfaces):
            yield (
                f"{where}.networkInterfaces: the machine gets a public address. Remove accessConfigs, and use Cloud "
                "NAT for outgoing traffic"
            )
        elif not cluster.raw["provider"].get("use_internal_ips"):
            yield (
                f"provider.use_internal_ips: not true, and {where} has no public address, so Ray would wait "
                "for a public address forever. Set this key to true"
            )


# open ports -----------------------------------------------------------------------------------------------------------


DOCKER_OPTIONS = ("run_options", "head_run_options", "worker_run_options")
LOOPBACK = ("127.", "localhost", "::1")
EVERYWHERE = ("0.0.0.0/0", "::/0")
DASHBOARD = re.compile(r"--dashboard-host[= ]+(\"[^\"]*\"|'[^']*'|\$\([^)]*\)|\S+)")


def open_ports(cluster: ClusterFile) -> Iterator[str]:
    """Yields warnings about Ray's ports if other machines can reach them, and about a Ray that requires no token."""
    yield from _launcher_ports(cluster) if cluster.kind == "launcher" else _kuberay_ports(cluster.spec)


def _launcher_ports(cluster: ClusterFile) -> Iterator[str]:
    for host in DASHBOARD.findall("\n".join(cluster.commands)):
        if not host.strip("\"'").startswith(LOOPBACK):
            yield (
                f"the dashboard listens on {host}, which other machines can reach. Use "
                "--dashboard-host=127.0.0.1, and an ssh tunnel"
            )
            break
    if not cluster.local:
        for key in ("head_start_ray_commands", "worker_start_ray_commands"):
            starts = [c for c in cluster.raw.get(key) or [] if "ray start" in c]  # each command has its own shell
            if not starts or not all(map(_asks_for_token, starts)):  # if there are none: Ray's default, without a token
                yield (
                    f"{key}: the nodes don't ask for a token. Export RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH in each "
                    "`ray start` command"
                )
    for where, options in docker_options(cluster):
        if any(re.match(r"(-p|-P|--publish)", option) for option in options):
            yield f"{where}: publishes a port. Remove this option, because only the cluster's nodes may reach Ray's ports"
    group = cluster.raw["provider"].get("security_group") or {}
    for rule in group.get("IpPermissions") or []:
        ranges = [*(rule.get("IpRanges") or []), *(rule.get("Ipv6Ranges") or [])]
        if any(value in EVERYWHERE for r in ranges for value in r.values()):
            yield (
                f"provider.security_group: port {rule.get('FromPort', 'any')} is open to the whole internet. "
                "Restrict this rule to your own addresses"
            )


def _asks_for_token(command: str) -> bool:
    """Checks whether a command runs `ray start` with token authentication and with the token's path."""
    return re.search(r"RAY_AUTH_MODE=['\"]?token\b", command) is not None and "RAY_AUTH_TOKEN_PATH=" in command


def docker_options(cluster: ClusterFile) -> Iterator[tuple[str, list[str]]]:
    """Yields (key, words) for every list of `docker run` options in a launcher file, including the lists of node types."""
    places: list[tuple[str, Section]] = [("docker", cluster.raw.get("docker") or {})]
    for name, node in (cluster.raw.get("available_node_types") or {}).items():
        places.append((f"available_node_types.{name}.docker", node.get("docker") or {}))
    for where, docker in places:
        for key in DOCKER_OPTIONS:
            if docker.get(key):
                yield f"{where}.{key}", [word for option in docker[key] for word in _words(str(option))]


def _words(option: str) -> list[str]:
    try:
        return shlex.split(option)
    except ValueError:  # an unclosed quote, which docker would also reject
        return option.split()


def _kuberay_ports(spec: Section) -> Iterator[str]:
    if (spec.get("authOptions") or {}).get("mode") != "token":
        yield "authOptions: Ray asks for no token. Set mode: token"
    head = spec["headGroupSpec"]
    if head.get("serviceType", "ClusterIP") != "ClusterIP":
        yield f"headGroupSpec.serviceType: {head['serviceType']} exposes Ray's ports. Use ClusterIP and a port-forward"
    if head.get("enableIngress"):
        yield "headGroupSpec.enableIngress: exposes the dashboard. Use a port-forward"
    for name, group in groups(spec):
        if group["template"]["spec"].get("hostNetwork"):
            yield f"{name}: hostNetwork: exposes Ray's ports on the host's addresses. Remove hostNetwork"
