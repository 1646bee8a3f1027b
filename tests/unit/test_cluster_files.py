"""Cluster files: those that are handed out are right, their pools are what the jobs ask for, and faults are found and named."""

import re
from pathlib import Path

import pytest
import yaml
from heliostat.cluster import check, files, schemas
from heliostat.errors import ConfigError
from heliostat.plan import report, room

from tests.unit.build_job import ROOT, job

CLUSTERS = sorted((ROOT / "clusters").glob("*.yaml"))
KUBERAY = [p for p in CLUSTERS if p.stem.startswith("kuberay")]


@pytest.fixture(autouse=True)
def workspace(monkeypatch) -> None:
    monkeypatch.chdir(ROOT)


def needs_crds(path: Path) -> None:
    if path in KUBERAY and not schemas.crd_folder().is_dir():
        pytest.skip(f"KubeRay's CRDs are not in {schemas.crd_folder()}: set {schemas.CRDS}")


def broken(path: Path, folder: Path, *changes: tuple[str, str]) -> Path:
    """A cluster file with parts of its text replaced."""
    text = path.read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new, 1)
    (folder / path.name).write_text(text)
    return folder / path.name


def test_there_are_the_files_that_the_readme_names():
    assert {p.stem for p in CLUSTERS} >= {"local", "ssh", "aws-h100", "gcp-h100", "kuberay-h100", "kuberay-job"}


@pytest.mark.parametrize("path", CLUSTERS, ids=lambda p: p.stem)
def test_every_file_is_valid_for_its_tool_and_opens_no_port(path):
    """Schema, sizes, secrets: no error; the only warnings are about values that the person must put in."""
    needs_crds(path)
    found = check.check(path)
    assert found.errors == []
    assert [w for w in found.warnings if "change-me" not in w] == []


@pytest.mark.parametrize("path", CLUSTERS, ids=lambda p: p.stem)
def test_every_line_of_a_file_is_explained(path):
    """Golden rule of these files: a comment on the line, or above its block; at least every fourth line has one."""
    lines = [line for line in path.read_text().splitlines() if line.strip()]
    assert sum("#" in line for line in lines) * 4 >= len([x for x in lines if "NetworkCardIndex" not in x])


def test_the_kuberay_cluster_is_this():
    """What operators rely on, spelt out: pools, sizes, labels, authentication, network policy, fault tolerance."""
    cluster = files.read(ROOT / "clusters" / "kuberay-h100.yaml")
    spec = cluster.spec
    assert [(p.name, p.least, p.most, p.cpus, p.gpus) for p in cluster.pools] == [
        ("head", 1, 1, 0, 0),
        ("gpu", 0, 8, 96, 8),
        ("data", 0, 16, 32, 0),
    ]
    assert [p.labels.get("heliostat-pool") for p in cluster.pools] == ["head", "train", "data"]
    assert spec["authOptions"] == {"mode": "token"} and spec["networkPolicy"]["mode"] == "DenyAll"
    assert spec["enableInTreeAutoscaling"] is True
    assert spec["gcsFaultToleranceOptions"]["redisPassword"]["valueFrom"]["secretKeyRef"] == {
        "name": "heliostat-redis",
        "key": "password",
    }
    assert (spec["headGroupSpec"]["serviceType"], spec["headGroupSpec"]["enableIngress"]) == ("ClusterIP", False)
    import ray

    assert spec["rayVersion"] == ray.__version__


@pytest.mark.parametrize("cluster", ["aws-h100", "gcp-h100", "kuberay-h100"])
@pytest.mark.parametrize("name", ["llama3-8b", "gpt-1b"])
def test_full_scale_jobs_fit_on_the_clusters_and_data_work_takes_no_training_node(cluster, name):
    """The plan finds room for all workers in the pool that carries the job's labels; data goes to one without GPUs."""
    pools = files.read(ROOT / "clusters" / f"{cluster}.yaml").pools
    wanted, _, _ = report.prepare(ROOT / "jobs" / f"{name}.yaml", ["data.sources=[{path: nowhere}]"])
    room.check(wanted, files.read(ROOT / "clusters" / f"{cluster}.yaml"))
    train = [p for p in pools if wanted.workers.labels.items() <= p.labels.items()]
    data = [p for p in pools if wanted.data.labels.items() <= p.labels.items()]
    assert train and all(p.gpus for p in train)
    assert data and not any(p.gpus for p in data)


def test_the_kuberay_job_asks_for_what_its_training_job_asks_for():
    """16 workers of 8 CPUs and one GPU on two nodes, the job file's name, and the labels."""
    cluster = files.read(ROOT / "clusters" / "kuberay-job.yaml")
    path = re.search(r"jobs/[\w-]+\.yaml", cluster.raw["spec"]["entrypoint"])[0]
    wanted, _, _ = report.prepare(ROOT / path, ["data.sources=[{path: nowhere}]"])
    gpu = next(p for p in cluster.pools if p.gpus)
    assert cluster.name == wanted.name
    assert gpu.least * gpu.gpus == wanted.workers.count * wanted.workers.gpus
    assert gpu.least * gpu.cpus >= wanted.workers.count * wanted.workers.cpus
    assert wanted.workers.labels.items() <= gpu.labels.items()


