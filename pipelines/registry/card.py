"""The model card of a registered version, in Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from pipelines.artifacts import checkpoints
from pipelines.compare.evaluations import EvaluationResult
from pipelines.registry.inference import InferenceSettings
from pipelines.registry.lineage import Lineage
from pipelines.registry.weights import Weights, are_referred_to

SHOWN = ("R1", "R5", "R10", "MdR")
KINDS = {"": "reranked", "sim/": "cosine only"}
DIRECTIONS = {"t2v": "text to video", "v2t": "video to text"}
LICENSE_NOTE = (
    "The license of the weights was not stated at registration. The code is under the MIT license, "
    "but weights may also be subject to the terms of the data that they were trained on and of the "
    "weights that training began with. Check both, as listed above, before you pass them on."
)


def model_card(
    name: str,
    lineage: Lineage,
    weights: Weights,
    settings: InferenceSettings,
    evaluation: EvaluationResult | None,
    license_of_weights: str | None,
) -> str:
    """Describe a version: metrics, protocol, data, lineage, use, and license.

    Args:
        name: Name of the registered model.
        lineage: Where the checkpoint comes from.
        weights: The model's files.
        settings: How the model reads its inputs.
        evaluation: An evaluation of the checkpoint, if there is one.
        license_of_weights: License of the weights, if it is known.
    """
    model = checkpoints.model_config(lineage.checkpoint)
    gives = "embeddings of captions and videos, and their similarity"
    if model.matches:
        gives = (
            "embeddings of captions and videos, their similarity, and the probability that a "
            "caption matches a video"
        )
    parts = [
        f"# {name}",
        f"A video-text model ({model.title}) for retrieval: {gives}.",
        "## Metrics",
        *_metrics(evaluation),
        "## Data",
        *_data(lineage),
        "## Lineage",
        *_lineage(lineage, weights, evaluation),
        "## Use",
        *_use(name, settings),
        "## License",
        license_of_weights or LICENSE_NOTE,
    ]
    return "\n\n".join(parts) + "\n"


def _metrics(evaluation: EvaluationResult | None) -> list[str]:
    if evaluation is None:
        return ["Not evaluated at registration."]
    result = evaluation.result
    heads = " | ".join(SHOWN)
    rows = [f"| {result['title']} | {heads} |", "|---|" + "---|" * len(SHOWN)]
    partial = "partial/" if evaluation.is_partial else ""
    for kind, kind_label in KINDS.items():
        for direction, label in DIRECTIONS.items():
            names = [f"{partial}{kind}{direction}/{figure}" for figure in SHOWN]
            if names[0] in result["metrics"]:
                figures = [_figure(result, one) for one in names]
                rows.append(f"| {label}, {kind_label} | {' | '.join(figures)} |")
    protocol = [
        f"* {topic}: {text}" for topic, text in result["protocol"].items() if topic != "checkpoint"
    ]
    return ["\n".join(rows), "95 % intervals of a bootstrap over videos.", "\n".join(protocol)]


def _figure(result: dict, name: str) -> str:
    value = f"{result['metrics'][name]:.1f}" if name in result["metrics"] else "-"
    if name not in result["intervals"]:
        return value
    low, high = result["intervals"][name]
    return f"{value} [{low:.1f}, {high:.1f}]"


def _data(lineage: Lineage) -> list[str]:
    if not lineage.data:
        return ["The folder of the checkpoint does not say what it was trained on."]
    digest = f" (digest {lineage.data_digest})" if lineage.data_digest else ""
    return [f"Trained on {_listed(lineage.data)}{digest}."]


def _lineage(lineage: Lineage, weights: Weights, evaluation: EvaluationResult | None) -> list[str]:
    recipe = f", recipe {lineage.recipe}" if lineage.recipe else ""
    lines = [f"* Checkpoint: {lineage.checkpoint} (step {lineage.step}{recipe})"]
    if lineage.run_id:
        lines.append(f"* Training run in MLflow: {lineage.run_id}")
    lines += [f"* Began with: {one}" for one in lineage.ancestors]
    if evaluation is not None:
        lines.append(f"* Evaluated as: {evaluation.name}")
    if are_referred_to(weights):
        lines.append("* Weights: read from S3 when the model is loaded; not part of this version")
    else:
        megabytes = sum(file["bytes"] for file in weights.values()) / 1e6
        lines.append(f"* Weights: part of this version ({megabytes:,.1f} MB)")
    return ["\n".join(lines)]


def _use(name: str, settings: InferenceSettings) -> list[str]:
    sampling = settings["sampling"]
    return [
        f'`mlflow.pyfunc.load_model("models:/{name}@champion").predict(table, '
        'params={"task": "match"})`',
        "The table has the columns `caption` and `video_uri` (a path or s3:// URI that the host of "
        "the model can read), or one of them, and optionally `start_s` and `end_s` in seconds. "
        "`task` is `embeddings`, `similarities` (of each row's caption and video), `match` (with "
        "match probabilities) or `auto`. A row that cannot be answered has its reason in the "
        "column `error`.",
        f"{settings['num_frames']} frames per clip, evenly spaced, {sampling['size']} pixels, "
        f"{sampling['resize']}; captions are truncated to {settings['max_text_tokens']} tokens; "
        f"{settings['precision']}.",
    ]


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names)
