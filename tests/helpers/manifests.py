"""Reads the cluster files, renders overlays, and adds up what they ask for."""

from __future__ import annotations

import functools
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from jobs.command_line import read_command_line
from jobs.entry import Job
from tests.helpers.data import PROJECT

CLUSTER = PROJECT / "cluster"
KUBERAY = CLUSTER / "kuberay"
GPU = "nvidia.com/gpu"

Document = dict[str, Any]


def load(text: str) -> list[Document]:
    """All documents of a YAML text, with aliases replaced by copies of what they refer to."""
    # Python's own parser takes seconds for KubeRay's definitions.
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    return [document for document in yaml.load_all(text, Loader=loader) if document]


def files_of_kind(*kinds: str) -> list[Path]:
    """Files below cluster/kuberay with a document of one of these kinds."""
    return [
        path
        for path in sorted(KUBERAY.rglob("*.yaml"))
        if any(document["kind"] in kinds for document in load(path.read_text()))
    ]


@functools.cache
def _rendered(folder: Path) -> str:
    """What kustomize makes of a folder, which takes a tenth of a second."""
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl is not here, which renders the overlays")
    made = subprocess.run(
        [kubectl, "kustomize", str(folder)], capture_output=True, text=True, check=False
    )
    assert made.returncode == 0, made.stderr
    return made.stdout


def render(folder: Path) -> list[Document]:
    """What kustomize makes of a folder."""
    return load(_rendered(folder))


def rendered(overlay: str) -> list[Document]:
    """What an overlay hands to Kubernetes."""
    return render(KUBERAY / "overlays" / overlay)


def name_of(document: Document) -> str:
    """Kind and name, for the id of a test."""
    return f"{document['kind']}-{document['metadata']['name']}"


def _strict(schema: Document) -> Document:
    """The schema with unknown fields refused, as the API server does for typed objects."""
    schema = dict(schema)
    if "properties" in schema:
        schema["properties"] = {k: _strict(v) for k, v in schema["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            schema.setdefault("additionalProperties", False)
    if isinstance(schema.get("items"), dict):
        schema["items"] = _strict(schema["items"])
    return schema


@functools.cache
def _validator(path: Path, version: str) -> Any:
    (definition,) = load(path.read_text())
    for one in definition["spec"]["versions"]:
        if one["name"] == version:
            schema = _strict(one["schema"]["openAPIV3Schema"])
            schema["properties"]["metadata"] = {"type": "object"}
            # `jsonschema.validate` would check the schema as well, which takes a second.
            return jsonschema.validators.validator_for(schema)(schema)
    raise AssertionError(f"{path} defines no version {version}")


def check_definition(document: Document, crds: Path) -> None:
    """Check a KubeRay object against KubeRay's own definition.

    Raises:
        jsonschema.ValidationError: it does not conform.
    """
    _validator(
        crds / f"ray.io_{document['kind'].lower()}s.yaml", document["apiVersion"].split("/")[1]
    ).validate(document)


def job_specs(documents: list[Document]) -> dict[str, Document]:
    """Specs of RayJobs by name, those inside a RayCronJob included."""
    specs = {}
    for document in documents:
        if document["kind"] == "RayJob":
            specs[document["metadata"]["name"]] = document["spec"]
        elif document["kind"] == "RayCronJob":
            specs[document["metadata"]["name"]] = document["spec"]["jobTemplate"]
    return specs


def cluster_specs(documents: list[Document]) -> dict[str, Document]:
    """Specs of Ray clusters by name of the object, those of jobs included."""
    clusters = {name: spec["rayClusterSpec"] for name, spec in job_specs(documents).items()}
    for document in documents:
        if document["kind"] == "RayCluster":
            clusters[document["metadata"]["name"]] = document["spec"]
    return clusters


def all_jobs() -> dict[str, Document]:
    """Specs of the RayJobs in cluster/kuberay, by name."""
    paths = files_of_kind("RayJob", "RayCronJob")
    return job_specs([document for path in paths for document in load(path.read_text())])


def pods(documents: list[Document]) -> Iterator[tuple[str, Document]]:
    """Every pod template, with the name of its object and its part of it."""
    for document in documents:
        name = document["metadata"]["name"]
        if document["kind"] in ("Deployment", "StatefulSet"):
            yield name, document["spec"]["template"]
    for name, spec in cluster_specs(documents).items():
        yield f"{name}/head", spec["headGroupSpec"]["template"]
        for group in spec.get("workerGroupSpecs", []):
            yield f"{name}/{group['groupName']}", group["template"]
    for name, spec in job_specs(documents).items():
        yield f"{name}/submitter", spec["submitterPodTemplate"]


def containers(pod: Document) -> list[Document]:
    """Containers of a pod template, those that run before the others included."""
    return [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]


def number(quantity: str) -> float:
    """A quantity of Kubernetes as a number, such as 500m, 4Gi or 8."""
    units = {"m": 1e-3, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
    for unit, factor in units.items():
        if quantity.endswith(unit):
            return float(quantity.removesuffix(unit)) * factor
    return float(quantity)


@dataclass(frozen=True)
class RayResources:
    """What a Ray cluster offers to tasks."""

    cpus: float
    gpus: float


def _offered(group: Document) -> RayResources:
    """CPUs and GPUs of a pod, as KubeRay hands them to `ray start`."""
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    cpus = group["rayStartParams"].get("num-cpus", limits["cpu"])
    return RayResources(number(cpus), number(limits.get(GPU, "0")))


def ray_resources(spec: Document) -> RayResources:
    """CPUs and GPUs of a Ray cluster with all of its workers."""
    groups = [(1, spec["headGroupSpec"])]
    groups += [(group["maxReplicas"], group) for group in spec.get("workerGroupSpecs", [])]
    offered = [(count, _offered(group)) for count, group in groups]
    return RayResources(
        sum(count * one.cpus for count, one in offered),
        sum(count * one.gpus for count, one in offered),
    )


def commands_of(entrypoint: str) -> list[list[str]]:
    """The commands that an entrypoint runs one after the other, as words."""
    words = shlex.split(entrypoint)
    if words[:2] == ["bash", "-c"]:
        assert len(words) == 3, entrypoint
        words = shlex.split(words[2])
    commands: list[list[str]] = [[]]
    for word in words:
        if word == "&&":
            commands.append([])
        else:
            commands[-1].append(word)
    return [words[1:] if words[0] == "exec" else words for words in commands]


def parsed(command: list[str]) -> tuple[str, Any]:
    """Job and config of `python -m jobs.JOB ...`, by the job's own command line.

    Raises:
        SystemExit: the job refuses the command line, whose error is on standard error.
    """
    assert command[:2] == ["python", "-m"], command
    job: Job = import_module(command[2]).JOB
    config, _ = read_command_line(job.name, job.command_line, command[3:])
    return job.name, config


def environment(container: Mapping[str, Any]) -> dict[str, Any]:
    """Variables of a container by name: their value, or where it comes from."""
    return {
        one["name"]: one["value"] if "value" in one else one["valueFrom"]
        for one in container.get("env", [])
    }