def test_a_job_too_big_for_the_cluster_is_refused_before_it_waits_for_ever():
    cluster = files.read(ROOT / "clusters" / "kuberay-h100.yaml")
    big = job(
        **{"workers.gpus": 1, "workers.count": 128, "train.global_batch": 256, "workers.labels": {"heliostat-pool": "train"}}
    )
    with pytest.raises(ConfigError, match=r"workers\.count: 128 workers .* has room for 64 at its largest"):
        room.check(big, cluster)
    lost = job(**{"workers.labels": {"heliostat-pool": "trian"}})
    with pytest.raises(ConfigError, match=r"workers\.labels: no pool .*heliostat-pool=train"):
        room.check(lost, cluster)
    with pytest.raises(ConfigError, match=r"data\.labels: no pool .*heliostat-pool=data"):
        room.check(job(**{"data.labels": {"heliostat-pool": "date"}}), cluster)


def test_workers_that_leave_the_data_tasks_no_cpu_are_refused(tmp_path):
    """Half a CPU left on each of two nodes is none; a node more, or a pool for the data, is enough."""
    pools = """
  ray.head.default: {resources: {CPU: 0}, node_config: {}}
  train: {resources: {CPU: 2}, node_config: {}, min_workers: 0, max_workers: MOST, labels: {heliostat-pool: train}}
"""
    wanted = job(**{"workers.count": 2, "workers.cpus": 1.5})

    def cluster(most: int, more: str = ""):
        (tmp_path / "c.yaml").write_text(
            "cluster_name: c\nmax_workers: 9\nprovider: {type: aws, region: eu-west-1}\nhead_node_type: ray.head.default\n"
            f"available_node_types:{pools.replace('MOST', str(most))}{more}"
        )
        return files.read(tmp_path / "c.yaml")

    with pytest.raises(ConfigError, match=r"workers\.cpus: 2 workers of 1\.5 CPUs leave no node of .* the 1 CPU that reading"):
        room.check(wanted, cluster(2))
    room.check(wanted, cluster(3))
    data = "  data: {resources: {CPU: 4}, node_config: {}, min_workers: 0, max_workers: 1, labels: {heliostat-pool: data}}\n"
    room.check(job(**{"workers.count": 2, "workers.cpus": 1.5, "workers.labels": {"heliostat-pool": "train"}}), cluster(2, data))


KUBE_FAULTS = {
    "unknown key": (("replicas: 0", "replcas: 0"), "spec.workerGroupSpecs.0.replcas: unknown key; did you mean 'replicas'?"),
    "wrong type": (
        ("maxReplicas: 8", "maxReplicas: many"),
        'spec.workerGroupSpecs.0.maxReplicas: "many" should be of type integer',
    ),
    "not a choice": (("mode: token", "mode: tokn"), 'spec.authOptions.mode: "tokn" is not a choice; did you mean'),
    "sizes": (("minReplicas: 0", "minReplicas: 9"), "pool gpu: at least 9 nodes, but at most 8"),
    "secret": (
        (
            "            envFrom:\n",
            "            env: [{name: AWS_SECRET_ACCESS_KEY, value: hunter2hunter2}]\n            envFrom:\n",
        ),
        "env AWS_SECRET_ACCESS_KEY: its value is written in",
    ),
    "two versions": (
        ("heliostat:0.1.0   # change: built", "heliostat:0.2.0   # change: built"),
        "images: 0.1.0, 0.2.0: head and",
    ),
}


@pytest.mark.parametrize("case", KUBE_FAULTS)
def test_faults_of_a_kuberay_file_are_errors_that_name_the_key(case, tmp_path):
    source = ROOT / "clusters" / "kuberay-h100.yaml"
    needs_crds(source)
    change, message = KUBE_FAULTS[case]
    found = check.check(broken(source, tmp_path, change))
    assert any(message in e for e in found.errors), found.errors
    with pytest.raises(ConfigError):
        check.require(tmp_path / source.name)


KUBE_OPEN = {
    "authOptions: Ray asks for no token": ("authOptions: {mode: token} ", "authOptions: {mode: disabled} "),
    "networkPolicy: every pod": ("mode: DenyAll", "mode: DenyAllEgress"),
    "LoadBalancer opens Ray's ports": ("serviceType: ClusterIP", "serviceType: LoadBalancer"),
    "enableIngress: opens the dashboard": ("enableIngress: false", "enableIngress: true"),
    "hostNetwork": ("automountServiceAccountToken: true", "hostNetwork: true"),
}


