"""Reads the imports of the project and lists those that break its rules."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter

ROOMS: dict[str, set[str]] = {
    "common": set(),
    "video": {"common"},
    "artifacts": {"common", "video"},
    "compare": {"common", "artifacts"},
    "manifest": {"common", "video", "artifacts"},
    "fetch": {"common", "artifacts", "manifest"},
    "feed": {"common", "video", "artifacts"},
    "ingest": {"common", "video", "artifacts"},
    "train": {"common", "artifacts", "feed"},
    "caption": {"common", "artifacts", "feed"},
    "evaluate": {"common", "artifacts", "feed"},
    "sweep": {"common", "artifacts", "train"},
    "export": {"common", "video", "artifacts"},
    "registry": {"common", "artifacts", "video", "compare"},
    "submit": {"common"},
    "estimate": {"common", "video", "train"},
}
"""Packages below `pipelines`, and which of the others each of them may import."""
FREE_ROOMS = {"quickstart", "bench"}
"""Packages that may import all of those above; `bench` may import `quickstart` as well."""
INNER_ROOMS: dict[str, tuple[set[str], set[str]]] = {
    "video.synthetic": ({"common"}, {"quickstart", "bench", "estimate"}),
    "feed.features": ({"feed", "common", "artifacts"}, {"bench"}),
    "export.weights": ({"common", "artifacts"}, set()),
    "manifest.formats": ({"common", "artifacts"}, {"manifest", "fetch"}),
    "manifest.cutting": ({"manifest", "common", "video", "artifacts"}, {"manifest", "bench"}),
    "evaluate.question_answering": ({"common", "artifacts", "feed"}, {"evaluate"}),
}
"""Packages inside those packages: what they may import of `pipelines`, and who may import them."""
DOORS = {
    "mlflow": {
        "pipelines/common/tracking.py": "runs of all stages",
        "pipelines/common/run_details.py": "data sets, versions and lineage of a run",
        "pipelines/common/logged_checkpoints.py": "checkpoints of a run",
        "pipelines/common/system_metrics.py": "MLflow's monitors of the hardware",
        "pipelines/registry/versions.py": "registered models, another part of MLflow than runs",
        "pipelines/registry/packaging.py": "writes a model's folder, whose format is MLflow's",
        "pipelines/registry/pyfunc_model.py": "is run by MLflow, to load a registered model",
    },
    "fsspec": {"pipelines/common/storage.py": "all access to files"},
    "s3fs": {"pipelines/common/storage.py": "all access to files"},
    "ray.util.metrics": {"pipelines/common/metrics.py": "names and labels of all exported metrics"},
}
"""Libraries and modules that only some files may import, each with the reason why it does."""
STARTS_RAY = ("jobs/entry.py", "jobs/joining.py")
"""The files that start Ray or join a cluster."""
FORBIDDEN_IN_STGT = {"ray", "mlflow", "fsspec", "s3fs", "os", "pipelines", "jobs", "tests"}
MOST_PACKAGES = 20

Sources = Mapping[str, str]
"""Python files: path relative to the project -> source text."""


def module_of(path: str) -> str:
    """The dotted name of a file."""
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def imports(path: str, sources: Sources) -> Iterator[tuple[str, int]]:
    """Every module that a file imports, TYPE_CHECKING and local imports included, with its line."""
    known = {module_of(other) for other in sources} | DOORS.keys()
    for node in _walked(sources[path]):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            yield str(node.args[0].value), node.lineno
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                yield f"{'.' * node.level}{node.module or ''}", node.lineno
                continue
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if name in known else str(node.module), node.lineno


@functools.cache
def _walked(source: str) -> list[ast.AST]:
    """The import statements of a file; cached, since tests read the same files many times."""
    return [node for node in ast.walk(ast.parse(source)) if _is_import(node)]


def _is_import(node: ast.AST) -> bool:
    if isinstance(node, ast.Call):
        called = getattr(node.func, "attr", getattr(node.func, "id", None))
        return called in ("import_module", "__import__")
    return isinstance(node, ast.Import | ast.ImportFrom)


def package_of(module: str) -> str:
    """`pipelines.ROOM`, `stgt` or `jobs`."""
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == "pipelines" else parts[0]


def is_within(name: str, module: str) -> bool:
    """Whether a dotted name is that of a module or of something in it."""
    return name == module or name.startswith(f"{module}.")


def _wrong(path: str, name: str) -> str | None:
    """The rule that a file breaks by importing a module; None when it breaks none."""
    own, theirs, root = package_of(module_of(path)), package_of(name), name.split(".")[0]
    if name.startswith("."):
        return "imports are absolute"
    if path.startswith("stgt/") and root in FORBIDDEN_IN_STGT:
        return f"stgt must not import {root}"
    for library, files in DOORS.items():
        if is_within(name, library) and path not in files:
            return f"only {', '.join(files)} may import {library}"
    if root == "tests" or (root == "jobs" and own != "jobs"):
        return f"{own} must not import {root}"
    if own == "pipelines.common" and root == "stgt" and name != "stgt.errors":
        return "pipelines.common may import stgt.errors alone"
    if (rule := _wrong_inside(path, name)) is not None:
        return rule
    if not own.startswith("pipelines.") or not theirs.startswith("pipelines.") or own == theirs:
        return None
    room, other = own.split(".")[1], theirs.split(".")[1]
    if room in FREE_ROOMS:
        return None if other in ROOMS or room == "bench" else f"{own} must not import {theirs}"
    if other not in ROOMS.get(room, set()):
        return f"{own} must not import {theirs}"
    return None


def _wrong_inside(path: str, name: str) -> str | None:
    """The rule of a package inside a package that an import breaks; None when it breaks none."""
    own, theirs = module_of(path), package_of(name)
    for inner, (imported, importers) in INNER_ROOMS.items():
        package = f"pipelines.{inner}"
        if is_within(own, package) == is_within(name, package):
            continue
        if is_within(own, package):
            if theirs.startswith("pipelines.") and theirs.split(".")[1] not in imported:
                return f"{package} must not import {name}"
        elif own.startswith("pipelines.") and own.split(".")[1] not in importers:
            return f"{package_of(own)} must not import {package}"
    return None


def modules_imported_from_tests(sources: Sources) -> list[str]:
    """Every import of a test module or conftest by a file below `tests`.

    What several of them need belongs into a fixture or into `tests/helpers`: a test module that
    imports another runs its tests twice, or depends on the order in which they are collected.
    """
    found = []
    for path in sorted(sources):
        for name, line in imports(path, sources):
            last = name.rpartition(".")[2]
            if name.startswith(("tests", ".")) and (last.startswith("test_") or last == "conftest"):
                found.append(f"{path}:{line} imports {name}: test modules import no other")
    return found


def _circles(sources: Sources) -> Iterator[str]:
    modules = {module_of(path) for path in sources}
    graph = {
        module_of(path): {name for name, _ in imports(path, sources)} & modules - {module_of(path)}
        for path in sources
    }
    while True:
        try:
            TopologicalSorter(graph).prepare()
        except CycleError as error:
            circle = error.args[1]
            yield f"import cycle: {' -> '.join(reversed(circle))}"
            graph[circle[1]] = graph[circle[1]] - {circle[0]}
        else:
            return


def _own_rules(path: str, source: str) -> Iterator[str]:
    """Rules about what a file itself holds."""
    if path.startswith("pipelines/") and path.count("/") >= 2 and path.endswith("/run.py"):
        public = [
            node.name
            for node in ast.parse(source).body
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            and not node.name.startswith("_")
        ]
        if len(public) != 1 or not public[0].startswith("run_"):
            yield f"{path}: one public function run_* is expected, found {public}"
    if path == "pipelines/__init__.py" and list(imports(path, {path: source})):
        yield f"{path}: imports nothing"
    if path not in STARTS_RAY and re.search(
        r"ray\.init\(|import ray as|from ray import .*init", source
    ):
        yield f"{path}: only {' and '.join(STARTS_RAY)} start Ray"
    if path.startswith("pipelines/") and path.count("/") >= 2:
        room = path.split("/")[1]
        if room not in ROOMS and room not in FREE_ROOMS:
            yield f"{path}: the package pipelines.{room} has no rule"
        inner = ".".join(path.split("/")[1:-1])
        if path.count("/") > 2 and inner not in INNER_ROOMS:
            yield f"{path}: the package pipelines.{inner} has no rule"
    if path.startswith("pipelines/") and path.count("/") >= 2 and path.endswith("/__init__.py"):
        doc = ast.get_docstring(ast.parse(source)) or ""
        if doc.count(".") < 2:
            yield f"{path}: two or three sentences are expected on what goes in and out"


def violations(sources: Sources) -> list[str]:
    """Every broken rule, each with its file and line."""
    found = []
    for path in sorted(sources):
        found += _own_rules(path, sources[path])
        for name, line in imports(path, sources):
            if rule := _wrong(path, name):
                found.append(f"{path}:{line} imports {name}: {rule}")
    packages = {package_of(module_of(path)) for path in sources} - {"pipelines"}
    if len(packages) > MOST_PACKAGES:
        found.append(f"{len(packages)} packages, more than {MOST_PACKAGES}")
    return found + list(_circles(sources))
