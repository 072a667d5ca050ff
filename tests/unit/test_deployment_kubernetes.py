"""The manifests: their linters pass, torchrun and splitfl take the replicas' command line, and what is said twice agrees.

That a cluster runs them is not tested here.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.relay import free_port
from splitfl.config import RunConfig
from tests.unit.deployment import DEPLOY, instructions, linter, serve_config

MANIFESTS = sorted(path for path in (DEPLOY / "kubernetes" / "base").glob("*.yaml") if path.name != "kustomization.yaml")
OVERLAYS = sorted(path.parent for path in (DEPLOY / "kubernetes").glob("*/kustomization.yaml"))


def test_manifests_follow_the_schema_of_kubernetes():
    assert {path.name for path in MANIFESTS} >= {"statefulset.yaml", "services.yaml", "network.yaml"}
    linter("kubernetes-validate", "--strict", *MANIFESTS)


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.name)
def test_kustomize_renders_what_kubernetes_takes(overlay, tmp_path, monkeypatch):
    monkeypatch.setenv("KUBECONFIG", "/dev/null")
    rendered = tmp_path / "rendered.yaml"
    rendered.write_text(linter("kubectl", "kustomize", overlay))
    linter("kubernetes-validate", "--strict", rendered)


@pytest.fixture(scope="module")
def manifests() -> dict[str, dict[str, Any]]:
    """The base's manifests by their kind."""
    return {document["kind"]: document for path in MANIFESTS for document in yaml.safe_load_all(path.read_text())}


@pytest.fixture(scope="module")
def pod(manifests) -> dict[str, Any]:
    return manifests["StatefulSet"]["spec"]["template"]["spec"]


@pytest.fixture(scope="module")
def launch(manifests, pod, tmp_path_factory) -> tuple[Any, RunConfig]:
    """The replicas' command line: torchrun's part as torchrun takes it, ours as a config."""
    from torch.distributed.run import get_args_parser

    (container,) = pod["containers"]
    assert container["command"] == ["torchrun"]
    words = [word.replace("$(POD_NAME)", "splitfl-1") for word in container["args"]]
    torchrun = get_args_parser().parse_args(words)
    assert torchrun.module
    assert torchrun.training_script == "server_trunk"
    toml = tmp_path_factory.mktemp("config") / "run.toml"
    toml.write_text(manifests["ConfigMap"]["data"]["run.toml"])
    return torchrun, serve_config(["serve", *torchrun.training_script_args], file=str(toml))


def test_the_replicas_meet_at_pod_0(manifests, pod, launch):
    torchrun, config = launch
    replicas = manifests["StatefulSet"]["spec"]["replicas"]
    service = manifests["Service"]["metadata"]["name"]
    assert manifests["StatefulSet"]["spec"]["serviceName"] == service
    assert manifests["Service"]["spec"]["clusterIP"] == "None"
    assert manifests["Service"]["spec"]["publishNotReadyAddresses"] is True
    assert torchrun.shutdown_timeout < pod["terminationGracePeriodSeconds"]
    assert int(torchrun.nnodes) * int(torchrun.nproc_per_node) == replicas
    assert config.mode == "hierarchical"
    assert config.replicas == 0  # torchrun says how many
    name = manifests["StatefulSet"]["metadata"]["name"]
    assert torchrun.rdzv_endpoint == f"{name}-0.{service}:29500"
    assert torchrun.local_addr == f"{name}-1.{service}"
    # Ranks go by the order of these names, and the clients' address is pod 0's.
    assert min(f"{name}-{index}.{service}" for index in range(100)) == f"{name}-0.{service}"


@pytest.mark.slow
def test_the_pod_whose_name_comes_first_is_rank_0_whenever_it_starts(launch, tmp_path):
    torchrun, _ = launch
    (tmp_path / "said.py").write_text("import os\nprint(os.environ['RANK'])\n")
    endpoint = f"localhost:{free_port()}"
    command = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={torchrun.nnodes}", "--rdzv-backend=c10d"]
    pods = []
    for name in ("localhost", "127.0.0.1"):
        words = [*command, f"--rdzv-endpoint={endpoint}", f"--local-addr={name}", str(tmp_path / "said.py")]
        pods.append(subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True))
    assert torchrun.rdzv_backend == "c10d"
    assert [pod.communicate(timeout=120)[0].strip() for pod in pods] == ["1", "0"]