@pytest.mark.parametrize("warning", KUBE_OPEN)
def test_open_ports_of_a_kuberay_file_are_warned_of(warning, tmp_path):
    found = check.check(broken(ROOT / "clusters" / "kuberay-h100.yaml", tmp_path, KUBE_OPEN[warning]))
    assert any(warning in w for w in found.warnings), found.warnings


LAUNCHER_FAULTS = {
    "unknown key": (("max_workers: 24", "max_wrokers: 24"), "max_wrokers: unknown key; did you mean 'max_workers'?"),
    "unknown key below": (
        ("    resources: {CPU: 64}", "    resorces: {CPU: 64}"),
        "available_node_types.data.resorces: unknown key",
    ),
    "head": (("head_node_type: head", "head_node_type: haed"), "head_node_type: 'haed' is no node type; did you mean 'head'?"),
    "sizes": (("min_workers: 0 ", "min_workers: 30 "), "pool gpu: at least 30 nodes, but at most 8"),
    "no CPU": (("{CPU: 192, GPU: 8}", "{GPU: 8}"), "pool gpu: 8 GPUs and no CPU"),
    "secret": (("  - ray stop\n", "  - export AWS_SECRET_ACCESS_KEY=abcdefghij0123456789\n"), "a secret's value is written in"),
    "access key": (
        ("  - ray stop\n", "  - aws configure set aws_access_key_id AKIAABCDEFGHIJKLMNOP\n"),
        "an AWS access key is written",
    ),
}


@pytest.mark.parametrize("case", LAUNCHER_FAULTS)
def test_faults_of_a_launcher_file_are_errors_that_name_the_key(case, tmp_path):
    change, message = LAUNCHER_FAULTS[case]
    found = check.check(broken(ROOT / "clusters" / "aws-h100.yaml", tmp_path, change))
    assert any(message in e for e in found.errors), found.errors


LAUNCHER_OPEN = {
    "the dashboard listens on every address": ("--dashboard-host=127.0.0.1", "--dashboard-host=0.0.0.0"),
    "publishes a port": ("- --shm-size=256g", "- -p 8265:8265"),
    "open to the whole internet": (
        "  cache_stopped_nodes: false",
        "  security_group: {GroupName: g, IpPermissions: [{FromPort: 8265, IpRanges: [{CidrIp: 0.0.0.0/0}]}]}\n"
        "  cache_stopped_nodes: false",
    ),
    "has no version": ("heliostat:0.1.0", "heliostat:latest"),
    "the head takes work": ("{CPU: 0}", "{CPU: 8}"),
}


@pytest.mark.parametrize("warning", LAUNCHER_OPEN)
def test_open_ports_and_odd_choices_of_a_launcher_file_are_warned_of(warning, tmp_path):
    found = check.check(broken(ROOT / "clusters" / "aws-h100.yaml", tmp_path, LAUNCHER_OPEN[warning]))
    assert any(warning in w for w in found.warnings), found.warnings


def test_a_launcher_file_without_a_token_is_warned_of(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text((ROOT / "clusters" / "ssh.yaml").read_text().replace("RAY_AUTH_MODE=token", "RAY_AUTH_MODE=disabled"))
    assert any("do not ask for a token" in w for w in check.check(path).warnings)


@pytest.mark.parametrize(
    "text", ["[]", "a: 1", "apiVersion: ray.io/v1\nkind: RayService\nmetadata: {name: x}\nspec: {}", "{", ""]
)
def test_a_file_that_is_no_cluster_file_is_one_error(text, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"c\.yaml"):
        files.read(path)


def test_without_the_operators_schema_the_check_says_that_it_did_not_judge(tmp_path, monkeypatch):
    monkeypatch.setenv(schemas.CRDS, str(tmp_path))
    found = check.check(ROOT / "clusters" / "kuberay-h100.yaml")
    assert any("was not held against KubeRay's schema" in w for w in found.warnings)


def test_the_local_cluster_is_recognised_by_its_addresses_and_an_on_premise_one_is_not():
    assert files.read(ROOT / "clusters" / "local.yaml").local
    assert not files.read(ROOT / "clusters" / "ssh.yaml").local
    assert not files.read(ROOT / "clusters" / "aws-h100.yaml").local


def test_ray_itself_takes_the_launcher_files():
    """Ray's own validation and, for hosts that are there already, its own preparation."""
    from ray.autoscaler._private.local.config import prepare_local
    from ray.autoscaler._private.util import prepare_config, validate_config

    for path in CLUSTERS:
        raw = yaml.safe_load(path.read_text())
        if "cluster_name" in raw:
            validate_config(prepare_config(raw))
            if raw["provider"]["type"] == "local":
                prepared, _ = prepare_local(raw)
                assert prepared["max_workers"] == len(raw["provider"]["worker_ips"])
