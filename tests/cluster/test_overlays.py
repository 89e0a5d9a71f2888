"""Rendered overlays: valid objects that refer to nothing that is not there."""

from __future__ import annotations

import os
import re
import shlex
from collections import defaultdict
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml

from tests.helpers.manifests import (
    CLUSTER,
    KUBERAY,
    check_definition,
    cluster_specs,
    containers,
    environment,
    job_specs,
    name_of,
    pods,
    render,
    rendered,
)
from tests.helpers.mlflow_servers import COMPOSE

OVERLAYS = ("dev", "prod", "prod-embedded", "kueue")
WHOLE = ("dev", "prod", "prod-embedded")
"""Overlays that need nothing else in their namespace but secrets."""
KUBERNETES = "1.33"
README = (CLUSTER / "README.md").read_text()


def documented_secrets() -> dict[str, set[str]]:
    """Keys of the secrets that the run book creates, by name."""
    text = README.replace("\\\n", " ")
    found: dict[str, set[str]] = {}
    for line in re.findall(r"create secret generic (.*)", text):
        name, *options = shlex.split(line)
        found[name] = set(re.findall(r"--from-literal=([\w-]+)=", " ".join(options)))
    return found


def needed_secrets(documents: list[dict[str, Any]]) -> dict[str, set[str]]:
    """Keys that objects refer to, by name of the secret; no keys if all of them are taken."""
    found: dict[str, set[str]] = defaultdict(set)

    def visit(value: Any) -> None:
        if isinstance(value, dict):
            if "secretKeyRef" in value:
                found[value["secretKeyRef"]["name"]].add(value["secretKeyRef"]["key"])
            if "secretRef" in value:
                found[value["secretRef"]["name"]].update()
            if "authOptions" in value:
                # KubeRay hands the key with this name to all containers of Ray.
                found[value["authOptions"]["secretName"]].add("auth_token")
            for one in value.values():
                visit(one)
        elif isinstance(value, list):
            for one in value:
                visit(one)

    visit(documents)
    return dict(found)


@pytest.mark.slow
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_object_is_valid(overlay: str, crds_dir: Path) -> None:
    validate = pytest.importorskip("kubernetes_validate").validate
    kinds = set()
    for document in rendered(overlay):
        kinds.add(document["kind"])
        if document["apiVersion"].startswith("ray.io/"):
            check_definition(document, crds_dir)
        else:
            validate(document, KUBERNETES, strict=True)
    assert kinds >= ({"RayJob"} if overlay == "kueue" else {"RayCluster", "NetworkPolicy"})


def test_an_invalid_object_is_noticed() -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    (budget,) = (one for one in rendered("dev") if name_of(one).endswith("-stgt-trainings"))
    budget["spec"]["minAvailble"] = 1
    with pytest.raises(kubernetes_validate.ValidationError, match="minAvailble"):
        kubernetes_validate.validate(budget, KUBERNETES, strict=True)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_pod_runs_without_rights_that_it_does_not_need(overlay: str) -> None:
    documents = rendered(overlay)
    found = list(pods(documents))
    assert found
    for name, pod in found:
        security = pod["spec"]["securityContext"]
        assert security["runAsNonRoot"] is True, name
        assert security["runAsUser"] > 0, name
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod["spec"].keys(), name
        for container in containers(pod):
            check_container(f"{name}/{container['name']}", container)
        assert all(
            {"emptyDir", "persistentVolumeClaim"} & volume.keys()
            for volume in pod["spec"].get("volumes", [])
        ), name
    for name, spec in cluster_specs(documents).items():
        if "autoscalerOptions" in spec:
            check_container(f"{name}/autoscaler", spec["autoscalerOptions"])


