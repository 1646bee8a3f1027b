"""Tests that each fault of a cluster file is found, and named by its key."""

import pytest
from heliostat.cluster import review
from heliostat.errors import ConfigError

from tests.unit.build_job import ROOT
from tests.unit.test_cluster_files import broken, needs_crds

KUBE_FAULTS = {
    "unknown key": (("replicas: 0", "replcas: 0"), "spec.workerGroupSpecs.0.replcas: unknown key. Did you mean 'replicas'?"),
    "wrong type": (
        ("maxReplicas: 8", "maxReplicas: many"),
        'spec.workerGroupSpecs.0.maxReplicas: expected integer, got "many"',
    ),
    "not a choice": (("mode: token", "mode: tokn"), 'spec.authOptions.mode: "tokn" isn\'t a choice. Did you mean'),
    "sizes": (("minReplicas: 0", "minReplicas: 9"), "pool gpu: minimum of 9 nodes is above the maximum of 8"),
    "secret": (
        (
            "            envFrom:\n",
            "            env: [{name: AWS_SECRET_ACCESS_KEY, value: hunter2hunter2}]\n            envFrom:\n",
        ),
        "env AWS_SECRET_ACCESS_KEY: the file contains the secret value",
    ),
    "two versions": (
        ("heliostat:0.1.0   # change: built", "heliostat:0.2.0   # change: built"),
        "images: 0.1.0, 0.2.0: the head and",
    ),
}


KUBE_OPEN = {
    "authOptions: Ray asks for no token": ("authOptions: {mode: token} ", "authOptions: {mode: disabled} "),
    "NetworkPolicy: every pod of Kubernetes can reach Ray's ports of head, gpu, data": (
        "policyTypes: [Ingress, ",
        "policyTypes: [",
    ),
    "reach Ray's ports of gpu.": (
        "        metadata: {labels: {heliostat-cluster: heliostat-h100}}\n        spec:\n          automount",
        "        spec:\n          automount",
    ),
    "LoadBalancer exposes Ray's ports": ("serviceType: ClusterIP", "serviceType: LoadBalancer"),
    "enableIngress: exposes the dashboard": ("enableIngress: false", "enableIngress: true"),
    "hostNetwork": ("automountServiceAccountToken: true", "hostNetwork: true"),
}


SOUND = {
    "expressions": (
        "podSelector: {matchLabels: &pods {heliostat-cluster: heliostat-h100}} ",
        "podSelector: {matchExpressions: [{key: heliostat-cluster, operator: In, values: [heliostat-h100]}]} #",
        "matchLabels: *pods}}]                          # the",
        "matchLabels: &pods {heliostat-cluster: heliostat-h100}}}] # the",
    ),
    "labels of KubeRay": (
        "&pods {heliostat-cluster: heliostat-h100}}",
        "&pods {ray.io/cluster: heliostat-h100, ray.io/is-ray-node: 'yes'}}",
    ),
    "Prometheus in the same namespace": (
        "namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: monitoring}}",
        "podSelector: {matchLabels: {app: prometheus}}",
    ),
    "a port by its name": ("{port: 8080, protocol: TCP}", "{port: metrics}"),
    "all ports of TCP": (
        "    - from: [{podSelector: {matchLabels: *pods}}] ",
        "    - ports: [{protocol: TCP}]\n      from: [{podSelector: {matchLabels: *pods}}] ",
    ),
}


@pytest.mark.parametrize("case", SOUND)
def test_network_policies_that_are_right_are_not_warned_of(case, tmp_path):
    pairs = list(zip(SOUND[case][::2], SOUND[case][1::2], strict=True))
    found = review.check(broken(ROOT / "clusters" / "kuberay-h100.yaml", tmp_path, *pairs))
    assert [w for w in found.warnings if "NetworkPolicy" in w] == []


def test_a_submitter_needs_no_policy_of_its_own_and_one_that_the_head_does_not_know_is_warned_of(tmp_path):
    unknown = ("    metadata: {labels: {heliostat-cluster: gpt-1b}}\n    spec:\n      restart", "    spec:\n      restart")
    found = review.check(broken(ROOT / "clusters" / "kuberay-job.yaml", tmp_path, unknown))
    warned = [w for w in found.warnings if "NetworkPolicy" in w]
    assert len(warned) == 1 and "head: ingress: the pod that submits the job can't reach the head. Allow port 8265" in warned[0]


LAUNCHER_FAULTS = {
    "unknown key": (("max_workers: 24", "max_wrokers: 24"), "max_wrokers: unknown key. Did you mean 'max_workers'?"),
    "unknown key below": (
        ("    resources: {CPU: 64}", "    resorces: {CPU: 64}"),
        "available_node_types.data.resorces: unknown key",
    ),
    "head": (("head_node_type: head", "head_node_type: haed"), "head_node_type: 'haed' isn't a node type. Did you mean 'head'?"),
    "sizes": (("min_workers: 0 ", "min_workers: 30 "), "pool gpu: minimum of 30 nodes is above the maximum of 8"),
    "no CPU": (("{CPU: 192, GPU: 8}", "{GPU: 8}"), "pool gpu: 8 GPUs and no CPU"),
    "secret": (("  - ray stop\n", "  - export AWS_SECRET_ACCESS_KEY=abcdefghij0123456789\n"), "contains a secret's value"),
    "access key": (
        ("  - ray stop\n", "  - aws configure set aws_access_key_id AKIAABCDEFGHIJKLMNOP\n"),
        "contains an AWS access key. Use an environment variable",
    ),
}


