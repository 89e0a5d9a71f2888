"""KubeRay objects: valid by KubeRay's own definitions, safe, and right for the jobs they run."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from pipelines.bench.run import ON_RAY
from pipelines.evaluate.config import EvaluateConfig
from pipelines.ingest.config import IngestConfig
from pipelines.quickstart.config import QuickstartConfig
from pipelines.sweep.config import SweepConfig
from pipelines.train.config import TrainConfig
from tests.helpers.manifests import (
    KUBERAY,
    all_jobs,
    check_definition,
    cluster_specs,
    commands_of,
    containers,
    environment,
    files_of_kind,
    load,
    number,
    parsed,
    pods,
    ray_resources,
)

FILES = files_of_kind("RayCluster", "RayJob", "RayCronJob")
JOBS = all_jobs()
OF_FILE = {"ids": lambda path: path.name}
LONGEST_NAME = 47
"""KubeRay refuses longer names of RayJobs, because names of pods are derived from them."""
IN_ORDER = ("DeleteWorkers", "DeleteCluster", "DeleteSelf")


def job(name: str) -> dict[str, Any]:
    return JOBS[f"stgt-{name}"]


def configs_of(name: str) -> list[tuple[str, Any]]:
    """Jobs and configs of the commands of a RayJob."""
    commands = commands_of(job(name)["entrypoint"])
    return [parsed(command) for command in commands if command[:2] == ["python", "-m"]]


def config_of(name: str) -> Any:
    """The config of a RayJob's last command."""
    return configs_of(name)[-1][1]


def test_there_is_a_manifest_for_every_pipeline() -> None:
    found = [name for one in JOBS for name, _ in configs_of(one.removeprefix("stgt-"))]
    assert set(found) == {
        "quickstart",
        "manifest",
        "ingest",
        "train",
        "evaluate",
        "sweep",
        "compare",
        "register",
        "import_weights",
        "bench",
    }


@pytest.mark.slow
@pytest.mark.parametrize("path", FILES, **OF_FILE)
def test_a_manifest_is_valid_by_the_definitions(path: Path, crds_dir: Path) -> None:
    for document in load(path.read_text()):
        check_definition(document, crds_dir)


@pytest.mark.slow
def test_an_unknown_field_is_refused(crds_dir: Path) -> None:
    (document,) = load((KUBERAY / "jobs" / "quickstart.yaml").read_text())
    document["spec"]["entrypiont"] = "typo"
    with pytest.raises(jsonschema.ValidationError, match="entrypiont"):
        check_definition(document, crds_dir)


@pytest.mark.parametrize("name", JOBS)
def test_the_job_accepts_the_command(name: str) -> None:
    for command in commands_of(JOBS[name]["entrypoint"]):
        if command[:2] == ["python", "-c"]:
            compile(command[2], name, "exec")
        else:
            parsed(command)


def test_a_command_that_a_job_refuses_is_noticed(capsys: pytest.CaptureFixture[str]) -> None:
    (command,) = commands_of(job("finetune")["entrypoint"])
    with pytest.raises(SystemExit):
        parsed([*command, "--num-wrokers", "4"])
    assert "--num-workers" in capsys.readouterr().err


@pytest.mark.parametrize("name", JOBS)
def test_all_locations_are_in_the_bucket_or_on_a_volume(name: str) -> None:
    pod = JOBS[name]["rayClusterSpec"]["headGroupSpec"]["template"]
    volumes = tuple(one["mountPath"] for one in containers(pod)[-1]["volumeMounts"])
    words = [word for command in commands_of(JOBS[name]["entrypoint"]) for word in command]
    found = [word for word in words if "/" in word and " " not in word]
    assert found or name == "stgt-bench"
    assert all(word.startswith(("s3://BUCKET/", *volumes)) for word in found), found


@pytest.mark.parametrize("name", ["pretrain-stage1", "pretrain-stage2", "finetune"])
def test_a_training_has_what_its_preflight_asks_for(name: str) -> None:
    config = config_of(name)
    assert isinstance(config, TrainConfig)
    offered = ray_resources(job(name)["rayClusterSpec"])
    assert offered.gpus == config.num_workers
    assert offered.cpus == config.num_cpus()


@pytest.mark.parametrize("recipe", ["didemo", "lsmdc", "msvd"])
def test_the_other_recipes_of_fine_tuning_need_the_same(recipe: str) -> None:
    (command,) = commands_of(job("finetune")["entrypoint"])
    command[command.index("finetune_msrvtt")] = f"finetune_{recipe}"
    _, config = parsed(command)
    offered = ray_resources(job("finetune")["rayClusterSpec"])
    assert (offered.cpus, offered.gpus) == (config.num_cpus(), config.num_workers)