def check_container(name: str, container: dict[str, Any]) -> None:
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }, name
    resources = container["resources"]
    assert resources["requests"].keys() >= {"cpu", "memory"}, name
    assert resources["limits"].keys() == resources["requests"].keys(), name
    if container.get("image", "stgt-ray").startswith("stgt-ray"):
        # Memory above what is asked for would be a promise that a full node breaks.
        assert resources["limits"] == resources["requests"], name


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_what_is_mounted_is_there_and_can_be_written(overlay: str) -> None:
    documents = rendered(overlay)
    claims = {
        document["metadata"]["name"]: {
            one["metadata"]["name"] for one in document["spec"].get("volumeClaimTemplates", [])
        }
        for document in documents
        if document["kind"] == "StatefulSet"
    }
    for name, pod in pods(documents):
        volumes = {volume["name"] for volume in pod["spec"].get("volumes", [])}
        volumes |= claims.get(name, set())
        for container in containers(pod):
            mounts = {one["name"]: one["mountPath"] for one in container["volumeMounts"]}
            assert mounts.keys() <= volumes, name
            # The root file system is read-only.
            assert "/tmp" in mounts.values() or "redis" in name, name
            if container["image"].startswith("stgt-ray"):
                assert "/home/ray" in mounts.values(), name


@pytest.mark.parametrize("overlay", WHOLE)
def test_what_pods_refer_to_is_in_the_overlay(overlay: str) -> None:
    documents = rendered(overlay)
    there = {name_of(document) for document in documents}
    for name, pod in pods(documents):
        account = pod["spec"].get("serviceAccountName")
        assert account is None or f"ServiceAccount-{account}" in there, name
        for container in containers(pod):
            for source in container.get("envFrom", []):
                if "configMapRef" in source:
                    assert f"ConfigMap-{source['configMapRef']['name']}" in there, name
    namespace = "stgt-dev" if overlay == "dev" else "stgt"
    assert f"Namespace-{namespace}" in there
    assert all(
        document["metadata"]["namespace"] == namespace
        for document in documents
        if document["kind"] != "Namespace"
    )


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_run_book_creates_the_secrets_that_are_needed(overlay: str) -> None:
    documented = documented_secrets()
    needed = needed_secrets(rendered(overlay))
    assert needed
    for name, keys in needed.items():
        assert keys <= documented[name], name
    # Taken whole, as environment variables.
    assert documented["stgt-mlflow-client"] == {
        "MLFLOW_TRACKING_USERNAME",
        "MLFLOW_TRACKING_PASSWORD",
    }


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_no_object_contains_a_secret(overlay: str) -> None:
    documents = rendered(overlay)
    assert not [document for document in documents if document["kind"] == "Secret"]
    secret = re.compile(r"PASSWORD|SECRET|TOKEN|ACCESS_KEY")
    for name, pod in pods(documents):
        for container in containers(pod):
            for variable, value in environment(container).items():
                if secret.search(variable):
                    assert "secretKeyRef" in value, f"{name}: {variable}"


def matching(documents: list[dict[str, Any]], selector: dict[str, Any]) -> list[dict[str, Any]]:
    """Pod templates that labels of a selector select."""
    return [
        pod
        for _, pod in pods(documents)
        if selector.items() <= pod["metadata"].get("labels", {}).items()
    ]


@pytest.mark.parametrize("overlay", WHOLE)
def test_services_lead_to_ports_that_containers_have(overlay: str) -> None:
    documents = rendered(overlay)
    services = [document for document in documents if document["kind"] == "Service"]
    assert services
    for service in services:
        assert service["spec"].get("type", "ClusterIP") == "ClusterIP"
        (pod,) = matching(documents, service["spec"]["selector"])
        ports = {one["name"]: one["containerPort"] for one in containers(pod)[0]["ports"]}
        for port in service["spec"]["ports"]:
            assert ports[port["targetPort"]] == port["port"]


@pytest.mark.parametrize("overlay", WHOLE)
def test_addresses_name_services_that_are_there(overlay: str) -> None:
    documents = rendered(overlay)
    services = {
        document["metadata"]["name"]: {one["port"] for one in document["spec"]["ports"]}
        for document in documents
        if document["kind"] == "Service"
    }
    (settings,) = (one["data"] for one in documents if one["kind"] == "ConfigMap")
    addresses = [settings["MLFLOW_TRACKING_URI"]]
    for spec in cluster_specs(documents).values():
        options = spec.get("gcsFaultToleranceOptions", {})
        addresses += [options["redisAddress"]] if "redisAddress" in options else []
    for address in addresses:
        parts = urlsplit(address)
        assert parts.port in services[str(parts.hostname)]
    for name, pod in pods(documents):
        variables = environment(containers(pod)[0])
        if "PGHOST" in variables:
            assert int(variables["PGPORT"]) in services[variables["PGHOST"]], name


