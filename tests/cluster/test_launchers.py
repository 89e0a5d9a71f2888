"""Files of Ray's cluster launcher and of Docker Compose: valid, and without exposed dashboards."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from pipelines.train.recipes import RECIPES
from tests.helpers.manifests import CLUSTER, cluster_specs, files_of_kind, load

LAUNCHERS = sorted(CLUSTER.glob("*/cluster.yaml"))
COMPOSE_FILES = sorted(CLUSTER.glob("*/compose.yaml"))
OF_FOLDER = {"ids": lambda path: path.parent.name}


def launcher(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())


def test_there_are_files_for_two_clouds() -> None:
    assert [path.parent.name for path in LAUNCHERS] == ["aws", "gcp"]
    assert [path.parent.name for path in COMPOSE_FILES] == ["local", "mlflow"]


@pytest.mark.parametrize("path", LAUNCHERS, **OF_FOLDER)
def test_a_launcher_file_is_valid_by_rays_schema(path: Path) -> None:
    validate_config(prepare_config(launcher(path)))


def test_an_unknown_setting_of_the_launcher_is_noticed() -> None:
    config = prepare_config(launcher(LAUNCHERS[0]))
    config["available_node_types"]["gpu"]["min_wrokers"] = 0
    with pytest.raises(jsonschema.ValidationError, match="min_wrokers"):
        validate_config(config)


@pytest.mark.parametrize("path", LAUNCHERS, **OF_FOLDER)
def test_workers_come_on_request_and_only_those_that_decode_are_spot(path: Path) -> None:
    config = launcher(path)
    types = config["available_node_types"]
    assert config["head_node_type"] == "head"
    assert types.keys() == {"head", "cpu_spot", "gpu"}
    spot = {
        name
        for name, one in types.items()
        if one["node_config"].get("InstanceMarketOptions", {}).get("MarketType") == "spot"
        or any(
            entry.get("provisioningModel") == "SPOT"
            for entry in one["node_config"].get("scheduling", [])
        )
    }
    assert spot == {"cpu_spot"}
    workers = [one for name, one in types.items() if name != "head"]
    assert all(one["min_workers"] == 0 for one in workers)
    assert config["max_workers"] == sum(one["max_workers"] for one in workers)


@pytest.mark.parametrize("path", LAUNCHERS, **OF_FOLDER)
@pytest.mark.parametrize("recipe", ["pretrain_stage1", "finetune_msrvtt"])
def test_the_machines_are_enough_for_the_recipes(path: Path, recipe: str) -> None:
    config = RECIPES[recipe](("CLIPS",), "RUN", "MODEL")
    types = launcher(path)["available_node_types"]
    gpu, head = types["gpu"], types["head"]["resources"]
    nodes = config.num_workers // gpu["resources"]["GPU"]
    assert nodes * gpu["resources"]["GPU"] == config.num_workers
    assert nodes <= gpu["max_workers"]
    assert nodes * gpu["resources"]["CPU"] + head["CPU"] >= config.num_cpus()


@pytest.mark.parametrize("path", LAUNCHERS, **OF_FOLDER)
def test_a_cluster_of_the_launcher_wants_a_token_and_shows_its_dashboard_to_nobody(
    path: Path,
) -> None:
    config = launcher(path)
    options = config["docker"]["run_options"]
    assert "--env RAY_AUTH_MODE=token" in options
    assert "--env RAY_JOB_STOP_WAIT_TIME_S=120" in options
    (env_file,) = (one.split()[1] for one in options if one.startswith("--env-file"))
    fetch = config["initialization_commands"][0]
    # Readable by its owner alone, and written by the machine's role: no secret is in this file.
    assert fetch.startswith("umask 077 && ")
    assert fetch.endswith(f"> {env_file}")
    head = " ".join(config["head_start_ray_commands"])
    assert "--dashboard-host=127.0.0.1" in head
    port = head.partition("--port=")[2].split()[0]
    assert f"--address=$RAY_HEAD_IP:{port}" in " ".join(config["worker_start_ray_commands"])
    assert f"--num-cpus={config['available_node_types']['head']['resources']['CPU']}" in head


def test_machines_on_aws_are_in_a_group_of_the_users() -> None:
    # Ray's own group would let everyone in by SSH.
    config = launcher(CLUSTER / "aws" / "cluster.yaml")
    groups = {
        tuple(one["node_config"]["SecurityGroupIds"])
        for one in config["available_node_types"].values()
    }
    assert groups == {("sg-GROUP",)}
    assert "security_group" not in config["provider"]


@pytest.mark.parametrize("path", LAUNCHERS, **OF_FOLDER)
def test_ray_adds_no_commands_of_its_own(path: Path) -> None:
    filled_in = prepare_config(launcher(path))
    validate_config(filled_in)
    for name in ("setup_commands", "head_setup_commands", "worker_setup_commands"):
        assert filled_in[name] == []
    assert filled_in["initialization_commands"] == launcher(path)["initialization_commands"]


def test_machines_on_aws_have_roles_instead_of_keys() -> None:
    types = launcher(CLUSTER / "aws" / "cluster.yaml")["available_node_types"]
    roles = {name: one["node_config"]["IamInstanceProfile"]["Arn"] for name, one in types.items()}
    # Only the head may start machines.
    assert roles["head"] not in (roles["cpu_spot"], roles["gpu"])
    for one in types.values():
        assert one["node_config"]["MetadataOptions"]["HttpTokens"] == "required"


@pytest.mark.skipif(
    importlib.util.find_spec("check_jsonschema") is None,
    reason="check-jsonschema is not here; it comes with the extra `test` from Python 3.11 on",
)
def test_compose_files_are_valid_by_the_specification(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("services:\n  head:\n    imgae: stgt-ray:0.1.0\n")
    check = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    good = subprocess.run(
        [*check, *map(str, COMPOSE_FILES)], capture_output=True, text=True, check=False
    )
    assert good.returncode == 0, good.stdout + good.stderr
    bad = subprocess.run([*check, str(wrong)], capture_output=True, text=True, check=False)
    assert bad.returncode != 0
    assert "imgae" in bad.stdout


def test_the_cluster_on_one_machine_is_reached_on_loopback_and_has_few_rights() -> None:
    compose = yaml.safe_load((CLUSTER / "local" / "compose.yaml").read_text())
    services = compose["services"]
    assert services.keys() == {"head", "worker", "mlflow"}
    ports = [port for one in services.values() for port in one.get("ports", [])]
    assert sorted(ports) == ["127.0.0.1:5000:5000", "127.0.0.1:8265:8265"]
    for name, one in services.items():
        assert one["read_only"] is True, name
        assert one["cap_drop"] == ["ALL"], name
        assert one["security_opt"] == ["no-new-privileges:true"], name
        for volume in one["volumes"]:
            assert volume.partition(":")[0] in compose["volumes"], name
    for name in ("head", "worker"):
        variables = services[name]["environment"]
        assert variables["RAY_AUTH_MODE"] == "token"
        assert variables["RAY_AUTH_TOKEN"].startswith("${RAY_AUTH_TOKEN:?")
        assert variables["MLFLOW_TRACKING_URI"] == "http://mlflow:5000"
        # Compose kills what has not ended after this time.
        wait_s = int(variables["RAY_JOB_STOP_WAIT_TIME_S"])
        assert int(services[name]["stop_grace_period"].removesuffix("s")) > wait_s


def test_builds_of_compose_files_have_the_files_they_name() -> None:
    for path in COMPOSE_FILES:
        services = yaml.safe_load(path.read_text())["services"]
        for name, one in services.items():
            if "build" in one:
                context = (path.parent / one["build"]["context"]).resolve()
                assert (context / one["build"]["dockerfile"]).is_file(), f"{path}: {name}"


@pytest.mark.filterwarnings("ignore")  # of Ray Serve, which Ray's command line imports
def test_options_of_ray_start_exist() -> None:
    from ray.scripts.scripts import start

    known = {option for parameter in start.params for option in parameter.opts}
    texts = [path.read_text() for path in (*LAUNCHERS, *COMPOSE_FILES)]
    texts.append((CLUSTER / "slurm" / "stgt.sbatch").read_text())
    used = set()
    for text in texts:
        for command in re.findall(r"(?:ray start|^start) ((?:[^\n]|\\\n|\n\s+--)*)", text, re.M):
            used |= set(re.findall(r"(?<!\S)--[a-z-]+", command))
    # KubeRay hands its parameters to `ray start` under the same names.
    for path in files_of_kind("RayCluster", "RayJob", "RayCronJob"):
        for spec in cluster_specs(load(path.read_text())).values():
            for group in [spec["headGroupSpec"], *spec.get("workerGroupSpecs", [])]:
                used |= {f"--{name}" for name in group["rayStartParams"]}
    assert used <= known, used - known
    assert {"--head", "--address", "--dashboard-host", "--object-store-memory"} <= used
