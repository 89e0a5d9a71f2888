"""Tells MLflow where a run comes from: its source, data sets and lineage, and its description.

One of the modules that import mlflow. `tracking.Run` calls it; stages say what they know with
`provenance.About`.
"""

from __future__ import annotations

import json
import logging
import os
from typing import TYPE_CHECKING

from pipelines.common import provenance
from pipelines.common.config import without_credentials
from pipelines.common.provenance import About, DatasetInput

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment, LoggedModel
    from mlflow.entities import Run as MlflowRun

logger = logging.getLogger(__name__)

EXPERIMENT_KIND = "mlflow.experimentKind"
MODEL_TRAINING = "custom_model_development"
"""Kind of an experiment that MLflow's pages show as one of model training."""
GUESSED_KINDS = frozenset({"genai_development_inferred", "no_inferred_type"})
"""Kinds that MLflow's pages guess for an experiment that has none; nobody chose them."""
CHECKPOINT_TAG = "checkpoint_uri"
"""Tag of a logged model that names its checkpoint."""
LINEAGE_TAG = "lineage"
DIGEST_CHARACTERS = 12
"""Length of a data set's digest in MLflow, for its pages. The whole digest is in its profile."""
MODELS_READ = 100
UNKNOWN_RUN = frozenset({"RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE", "PERMISSION_DENIED"})
"""Answers for a run that was deleted, or that this user may not see."""


def mark_as_training(client: MlflowClient, experiment: Experiment) -> None:
    """Say that an experiment is about model training, unless somebody chose its kind.

    MLflow's pages otherwise open it among tools for language-model applications.
    """
    from mlflow.exceptions import MlflowException

    kind = experiment.tags.get(EXPERIMENT_KIND)
    if kind is not None and kind not in GUESSED_KINDS:
        return
    try:
        client.set_experiment_tag(experiment.experiment_id, EXPERIMENT_KIND, MODEL_TRAINING)
    except MlflowException as error:
        if error.error_code != "PERMISSION_DENIED":
            raise
        # Somebody else owns the experiment, and runs can be recorded there all the same.
        logger.info("the experiment %s stays without a kind: %s", experiment.name, error.message)


def source_tags(about: About, command: str) -> dict[str, str]:
    """Return the tags that say how, by whom, with which code and on which machine a run is made.

    Args:
        about: The run.
        command: Its command line, without credentials.
    """
    tags = {
        # Of all types, only the pages' column of a job shows the whole name.
        "mlflow.source.type": "JOB",
        "mlflow.source.name": command,
        "mlflow.user": provenance.user(),
        "job": about.job,
        "source.directory": os.getcwd(),
        **{f"versions.{name}": value for name, value in provenance.versions().items()},
        **{f"hardware.{name}": value for name, value in provenance.hardware().items()},
        **{f"fingerprint.{name}": value for name, value in about.fingerprints.items()},
    }
    if about.recipe:
        tags["recipe"] = about.recipe
    if commit := provenance.commit():
        tags["mlflow.source.git.commit"] = commit.sha
        tags["mlflow.source.git.dirty"] = str(commit.is_dirty).lower()
        if commit.branch is not None:
            tags["mlflow.source.git.branch"] = commit.branch
        tags["git.dirty"] = "yes" if commit.is_dirty else "no"
    return tags


def log_datasets(client: MlflowClient, run_id: str, datasets: tuple[DatasetInput, ...]) -> None:
    """Enter data sets as inputs of a run; those that it has already are not entered again."""
    from mlflow.entities import Dataset, InputTag
    from mlflow.entities import DatasetInput as Entry

    entries, names = [], set()
    for one in datasets:
        name = name_of(one)
        if name in names:  # MLflow enters a data set of one name and digest once per run
            name = f"{name} ({one.context})"
        names.add(name)
        profile = {"kind": one.kind, "digest": one.digest}
        if one.clips is not None:
            profile["num_rows"] = one.clips  # type: ignore[assignment]  # the pages show it
        entry = Dataset(
            name=name,
            digest=one.digest[:DIGEST_CHARACTERS],
            source_type="s3" if one.uri.startswith("s3://") else "local",
            source=json.dumps({"uri": without_credentials(one.uri)}),
            profile=json.dumps(profile),
        )
        entries.append(Entry(entry, [InputTag("mlflow.data.context", one.context)]))
    if entries:
        client.log_inputs(run_id, datasets=entries)