FAULTS = {"kuberay-h100": KUBE_FAULTS, "aws-h100": LAUNCHER_FAULTS}


@pytest.mark.parametrize(("name", "case"), [(name, case) for name, cases in FAULTS.items() for case in cases])
def test_faults_of_a_file_are_errors_that_name_the_key(name, case, tmp_path):
    source = ROOT / "clusters" / f"{name}.yaml"
    needs_crds(source)
    change, message = FAULTS[name][case]
    found = review.check(broken(source, tmp_path, change))
    assert any(message in e for e in found.errors), found.errors
    with pytest.raises(ConfigError):
        review.require(tmp_path / source.name)


LAUNCHER_OPEN = {
    "the dashboard listens on 0.0.0.0": ("--dashboard-host=127.0.0.1", "--dashboard-host=0.0.0.0"),
    'the dashboard listens on "0.0.0.0"': ("--dashboard-host=127.0.0.1", '--dashboard-host="0.0.0.0"'),
    "the dashboard listens on $(hostname -I)": ("--dashboard-host=127.0.0.1", "--dashboard-host $(hostname -I)"),
    "the dashboard listens on ::": ("--dashboard-host=127.0.0.1", "--dashboard-host ::"),
    "docker.run_options: publishes a port": ("- --shm-size=256g", "- -p 8265:8265"),
    "run_options: publishes a port. Remove this option": ("- --shm-size=256g", "- -p8265:8265"),
    "gpu.docker.worker_run_options: publishes a port": ("        - --gpus=all", "        - --gpus=all --publish=8265:8265"),
    "open to the whole internet": (
        "  cache_stopped_nodes: false",
        "  security_group: {GroupName: g, IpPermissions: [{FromPort: 8265, IpRanges: [{CidrIp: 0.0.0.0/0}]}]}\n"
        "  cache_stopped_nodes: false",
    ),
    "port 6379 is open to the whole internet": (
        "  cache_stopped_nodes: false",
        "  security_group: {GroupName: g, IpPermissions: [{FromPort: 6379, Ipv6Ranges: [{CidrIpv6: '::/0'}]}]}\n"
        "  cache_stopped_nodes: false",
    ),
    "worker_start_ray_commands: the nodes don't ask for a token": (
        "export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=/home/ray/.ray/auth_token FI_PROVIDER=efa",
        "export FI_PROVIDER=efa",
    ),
    "has no version": ("heliostat:0.1.0@sha256:change-me", "heliostat:latest"),
    "so it runs workers": ("{CPU: 0}", "{CPU: 8}"),
}