def test_a_node_of_a_training_has_the_workers_and_data_workers_that_go_there() -> None:
    config = config_of("pretrain-stage1")
    (group,) = job("pretrain-stage1")["rayClusterSpec"]["workerGroupSpecs"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    nodes = group["replicas"]
    assert number(limits["nvidia.com/gpu"]) == config.num_workers / nodes
    workers = config.num_workers * config.threads_per_worker
    assert number(limits["cpu"]) == (workers + config.num_loaders) / nodes


def test_a_sweep_has_what_its_trials_reserve() -> None:
    config = config_of("sweep")
    assert isinstance(config, SweepConfig)
    assert config.max_concurrent_trials == 2
    offered = ray_resources(job("sweep")["rayClusterSpec"])
    assert offered.cpus == 2 * config.train.num_cpus()
    assert offered.gpus == 2 * config.train.num_workers


def test_an_evaluation_has_one_core_and_one_gpu_for_each_worker() -> None:
    config = config_of("evaluate")
    assert isinstance(config, EvaluateConfig)
    assert config.use_gpu
    offered = ray_resources(job("evaluate")["rayClusterSpec"])
    assert offered.cpus == offered.gpus == config.num_workers


@pytest.mark.parametrize("name", ["ingest", "nightly-ingest"])
def test_an_ingest_grows_from_zero_to_one_core_for_each_decoding_worker(name: str) -> None:
    config = config_of(name)
    assert isinstance(config, IngestConfig)
    spec = job(name)["rayClusterSpec"]
    assert spec["enableInTreeAutoscaling"]
    (group,) = spec["workerGroupSpecs"]
    assert group["minReplicas"] == group["replicas"] == 0
    assert ray_resources(spec).cpus == config.num_workers


def test_the_nightly_ingest_runs_what_the_ingest_runs() -> None:
    assert job("nightly-ingest")["entrypoint"] == job("ingest")["entrypoint"]
    manifest, ingest = (config for _, config in configs_of("ingest"))
    assert manifest.output == ingest.manifest


def test_the_quickstart_has_one_core_for_each_cpu_that_it_uses() -> None:
    config = config_of("quickstart")
    assert isinstance(config, QuickstartConfig)
    spec = job("quickstart")["rayClusterSpec"]
    limits = spec["headGroupSpec"]["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert ray_resources(spec).cpus == number(limits["cpu"]) == 4
    assert config.num_workers < 4


@pytest.mark.parametrize("name", ["bench", "register", "import-weights"])
def test_a_job_that_runs_without_ray_offers_it_nothing(name: str) -> None:
    offered = ray_resources(job(name)["rayClusterSpec"])
    assert offered.cpus == offered.gpus == 0
    benches = [config for one, config in configs_of(name) if one == "bench"]
    assert all(not ON_RAY & set(config.names) for config in benches)


def test_the_cluster_that_stays_is_large_enough_for_each_job() -> None:
    (stays,) = load((KUBERAY / "base" / "raycluster.yaml").read_text())
    groups = {one["groupName"]: one for one in stays["spec"]["workerGroupSpecs"]}
    for name in ("ingest", "pretrain-stage1", "finetune"):
        for group in job(name)["rayClusterSpec"]["workerGroupSpecs"]:
            there = groups[group["groupName"]]
            assert there["maxReplicas"] >= group["maxReplicas"]
            limits, wanted = (
                one["template"]["spec"]["containers"][0]["resources"]["limits"]
                for one in (there, group)
            )
            assert limits == wanted
    assert all(group["minReplicas"] == group["replicas"] == 0 for group in groups.values())


@pytest.mark.parametrize("name", JOBS)
def test_a_job_ends_and_leaves_nothing_behind(name: str) -> None:
    spec = JOBS[name]
    assert spec["activeDeadlineSeconds"] > 0
    assert spec["backoffLimit"] >= 0
    assert not spec.get("shutdownAfterJobFinishes")  # which excludes rules
    rules: dict[str, dict[str, int]] = {}
    for rule in spec["deletionStrategy"]["deletionRules"]:
        condition = dict(rule["condition"])
        wait_s = condition.pop("ttlSeconds")
        ((status, value),) = condition.items()
        assert rule["policy"] not in rules.setdefault(f"{status}={value}", {})
        rules[f"{status}={value}"][rule["policy"]] = wait_s
    assert rules.keys() == {"jobStatus=SUCCEEDED", "jobStatus=FAILED", "jobDeploymentStatus=Failed"}
    for policies in rules.values():
        assert "DeleteCluster" in policies
        waits = [policies[policy] for policy in IN_ORDER if policy in policies]
        assert waits == sorted(waits)


@pytest.mark.parametrize("path", FILES, **OF_FILE)
def test_the_operator_accepts_what_the_definitions_do_not_check(path: Path) -> None:
    documents = load(path.read_text())
    for document in documents:
        name = document["metadata"]["name"]
        assert len(name) <= LONGEST_NAME
        assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name)
    for spec in cluster_specs(documents).values():
        grows = spec.get("enableInTreeAutoscaling", False)
        for group in spec.get("workerGroupSpecs", []):
            assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
            assert grows or group["minReplicas"] == group["maxReplicas"]
            assert "restartPolicy" not in group["template"]["spec"]
        if grows:
            assert spec["autoscalerOptions"]["version"] == "v2"
            assert "restartPolicy" not in spec["headGroupSpec"]["template"]["spec"]


@pytest.mark.parametrize("path", FILES, **OF_FILE)
def test_a_cluster_wants_a_token_and_shows_its_dashboard_to_nobody(path: Path) -> None:
    specs = cluster_specs(load(path.read_text()))
    assert specs
    for spec in specs.values():
        assert spec["authOptions"] == {"mode": "token", "secretName": "stgt-ray-token"}
        head = spec["headGroupSpec"]
        assert head["serviceType"] == "ClusterIP"
        assert not head.get("enableIngress")
        ports = {
            one["name"]: one["containerPort"] for one in containers(head["template"])[-1]["ports"]
        }
        assert ports == {"gcs-server": 6379, "dashboard": 8265, "client": 10001, "metrics": 8080}


@pytest.mark.parametrize("path", FILES, **OF_FILE)
def test_stopping_leaves_time_for_a_checkpoint(path: Path) -> None:
    for spec in cluster_specs(load(path.read_text())).values():
        head = spec["headGroupSpec"]["template"]
        assert environment(containers(head)[-1])["RAY_JOB_STOP_WAIT_TIME_S"] == "120"
        trains = [
            (group["template"], "workers")
            for group in spec.get("workerGroupSpecs", [])
            if group["groupName"] == "gpu"
        ]
        for pod, what in [(head, "drivers"), *trains]:
            hook = containers(pod)[-1]["lifecycle"]["preStop"]["exec"]["command"]
            assert hook == ["/opt/stgt/pre_stop.sh", what]
            # 105 s for the hook itself.
            assert pod["spec"]["terminationGracePeriodSeconds"] >= 115


@pytest.mark.parametrize("path", FILES, **OF_FILE)
def test_the_object_store_fits_into_shared_memory_and_memory(path: Path) -> None:
    for spec in cluster_specs(load(path.read_text())).values():
        for group in [spec["headGroupSpec"], *spec.get("workerGroupSpecs", [])]:
            pod = group["template"]
            (memory,) = (
                one["emptyDir"] for one in pod["spec"]["volumes"] if one["name"] == "shared-memory"
            )
            assert memory["medium"] == "Memory"
            size = number(memory["sizeLimit"])
            store = int(group["rayStartParams"]["object-store-memory"])
            assert 0.9 * size <= store <= 0.95 * size
            assert size < number(containers(pod)[-1]["resources"]["limits"]["memory"]) / 2


def test_every_ray_pod_is_found_by_the_network_policy() -> None:
    for path in FILES:
        for name, pod in pods(load(path.read_text())):
            labels = pod["metadata"]["labels"]
            assert labels["app.kubernetes.io/part-of"] == "stgt", name
            assert labels["app.kubernetes.io/component"] in (
                "head",
                "submitter",
                "cpu-worker",
                "gpu-worker",
            ), name


def test_pods_that_do_not_talk_to_kubernetes_have_no_token_for_it() -> None:
    for path in FILES:
        documents = load(path.read_text())
        grows = {
            f"{name}/head"
            for name, spec in cluster_specs(documents).items()
            if spec.get("enableInTreeAutoscaling")
        }
        for name, pod in pods(documents):
            assert pod["spec"].get("automountServiceAccountToken", True) is (name in grows), name


def test_all_manifests_are_listed_for_overlays_that_change_each_of_them() -> None:
    (listed,) = load((KUBERAY / "jobs" / "kustomization.yaml").read_text())
    there = {path.name for path in (KUBERAY / "jobs").glob("*.yaml")} - {"kustomization.yaml"}
    assert set(listed["resources"]) == there


def test_the_two_stages_of_pre_training_differ_in_stage_and_start_alone() -> None:
    first, second = copy.deepcopy(job("pretrain-stage1")), copy.deepcopy(job("pretrain-stage2"))
    entrypoints = first.pop("entrypoint"), second.pop("entrypoint")
    assert first == second
    configs = [config_of("pretrain-stage1"), config_of("pretrain-stage2")]
    assert configs[1].init_from == configs[0].output
    assert entrypoints[0] != entrypoints[1]