def name_of(dataset: DatasetInput) -> str:
    """Return a short name of a data set: the end of its URI."""
    return "/".join(without_credentials(dataset.uri).rstrip("/").rsplit("/", 2)[-2:])


def origin_run(client: MlflowClient, uri: str, about: About) -> MlflowRun | None:
    """Return the run that trained the checkpoint a run begins with; None if MLflow has it not.

    Args:
        client: Client of the run's MLflow.
        uri: Its tracking URI, without credentials.
        about: The run that begins with the checkpoint or evaluates it.
    """
    from mlflow.exceptions import MlflowException

    origin = about.origin
    if origin is None or origin.run_id is None or origin.tracking_uri != uri:
        return None
    try:
        return client.get_run(origin.run_id)
    except MlflowException as error:
        if error.error_code in UNKNOWN_RUN:
            return None
        raise


def lineage_tags(about: About, name: str, before: MlflowRun | None) -> dict[str, str]:
    """Return the tags that say what a model went through, up to this run.

    Args:
        about: The run.
        name: Its name.
        before: The run that trained the checkpoint it begins with, if MLflow has it.
    """
    if about.step is None:
        return {}
    steps = [f"{about.step} as {name}"]
    tags = {}
    if about.origin is not None:
        tags["lineage.checkpoint"] = without_credentials(about.origin.uri)
        if about.origin.run_id is not None:
            tags["lineage.run"] = about.origin.run_id
        earlier = f"checkpoint {tags['lineage.checkpoint']}"
        if before is not None:
            earlier = before.data.tags.get(LINEAGE_TAG, f"run {before.info.run_name}")
        steps.insert(0, earlier)
    return {**tags, LINEAGE_TAG: " -> ".join(steps)}


def find_model(client: MlflowClient, run: MlflowRun, checkpoint: str) -> LoggedModel | None:
    """Return the logged model of a run that stands for a checkpoint; None if there is none."""
    models = client.search_logged_models(
        [run.info.experiment_id],
        f"source_run_id = '{run.info.run_id}'",
        max_results=MODELS_READ,
    )
    found = [model for model in models if model.tags.get(CHECKPOINT_TAG) == checkpoint]
    return found[0] if found else None


def link_to_model(
    client: MlflowClient, run_id: str, before: MlflowRun, checkpoint: str
) -> str | None:
    """Enter the logged model of a checkpoint as an input of a run.

    Returns:
        The id of the model; None if the checkpoint has none.
    """
    from mlflow.entities import LoggedModelInput

    model = find_model(client, before, checkpoint)
    if model is None:
        return None
    client.log_inputs(run_id, models=[LoggedModelInput(model.model_id)])
    return model.model_id


def page_of(experiment_id: str, run_id: str) -> str:
    """Return the end of the address of a run's page, which shows it as one of model training."""
    return f"#/experiments/{experiment_id}/runs/{run_id}?workflowType=machine_learning"


def description_end(about: About, tags: dict[str, str], before: MlflowRun | None) -> str:
    """Return the end of a run's description: lineage, command line, code and data.

    Args:
        about: The run.
        tags: Its tags, as `source_tags` and `lineage_tags` return them.
        before: The run that trained the checkpoint it begins with, if MLflow has it.
    """
    parts = []
    if LINEAGE_TAG in tags and about.origin is not None:
        where = f"`{tags['lineage.checkpoint']}`"
        if before is not None:
            place = page_of(before.info.experiment_id, before.info.run_id)
            where += f" of the run [{before.info.run_name}]({place})"
        verb = "Evaluated checkpoint" if about.step == "evaluated" else "Initial weights"
        parts.append(f"**{verb}**: {where}")
        parts.append(f"**Lineage**: {tags[LINEAGE_TAG]}")
    for one in about.datasets:
        number = "" if one.clips is None else f", {one.clips:,} clips"
        uri = without_credentials(one.uri)
        parts.append(f"**Data, {one.context}**: {one.kind} `{uri}`{number}, digest {one.digest}")
    parts.append(
        f"**Command**: `{tags['mlflow.source.name']}` in the folder `{tags['source.directory']}`"
    )
    if "mlflow.source.git.commit" in tags:
        dirty = ", with changes that were not committed" if tags["git.dirty"] == "yes" else ""
        parts.append(f"**Code**: commit {tags['mlflow.source.git.commit']}{dirty}")
    return "\n\n".join(parts)
