"""Tests the shipped cluster files: they are valid, their pools fit the jobs, and faults are found and named."""

import json
import re
from pathlib import Path

import pytest
import yaml
from heliostat.cluster import cluster_file, pods, review, schemas
from heliostat.cluster.capacity import check_pools
from heliostat.errors import ConfigError
from heliostat.plan import planner

from tests.unit.build_job import ROOT, job

CLUSTERS = sorted((ROOT / "clusters").glob("*.yaml"))
KUBERAY_FILES = [p for p in CLUSTERS if p.stem.startswith("kuberay")]
pytestmark = pytest.mark.usefixtures("in_repository")


def read(name: str) -> cluster_file.ClusterFile:
    return cluster_file.read(ROOT / "clusters" / f"{name}.yaml")


def needs_crds(path: Path) -> None:
    if path in KUBERAY_FILES and not schemas.crd_folder().is_dir():
        pytest.skip(f"KubeRay's CRDs are not in {schemas.crd_folder()}: set {schemas.CRDS}")


def broken(path: Path, folder: Path, *changes: tuple[str, str]) -> Path:
    """Writes a cluster file with parts of its text replaced."""
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
    """Schema, sizes, and secrets give no error. The only warnings are about values that a person must fill in."""
    needs_crds(path)
    found = review.check(path)
    assert found.errors == []
    assert [w for w in found.warnings if "change-me" not in w] == []


@pytest.mark.parametrize("path", CLUSTERS, ids=lambda p: p.stem)
def test_every_line_of_a_file_is_explained(path):
    """The rule for these files: each line has a comment, or its block has one above. At least every fourth line has a comment."""
    lines = [line for line in path.read_text().splitlines() if line.strip()]
    assert sum("#" in line for line in lines) * 4 >= len([x for x in lines if "NetworkCardIndex" not in x])


def test_the_kuberay_cluster_is_this():
    """Lists the facts that operators rely on: pools, sizes, labels, authentication, network policy, and fault tolerance."""
    cluster = read("kuberay-h100")
    spec = cluster.spec
    assert [(p.name, p.least, p.most, p.cpus, p.gpus) for p in cluster.pools] == [
        ("head", 1, 1, 0, 0),
        ("gpu", 0, 8, 96, 8),
        ("data", 0, 16, 32, 0),
    ]
    assert [p.labels.get("heliostat-pool") for p in cluster.pools] == ["head", "train", "data"]
    assert spec["authOptions"] == {"mode": "token"}
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
    """The plan fits all workers in the pool with the job's labels. Data tasks run in a pool without GPUs."""
    pools = read(cluster).pools
    wanted, _, _ = planner.prepare(ROOT / "jobs" / f"{name}.yaml", ["data.sources=[{path: nowhere}]"])
    check_pools(wanted, read(cluster))
    train = [p for p in pools if wanted.workers.labels.items() <= p.labels.items()]
    data = [p for p in pools if wanted.data.labels.items() <= p.labels.items()]
    assert train and all(p.gpus for p in train)
    assert data and not any(p.gpus for p in data)


def test_the_kuberay_job_asks_for_what_its_training_job_asks_for():
    """16 workers with 8 CPUs and one GPU each on two nodes, the name of the job file, and the labels."""
    cluster = read("kuberay-job")
    path = re.search(r"jobs/[\w-]+\.yaml", cluster.raw["spec"]["entrypoint"])[0]
    wanted, _, _ = planner.prepare(ROOT / path, ["data.sources=[{path: nowhere}]"])
    gpu = next(p for p in cluster.pools if p.gpus)
    assert cluster.name == wanted.name
    assert gpu.least * gpu.gpus == wanted.workers.count * wanted.workers.gpus
    assert gpu.least * gpu.cpus >= wanted.workers.count * wanted.workers.cpus
    assert wanted.workers.labels.items() <= gpu.labels.items()


def test_a_job_too_big_for_the_cluster_is_refused_before_it_waits_for_ever():
    cluster = read("kuberay-h100")
    big = job(
        **{"workers.gpus": 1, "workers.count": 128, "train.global_batch_size": 256, "workers.labels": {"heliostat-pool": "train"}}
    )
    with pytest.raises(ConfigError, match=r"workers\.count: 128 workers .* has room for 64 workers at its maximum"):
        check_pools(big, cluster)
    lost = job(**{"workers.labels": {"heliostat-pool": "trian"}})
    with pytest.raises(ConfigError, match=r"workers\.labels: no pool .*heliostat-pool=train"):
        check_pools(lost, cluster)
    with pytest.raises(ConfigError, match=r"data\.labels: no pool .*heliostat-pool=data"):
        check_pools(job(**{"data.labels": {"heliostat-pool": "date"}}), cluster)