@pytest.mark.parametrize("overlay", WHOLE)
def test_nothing_is_reached_but_what_a_policy_allows(overlay: str) -> None:
    documents = rendered(overlay)
    policies = {one["metadata"]["name"]: one for one in documents if one["kind"] == "NetworkPolicy"}
    nothing = policies.pop("stgt-nothing")["spec"]
    assert nothing == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    for name, pod in pods(documents):
        labels = pod["metadata"]["labels"].items()
        rules = [
            policy["spec"]
            for policy in policies.values()
            if policy["spec"]["podSelector"]["matchLabels"].items() <= labels
        ]
        assert len(rules) == 1, name
        (rule,) = rules
        assert rule["policyTypes"] == ["Ingress", "Egress"]
        # No rule lets everyone in.
        assert all(one.get("from") for one in rule["ingress"]), name
        declared = {
            port["containerPort"] for one in containers(pod) for port in one.get("ports", [])
        }
        opened = {port["port"] for one in rule["ingress"] for port in one.get("ports", [])}
        assert "submitter" in name or "worker" in str(labels) or opened <= declared, name


def test_the_server_of_the_overlays_is_that_of_compose() -> None:
    documents = rendered("prod")
    (deployment,) = (one for one in documents if name_of(one) == "Deployment-mlflow")
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    service = yaml.safe_load(COMPOSE.read_text())["services"]["mlflow"]
    assert container["command"] == service["command"]
    assert container["image"] == service["image"]
    # Keys of the bucket are replaced by a role; the others have values of their own.
    by_role = {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL"}
    assert environment(container).keys() == service["environment"].keys() - by_role


def test_one_overlay_keeps_the_state_of_the_cluster_in_redis_and_one_on_a_volume() -> None:
    options = {
        overlay: cluster_specs(rendered(overlay))["stgt"].get("gcsFaultToleranceOptions")
        for overlay in WHOLE
    }
    assert options["dev"] is None
    assert options["prod"]["backend"] == "redis"
    assert "storage" not in options["prod"]
    assert options["prod-embedded"]["backend"] == "rocksdb"
    assert not {"redisAddress", "redisPassword"} & options["prod-embedded"].keys()


@pytest.mark.slow
def test_tls_can_be_added_to_an_overlay(tmp_path: Path, crds_dir: Path) -> None:
    kuberay = os.path.relpath(KUBERAY, tmp_path)
    parts = {"resources": [f"{kuberay}/base"], "components": [f"{kuberay}/components/mtls"]}
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(parts))
    (cluster,) = (one for one in render(tmp_path) if one["kind"] == "RayCluster")
    check_definition(cluster, crds_dir)
    assert cluster["spec"]["tlsOptions"] == {"enabled": True}


def test_the_small_cluster_has_no_gpus() -> None:
    spec = cluster_specs(rendered("dev"))["stgt"]
    assert [group["groupName"] for group in spec["workerGroupSpecs"]] == ["cpu"]


def test_jobs_in_a_queue_keep_what_kueue_allows() -> None:
    documents = rendered("kueue")
    specs = job_specs(documents)
    assert "stgt-ingest" in specs
    for document in documents:
        assert document["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "stgt"
    for name, spec in specs.items():
        assert spec["shutdownAfterJobFinishes"] is True, name
        assert "deletionStrategy" not in spec, name
        cluster = spec["rayClusterSpec"]
        assert not cluster.get("enableInTreeAutoscaling"), name
        for group in cluster.get("workerGroupSpecs", []):
            assert group["minReplicas"] == group["replicas"] == group["maxReplicas"], name