def test_a_pod_in_which_the_replica_starts_anew_is_given_the_time_that_a_new_one_has(pod):
    (container,) = pod["containers"]
    start, life = (container[f"{name}Probe"] for name in ("startup", "liveness"))
    assert life["periodSeconds"] * life["failureThreshold"] >= start["periodSeconds"] * start["failureThreshold"] >= 1800


def test_a_pod_that_is_replaced_can_meet_the_others_again(pod):
    (container,) = pod["containers"]
    assert {"name": "TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "value": "1"} in container["env"]


def test_ports_are_the_same_everywhere(manifests, pod, launch):
    _, config = launch
    control, data, metrics = config.address[1], config.data_port, int(config.metrics.rpartition(":")[2])
    (container,) = pod["containers"]
    assert {port["name"]: port["containerPort"] for port in container["ports"]} == {
        "control": control,
        "data": data,
        "metrics": metrics,
        "rendezvous": 29500,
    }
    offered = {port["name"]: port["port"] for port in manifests["Service"]["spec"]["ports"]}
    assert offered == {"control": control, "data": data, "rendezvous": 29500}
    strangers, replicas = manifests["NetworkPolicy"]["spec"]["ingress"]
    assert [port["port"] for port in strangers["ports"]] == [control, data]
    assert replicas == {"from": [{"podSelector": manifests["StatefulSet"]["spec"]["selector"]}]}
    exposed = {int(port) for line in instructions("EXPOSE") for port in line.split()}
    assert exposed == {control, data, metrics}


def test_what_the_config_names_is_mounted(manifests, pod, launch):
    torchrun, config = launch
    (container,), (key,) = pod["containers"], pod["initContainers"]
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    files = volumes[mounts["/operator"]]["configMap"]["name"]
    assert files == manifests["ConfigMap"]["metadata"]["name"]
    assert Path(config.authorized_clients).name in manifests["ConfigMap"]["data"]
    assert torchrun.training_script_args[0] == "--config=/operator/run.toml"
    assert str(Path(config.authorized_clients).parent) == "/operator"
    assert key["command"][-1] == config.identity
    assert mounts[str(Path(config.identity).parent)] == "keys"
    claim = volumes[mounts["/data"]]["persistentVolumeClaim"]["claimName"]
    assert claim == manifests["PersistentVolumeClaim"]["metadata"]["name"]
    assert all(path.startswith("/data/") for path in (config.model, config.out))


def test_pods_may_do_no_more_than_they_must(manifests, pod):
    assert pod["automountServiceAccountToken"] is False
    user = pod["securityContext"]
    assert user["runAsNonRoot"] is True
    assert f"{user['runAsUser']}:{user['runAsGroup']}" in instructions("USER")
    assert user["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in pod["containers"] + pod["initContainers"]:
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert container["resources"]["limits"]["memory"]
    assert "Secret" not in manifests  # keys are made by the operator, never kept in a file of this repository
    assert set(manifests["NetworkPolicy"]["spec"]["policyTypes"]) == {"Ingress", "Egress"}
    labels = manifests["Namespace"]["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"


def test_outside_the_cluster_each_replica_has_an_address_and_a_name(manifests, launch):
    _, config = launch
    public = DEPLOY / "kubernetes" / "public"
    services = list(yaml.safe_load_all((public / "services.yaml").read_text()))
    name = manifests["StatefulSet"]["metadata"]["name"]
    pods = [service["spec"]["selector"]["statefulset.kubernetes.io/pod-name"] for service in services]
    assert pods == [f"{name}-{index}" for index in range(manifests["StatefulSet"]["spec"]["replicas"])]
    for service in services:
        assert [port["port"] for port in service["spec"]["ports"]] == [config.address[1], config.data_port]
    (patch,) = yaml.safe_load((public / "kustomization.yaml").read_text())["patches"]
    (change,) = yaml.safe_load(patch["patch"])
    assert change["path"] == "/spec/template/spec/containers/0/args/-"
    word = change["value"].replace("$(POD_NAME)", pods[1])
    assert serve_config(["serve", "model", word]).host.startswith(f"{pods[1]}.")