def test_workers_that_leave_the_data_tasks_no_cpu_are_refused(tmp_path):
    """Half a free CPU on each of two nodes isn't enough. Another node, or a pool for the data, is enough."""
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
        return cluster_file.read(tmp_path / "c.yaml")

    with pytest.raises(
        ConfigError, match=r"workers\.cpus: 2 workers of 1\.5 CPUs fill the nodes of .*: no node has the 1 CPU left"
    ):
        check_pools(wanted, cluster(2))
    check_pools(wanted, cluster(3))
    data = "  data: {resources: {CPU: 4}, node_config: {}, min_workers: 0, max_workers: 1, labels: {heliostat-pool: data}}\n"
    check_pools(job(**{"workers.count": 2, "workers.cpus": 1.5, "workers.labels": {"heliostat-pool": "train"}}), cluster(2, data))


def test_a_launcher_file_without_a_token_is_warned_of(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text((ROOT / "clusters" / "ssh.yaml").read_text().replace("RAY_AUTH_MODE=token", "RAY_AUTH_MODE=disabled"))
    assert [w.partition(":")[0] for w in review.check(path).warnings if "don't ask for a token" in w] == [
        "head_start_ray_commands",
        "worker_start_ray_commands",
    ]


@pytest.mark.parametrize(
    "text", ["[]", "a: 1", "apiVersion: ray.io/v1\nkind: RayService\nmetadata: {name: x}\nspec: {}", "{", ""]
)
def test_a_file_that_is_no_cluster_file_is_one_error(text, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"c\.yaml"):
        cluster_file.read(path)


def test_without_the_operators_schema_the_check_says_that_it_did_not_judge(tmp_path, monkeypatch):
    monkeypatch.setenv(schemas.CRDS, str(tmp_path))
    found = review.check(ROOT / "clusters" / "kuberay-h100.yaml")
    assert any("can't check the file against KubeRay's schema" in w for w in found.warnings)


def test_the_local_cluster_is_recognised_by_its_addresses_and_an_on_premise_one_is_not():
    assert read("local").local
    assert not read("ssh").local
    assert not read("aws-h100").local


def test_ray_itself_takes_the_launcher_files():
    """Ray's own validation accepts them and, for existing hosts, so does its own preparation."""
    from ray.autoscaler._private.local.config import prepare_local
    from ray.autoscaler._private.util import prepare_config, validate_config

    for path in CLUSTERS:
        raw = next(yaml.safe_load_all(path.read_text()))
        if "cluster_name" in raw:
            validate_config(prepare_config(raw))
            if raw["provider"]["type"] == "local":
                prepared, _ = prepare_local(raw)
                assert prepared["max_workers"] == len(raw["provider"]["worker_ips"])


WRITTEN = {
    "a Hugging Face token": "export HF_TOKEN=abcdefghijklmnop",
    "MLflow's token": "export MLFLOW_TRACKING_TOKEN='abcdefghijklmnop'",
    "MLflow's password": "export MLFLOW_TRACKING_PASSWORD=hunter2hunter2",
    "docker's password": "docker login --username me -p hunter2 registry.example.com",
    "docker's password, joined": "docker login -u me -phunter2 registry.example.com",
    "a header": "curl -H 'Authorization: Bearer abcdefghijklmnop' https://example.com",
    "docker's password, long": "docker login -u me --password=hunter2 registry.example.com",
    "a registry's": "skopeo copy --src-creds=me:hunter2 docker://a docker://b",
    "sshpass": "sshpass -p hunter2 ssh host",
    "sshpass, joined": "sshpass -phunter2 scp a host:",
    "an empty user": "redis-cli -u redis://:hunter2@redis:6379 ping",
    "a docker option": "docker run --env=WANDB_API_KEY=abcdefghijkl image",
}
NOT_WRITTEN = (
    "export RAY_AUTH_TOKEN_PATH=/home/ray/.ray/auth_token RAY_AUTH_MODE=token",
    "docker login --username me --password-stdin registry.example.com",
    "sshpass -e ssh host",
    "docker run -p 8265 image",
    "export HF_TOKEN=$HF_TOKEN MLFLOW_TRACKING_TOKEN=${TOKEN}",
    "export HF_TOKEN_PATH=~/.cache/huggingface/token",
    "MetadataOptions: {HttpTokens: required, HttpPutResponseHopLimit: 1}",
)


@pytest.mark.parametrize("case", WRITTEN)
def test_a_secret_written_into_a_command_is_an_error_that_does_not_repeat_it(case, tmp_path):
    source = ROOT / "clusters" / "aws-h100.yaml"
    found = review.check(broken(source, tmp_path, ("  - ray stop\n", f"  - {json.dumps(WRITTEN[case])}\n")))
    assert any("contains " in e for e in found.errors), found.errors
    assert not any(secret in e for e in found.errors for secret in ("hunter2", "abcdefgh"))


@pytest.mark.parametrize("line", NOT_WRITTEN)
def test_what_only_names_the_place_of_a_secret_is_none(line):
    assert review.found_in(line) is None


def test_a_rayjob_without_a_submitter_of_its_own_is_warned_of(tmp_path):
    """KubeRay's own submitter has no securityContext, so a restricted namespace rejects it."""
    source = ROOT / "clusters" / "kuberay-job.yaml"
    needs_crds(source)
    policy, raw = yaml.safe_load_all(source.read_text())
    del raw["spec"]["submitterPodTemplate"]
    (tmp_path / source.name).write_text(yaml.safe_dump_all([policy, raw]))
    assert [w.partition(":")[0] for w in review.check(tmp_path / source.name).warnings] == [
        "NetworkPolicy",
        "submitterPodTemplate",
    ]


def test_a_deleted_pods_time_is_held_against_the_jobs_grace():
    cluster = read("kuberay-job")
    assert list(pods.grace(cluster, job())) == []
    assert [w.partition(":")[0] for w in pods.grace(cluster, job(**{"checkpoint.grace": 200}))] == ["gpu"]


def policy(name: str) -> list[dict]:
    return json.loads((ROOT / "clusters" / f"aws-{name}-policy.json").read_text())["Statement"]


def actions(statements: list[dict]) -> list[str]:
    return [a for s in statements for a in ([s["Action"]] if isinstance(s["Action"], str) else s["Action"])]


def test_the_head_on_aws_starts_only_the_files_instance_types_and_passes_on_only_the_workers_roles():
    """There are no wildcards over a service's actions. The types are those of aws-h100.yaml, and only EC2 gets the roles."""
    head = policy("head")
    assert not any(a.endswith("*") for name in ("head", "worker", "data") for a in actions(policy(name)))
    started = [s for s in head if "ec2:RunInstances" in s["Action"] and "instance/*" in str(s["Resource"])]
    pools = read("aws-h100").pools
    assert [s["Condition"]["StringEquals"] for s in started] == [
        {"ec2:InstanceType": [p.instance for p in pools if not p.head], "aws:RequestTag/ray-cluster-name": "heliostat-aws"}
    ]
    assert [s["Condition"] for s in head if "image/*" in str(s["Resource"])] == [{"StringEquals": {"ec2:Owner": "amazon"}}]
    passed = next(s for s in head if s["Action"] == "iam:PassRole")
    assert [r.rpartition("/")[2] for r in passed["Resource"]] == ["heliostat-worker", "heliostat-data"]
    assert passed["Condition"] == {"StringEquals": {"iam:PassedToService": "ec2.amazonaws.com"}}
    assert not any(a.startswith(("ec2:", "iam:")) for name in ("worker", "data") for a in actions(policy(name)))


def test_no_node_of_a_pool_on_aws_may_delete_a_dataset():
    for name, places in {"worker": ["runs/*"], "data": ["datasets/*/work/*", "datasets/*.work/*"]}.items():
        deleting = [s["Resource"] for s in policy(name) if "s3:DeleteObject" in actions([s])]
        found = [r for resource in deleting for r in ([resource] if isinstance(resource, str) else resource)]
        assert found == [f"arn:aws:s3:::CHANGE-BUCKET/{place}" for place in places]


def test_the_image_has_the_cuda_that_its_locked_torch_is_built_for_and_takes_nothing_without_its_hash():
    locked = (ROOT / "clusters" / "requirements.lock").read_text()
    docker = (ROOT / "clusters" / "Dockerfile").read_text()
    cuda = re.search(r"^ARG CUDA=(\S+)$", docker, re.MULTILINE)[1]
    major, minor, _ = cuda.split(".")
    assert re.search(rf"^cuda-toolkit=={major}\.{minor}\.", locked, re.MULTILINE)  # which is torch's own pin
    assert "FROM nvidia/cuda:${CUDA}-" in docker and "@}${CUDA_DIGEST}" in docker and "sha256sum --check" in docker
    installs = re.findall(r"pip install (?:--no-cache-dir )(.*?)(?: \\\\)?$", docker, re.MULTILINE)
    assert len(installs) == 3 and "pip check" in docker
    assert all("--no-deps --require-hashes" in line for line in installs[:2]) and "--no-index --no-deps" in installs[2]


def test_the_container_of_development_installs_by_the_lock():
    """Its command is a target of the Makefile, and the variable that .ci/install reads names a folder of wheels."""
    text = re.sub(r"^\s*//.*$|\s//.*$", "", (ROOT / ".devcontainer" / "devcontainer.json").read_text(), flags=re.MULTILINE)
    container = json.loads(text)
    target = container["postCreateCommand"].split()[1]
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert container["containerEnv"]["WHEELS"] == "${localEnv:WHEELS}" and "${WHEELS:-}" in (ROOT / ".ci" / "install").read_text()
    assert re.fullmatch(r"mcr\.microsoft\.com/devcontainers/python:[\w.]+-3\.1[1-9]-\w+", container["image"])


def test_the_image_has_the_packages_of_every_extra_that_the_docs_use_on_a_cluster():
    """`prepare`, `serve`, `infer`, `benchmark`, and `index-documents` also run on the nodes, and nodes install nothing."""
    import tomllib

    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    locked = {
        canonicalize_name(n) for n in re.findall(r"^([\w.-]+)==", (ROOT / "clusters/requirements.lock").read_text(), re.MULTILINE)
    }
    for extra in ("images", "curation", "tune", "serve", "benchmark", "retrieval", "gcp"):
        assert {canonicalize_name(Requirement(r).name) for r in extras[extra]} <= locked, extra