CLOUD_FAULTS = {
    "aws-h100": {
        "setup_commands: not set, so Ray uses its defaults": ("setup_commands: []", ""),
        "only root can read /root/.ray/auth_token": ("  /home/ray/.ray/auth_token: ~", "  /root/.ray/auth_token: ~"),
        "the container sees no GPU. Add --gpus=all": ("        - --gpus=all\n", ""),
        "the container has no EFA devices": ("        - --device=/dev/infiniband\n", ""),
        "Add --ulimit=memlock": ("    - --ulimit=memlock=-1:-1 ", "    - --ulimit=core=0 "),
        "Ray doesn't watch for their termination notice": ("python -m heliostat.cluster.spot aws", "true"),
        "no command logs in to change-me.dkr.ecr": ("  - aws ecr get-login-password", "  - 'true' #"),
        "head_start_ray_commands: the nodes don't ask": ("    ray start --head --port", "    /opt/start.sh --port"),
        "the latest image changes": ("ImageId: ami-change-me", "ImageId: resolve:ssm:/aws/service/x/latest/ami-id"),
        "every node gets a public address": ("use_internal_ips: true", "use_internal_ips: false"),
        "AmazonEC2FullAccess": ("      IamInstanceProfile: {Name: heliostat-head} ", "      # "),
        "no credentials for the datasets": ("      IamInstanceProfile: {Name: heliostat-worker} ", "      # "),
        "HttpTokens: required} is missing": ("HttpTokens: required", "HttpTokens: optional"),
        "isn't encrypted": (", Encrypted: true", ""),
        "Remove AssociatePublicIpAddress": ("NetworkCardIndex: 0,", "NetworkCardIndex: 0, AssociatePublicIpAddress: true,"),
    },
    "gcp-h100": {
        "A3 machines don't support pd-standard": ("diskType: zones/us-central1-a/diskTypes/pd-balanced", "diskName: x"),
        "the GPUs have no driver": ("install-nvidia-driver", "other"),
        "gpu.node_config.networkInterfaces: not set, so Ray gives the machine a public address": (
            "guide (more interfaces)\n      disks: *disk\n      networkInterfaces: *private\n",
            "guide (more interfaces)\n      disks: *disk\n",
        ),
        "networkInterfaces: the machine gets a public address": (
            "      networkInterfaces: &private",
            "      networkInterfaces: &private [{accessConfigs: [{type: ONE_TO_ONE_NAT}]}]\n      tags: &unused",
        ),
        "provider.use_internal_ips: not true": ("  use_internal_ips: true ", "  use_internal_ips: false "),
        "an image family changes": ("global/images/change-me", "global/images/family/common-nvidia-580"),
        "the scope cloud-platform gives access to every service": ("auth/devstorage.read_write", "auth/cloud-platform"),
        "Ray doesn't watch for their termination notice": ("python -m heliostat.cluster.spot gcp", "true"),
        "no command logs in to us-central1-docker.pkg.dev": ("  - gcloud auth configure-docker", "  - 'true' #"),
        "the container sees no GPU": ("worker_run_options: [--gpus=all]", "worker_run_options: []"),
    },
    "kuberay-h100": {
        "networkPolicy: KubeRay rejects the cluster unless its operator has the feature gate RayClusterNetworkPolicy": (
            "  headGroupSpec:\n",
            "  networkPolicy: {mode: DenyAll}\n  headGroupSpec:\n",
        ),
        "tlsOptions: KubeRay rejects the cluster unless its operator has the feature gate RayClusterMTLS": (
            "  headGroupSpec:\n",
            "  tlsOptions: {}\n  headGroupSpec:\n",
        ),
        "ingress: doesn't allow all of the cluster's own pods": (
            "    - from: [{podSelector: {matchLabels: *pods}}] ",
            "    - from: [{podSelector: {matchLabels: {a: b}}}] ",
        ),
        "pods can't look up names": (
            "- ports: [{port: 53, protocol: UDP}, {port: 53, protocol: TCP}] ",
            "- ports: [{port: 54}] ",
        ),
        "Allow port 53": ("{port: 53, protocol: UDP}, ", ""),
        "the autoscaler can't reach Kubernetes": ("{port: 443, protocol: TCP}, {port: 6443, protocol: TCP}", "{port: 444}"),
        "pods can't fetch the credentials": (
            "      ports: [{port: 80, protocol: TCP}, {port: 988, protocol: TCP}",
            "      ports: [{port: 81}",
            "          automountServiceAccountToken: false\n",
            "          serviceAccountName: reader\n",
        ),
        "Prometheus can't read Ray's metrics": ("{port: 8080, protocol: TCP}", "{port: 8081, protocol: TCP}"),
        "lacks runAsNonRoot": ("          runAsNonRoot: true ", "          runAsNonRoot: false "),
        "seccompProfile: {type: RuntimeDefault}": ("          seccompProfile: {type: RuntimeDefault}\n", ""),
        "lacks allowPrivilegeEscalation: false": ("allowPrivilegeEscalation: false", "allowPrivilegeEscalation: true"),
        "Add the capability IPC_LOCK": (", add: [IPC_LOCK]", "", "nvidia.com/gpu: 8}\n", "nvidia.com/gpu: 8, rdma/ib: 8}\n"),
        "autoscaler: container autoscaler: securityContext lacks": (
            "allowPrivilegeEscalation: false",
            "allowPrivilegeEscalation: true",
        ),
        "no tolerations": ("            - {key: nvidia.com/gpu, operator: Exists, effect: NoSchedule}", "            []"),
        "no nodeSelector": ("          nodeSelector: {nvidia.com/gpu.product: NVIDIA-H100-80GB-HBM3}", "          #"),
        "a deleted pod ends its workers at once": ("[python, -m, heliostat.cluster.spot, now,", "[python, -m, other, now,"),
        "terminationGracePeriodSeconds: 120 is too short": ('--seconds, "90"', '--seconds, "110"'),
    },
    "kuberay-job": {
        "activeDeadlineSeconds: not set": ("  activeDeadlineSeconds: 1209600 ", "  #"),
        "the operator can't ask for the job's state": ("{port: 8265, protocol: TCP}", "{port: 8266, protocol: TCP}"),
        "submitter: container ray-job-submitter: securityContext": (
            "          securityContext: *restricted   # like",
            "          # like",
        ),
    },
}


CLOUD_FAULTS["kuberay-h100"] |= KUBE_OPEN
CLOUD_FAULTS["aws-h100"] |= LAUNCHER_OPEN


@pytest.mark.parametrize(("name", "warning"), [(n, w) for n, cases in CLOUD_FAULTS.items() for w in cases])
def test_what_would_break_or_stand_open_at_the_first_real_start_is_found(name, warning, tmp_path):
    """Each of these faults was in a file that the tools' schemas accept."""
    source = ROOT / "clusters" / f"{name}.yaml"
    needs_crds(source)
    words = CLOUD_FAULTS[name][warning]
    found = review.check(broken(source, tmp_path, *zip(words[::2], words[1::2], strict=True)))
    assert found.errors == []
    assert any(warning in w for w in found.warnings), found.warnings
