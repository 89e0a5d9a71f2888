"""Images: linted, without secrets, built in an order that caches, and with what pods call."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.data import PROJECT
from tests.helpers.manifests import CLUSTER, KUBERAY

DOCKERFILES = sorted(CLUSTER.rglob("Dockerfile"))
OF_FOLDER = {"ids": lambda path: path.parent.name}
SECRET = re.compile(r"(?i)passw|secret|token|credential|access_key|://[^/\s]*@")


def program(name: str) -> str:
    """A program of the tests' virtual environment."""
    path = Path(sys.executable).parent / name
    if not path.exists():
        pytest.skip(f"{name} is not here; it comes with the extra `test`")
    return str(path)


def instructions(path: Path) -> list[tuple[str, str]]:
    """Instructions of a Dockerfile with their arguments, without comments."""
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    text = "\n".join(lines).replace("\\\n", " ")
    return [
        (word, rest) for word, _, rest in (line.partition(" ") for line in text.split("\n") if line)
    ]


def copied(path: Path) -> list[str]:
    """Files and folders of the project that a Dockerfile copies."""
    found = []
    for word, rest in instructions(path):
        if word == "COPY" and "--from=" not in rest:
            found += [one for one in rest.split()[:-1] if not one.startswith("--")]
    return found


@pytest.mark.parametrize("path", DOCKERFILES, **OF_FOLDER)
def test_the_linter_has_no_complaint(path: Path) -> None:
    done = subprocess.run(
        [program("hadolint"), "--no-color", str(path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_linter_notices_a_mistake(tmp_path: Path) -> None:
    path = tmp_path / "Dockerfile"
    path.write_text("FROM python:latest\nRUN cd /tmp && sudo true\n")
    done = subprocess.run(
        [program("hadolint"), "--no-color", str(path)], capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "DL3007" in done.stdout


@pytest.mark.parametrize("path", DOCKERFILES, **OF_FOLDER)
def test_a_build_sees_the_files_that_it_copies_and_no_others(path: Path) -> None:
    sources = copied(path)
    assert sources
    assert all((PROJECT / source).exists() for source in sources)
    ignored = path.with_name("Dockerfile.dockerignore").read_text().splitlines()
    rules = [line for line in ignored if line and not line.startswith("#")]
    assert rules[0] == "*"
    allowed = [line[1:] for line in rules if line.startswith("!")]
    assert sorted(allowed) == sorted(sources)


@pytest.mark.parametrize("path", DOCKERFILES, **OF_FOLDER)
def test_an_image_holds_no_secret_and_does_not_run_as_root(path: Path) -> None:
    found = instructions(path)
    for word, rest in found:
        if word in ("ARG", "ENV"):
            # The accounts' rules name no password; the variable is a path.
            assert not SECRET.search(rest.replace("MLFLOW_AUTH_CONFIG_PATH", "")), rest
    users = [rest for word, rest in found if word == "USER"]
    assert users
    assert users[-1] not in ("root", "0", "0:0")


def test_a_change_of_the_sources_installs_no_dependency_again() -> None:
    found = instructions(CLUSTER / "Dockerfile")
    installs = [number for number, (_, rest) in enumerate(found) if "constraints.txt . $" in rest]
    sources = [
        number for number, (word, rest) in enumerate(found) if (word, rest) == ("COPY", "stgt stgt")
    ]
    assert len(installs) == len(sources) == 1
    assert installs[0] < sources[0]
    # Only these, so that a change of another file does not either.
    before = [rest for word, rest in found[: installs[0]] if word == "COPY"]
    assert before == ["pyproject.toml constraints.txt ./"]
    assert any("--no-deps" in rest for _, rest in found[sources[0] :])


def test_versions_agree_between_the_image_the_project_and_ray() -> None:
    import importlib.metadata

    project = re.search(r'^version = "(.*)"', (PROJECT / "pyproject.toml").read_text(), re.M)
    ray = importlib.metadata.version("ray")
    assert project is not None
    for path in sorted(KUBERAY.rglob("*.yaml")):
        text = path.read_text()
        images = set(re.findall(r"image: (stgt-\w+:\S+)", text))
        assert images <= {f"stgt-ray:{project[1]}", f"stgt-mlflow:{project[1]}"}, path
        assert set(re.findall(r'rayVersion: "(.*)"', text)) <= {ray}, path


def test_the_image_has_the_user_and_the_programs_that_pods_and_launchers_use() -> None:
    text = (CLUSTER / "Dockerfile").read_text()
    assert "useradd --create-home --uid 1000" in text
    assert re.search(r"^USER 1000:1000$", text, re.M)
    assert "cluster/pre_stop.sh /opt/stgt/pre_stop.sh" in text
    for package in ("procps", "wget", "openssh-client", "rsync"):
        assert package in text
