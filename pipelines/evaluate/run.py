"""Evaluates text-video retrieval under a benchmark's protocol.

Stages: encode clips and captions on Ray Data, in parts that are kept as Parquet so that a restart
only computes the missing ones; compute cosine similarities in chunks; select candidates in both
directions; match the union of candidate pairs on Ray Data; compute metrics and write a report.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeAlias, TypedDict

from pipelines.artifacts import checkpoints
from pipelines.artifacts.benchmark_names import PUBLISHED_CANDIDATES
from pipelines.artifacts.clip_store import ClipStore
from pipelines.artifacts.embeddings import TEXTS, VIDEOS
from pipelines.artifacts.frame_features import FrameFeatures, known_encoder
from pipelines.artifacts.locations import find_checkpoint, find_data, is_manifest
from pipelines.artifacts.training_run import TrainingData, origin_of
from pipelines.common import storage, timeline, tracking
from pipelines.common.config import fingerprint, to_dict
from pipelines.common.output_folder import (
    CONFIG,
    RUN,
    claim_folder,
    config_record,
    settings_of,
)
from pipelines.common.provenance import About
from pipelines.common.recording import Recording, recorded_result
from pipelines.evaluate import reproduction
from pipelines.evaluate.benchmarks import BENCHMARKS, Benchmark
from pipelines.evaluate.config import EvaluateConfig
from pipelines.evaluate.file_inputs import FileInputs, open_file_inputs
from pipelines.evaluate.gallery import open_gallery
from pipelines.evaluate.inputs import METRICS, PAIRS, PICTURE, RANKS, REPORT, EvaluationInputs
from pipelines.evaluate.leakage import needs_ray, resolve_training_data
from pipelines.evaluate.order_pairs import TABLE as ORDER_TABLE
from pipelines.evaluate.order_pairs import read_order_pairs
from pipelines.evaluate.published_evaluators import (
    candidates_for,
    keeps_captions_as_written,
    text_tokens_for,
)
from pipelines.feed.config import EvaluationFeatures
from pipelines.feed.dataset_checks import check_frames, digest_of
from pipelines.feed.dataset_inputs import dataset_input
from stgt.errors import SettingError, STGTError
from stgt.field_marks import with_earlier_values
from stgt.interface.inputs import VideoTextConfig
from stgt.retrieval.scoring_rules import DEFAULT_RULE

logger = logging.getLogger(__name__)

MISSING_SHOWN = 20
Inputs: TypeAlias = EvaluationInputs | FileInputs
EARLIER_INTERVALS = "ci95/"
"""Group of the intervals in runs of earlier versions."""


class EvaluateSummary(TypedDict):
    """Result of `run_evaluate`."""

    benchmark: str
    protocol: dict[str, str]
    metrics: dict[str, float]
    clips: int
    captions: int
    missing: list[str]
    """The first few clips that could not be used. `metrics.json` lists all of them with reasons."""
    report: str
    picture: str | None
    """Captions with frames of the clips found; None if no videos were given."""
    run_id: str | None
    """MLflow run id; None if MLflow could not be used yet."""
    seconds: float


def run_evaluate(
    config: EvaluateConfig,
    parent_id: str | None = None,
    connect: Callable[[EvaluateConfig], None] | None = None,
) -> EvaluateSummary:
    """Evaluate a checkpoint or a file of embeddings, or return the result of the same config.

    Args:
        config: What to evaluate.
        parent_id: MLflow run that becomes the parent of this one.
        connect: Called once before Ray is needed, after all checks that do not need Ray.

    Raises:
        STGTError: The clips, the checkpoint or the file of embeddings cannot be used, or embeddings
            are not finite.
        SettingError: The clips are not the split of the benchmark.
    """
    started = time.monotonic()
    config = _resolved(config)
    config = replace(config, k_rerank=candidates_for(config.scoring, config.k_rerank))
    config = _with_recorded_rules(_with_recorded_candidates(config))
    benchmark = BENCHMARKS[config.benchmark]
    training = resolve_training_data(config)
    inputs: Inputs
    if config.embedding_file is not None:
        inputs = open_file_inputs(config, benchmark, training)
    else:
        inputs = _open_inputs(config, benchmark, training)
    config = inputs.config
    with storage.lock(config.output):
        _claim(inputs)

        def prepare() -> None:
            if connect is not None and _needs_ray(inputs):
                connect(config)

        def work() -> None:
            if isinstance(inputs, FileInputs):
                from pipelines.evaluate.file_scoring import evaluate_file

                evaluate_file(inputs)
                return
            with timeline.span("import the stages"):  # with Ray and torch
                from pipelines.evaluate.scoring import evaluate

            evaluate(inputs)

        recording = _recording(inputs, parent_id)
        result = recorded_result(
            storage.join(config.output, METRICS),
            recording=recording,
            prepare=prepare,
            work=work,
            record=lambda result: _record(inputs, recording, result),
        )
    return EvaluateSummary(
        benchmark=config.benchmark,
        protocol=result["protocol"],
        metrics=result["metrics"],
        clips=result["clips"],
        captions=result["captions"],
        missing=[one["clip_id"] for one in result["missing"][:MISSING_SHOWN]],
        report=storage.join(config.output, REPORT),
        picture=None if config.data is None else storage.join(config.output, PICTURE),
        run_id=tracking.recorded_run_id(storage.join(config.output, RUN)),
        seconds=round(time.monotonic() - started, 1),
    )


def _open_inputs(
    config: EvaluateConfig, benchmark: Benchmark, training: TrainingData | None
) -> EvaluationInputs:
    """Check the model and the videos of an evaluation, and open its gallery."""
    if config.against == "published":
        reproduction.check(config)
    checkpoints.require(config.checkpoint_uri)
    checkpoints.check_vocabulary(config.checkpoint_uri)
    model = checkpoints.model_config(config.checkpoint_uri)
    logger.info("%s holds %s", config.checkpoint_uri, checkpoints.describe(config.checkpoint_uri))
    if checkpoints.is_of_hub(config.checkpoint_uri) and model.inputs.resize != config.resize:
        logger.warning(
            "%s was trained on frames with --resize %s, and this evaluation has %s",
            model.title,
            model.inputs.resize,
            config.resize,
        )
    if not model.matches:
        if config.scoring != DEFAULT_RULE.name:
            raise SettingError(
                f"scoring = {config.scoring}: needs a model that matches pairs, and {model.title} "
                "does not; leave it out"
            )
        config = replace(config, k_rerank=0)
    config = replace(config, max_text_tokens=_text_tokens(config, benchmark, model))
    gallery = open_gallery(config, benchmark)
    pairs = None
    if config.order_pairs is not None:
        pairs = read_order_pairs(config.order_pairs, gallery)
    inputs = EvaluationInputs(config, benchmark, gallery, model, pairs, training)
    _check_frames(inputs)
    return inputs


def _needs_ray(inputs: Inputs) -> bool:
    here = isinstance(inputs, FileInputs) or inputs.runs_here
    return not here or needs_ray(inputs.config, inputs.training)


def _recording(inputs: Inputs, parent_id: str | None) -> Recording:
    config = inputs.config
    data = [dataset_input(uri, "test") for uri in (config.data, config.manifest) if uri is not None]
    return Recording(
        config.tracking,
        config.label,
        storage.join(config.output, RUN),
        to_dict(config),
        parent_id,
        meanwhile=f"the evaluation continues and its results are kept in {config.output}; they "
        "will be sent once MLflow can be used",
        about=About(
            job="evaluate",
            summary=_description(inputs),
            datasets=tuple(data),
            fingerprints={"data": data[0].digest} if data else {},
            step="evaluated",
            origin=None if config.checkpoint is None else origin_of(config.checkpoint),
        ),
    )


def _description(inputs: Inputs, protocol: Mapping[str, str] | None = None) -> str:
    """Return what the run does, for readers who do not know the project."""
    gallery, benchmark = inputs.gallery, inputs.benchmark
    parts = [
        f"Evaluates text-video retrieval of {_what(inputs)} ({benchmark.title}, "
        f"{benchmark.split}): {len(gallery.captions):,} captions and {gallery.num_videos:,} "
        f"videos. Results, report and settings are in `{inputs.config.output}`.",
        *(f"**{name}**: {value}" for name, value in (protocol or {}).items()),
    ]
    return "\n\n".join(parts)


def _what(inputs: Inputs) -> str:
    """Return what is evaluated, for readers."""
    if isinstance(inputs, FileInputs):
        return f"embeddings of any model, from the file `{inputs.file.uri}`"
    return f"the model {inputs.model.title}"


def _record(inputs: Inputs, recording: Recording, result: dict[str, Any]) -> None:
    """Send a result to MLflow."""
    intervals, output = result["intervals"], inputs.config.output

    def metrics(run: tracking.Run) -> None:
        found = {**result["metrics"], "data/missing": float(len(result["missing"]))}
        # An earlier version may have sent a part already.
        named = _earlier_ends if run.has_metric(EARLIER_INTERVALS) else _ends
        for name, (low, high) in intervals.items():
            found.update(zip(named(name), (low, high), strict=True))
        run.log_metrics(found)
        run.describe(_description(inputs, result["protocol"]))

    def files(run: tracking.Run) -> None:
        for name in (PICTURE, REPORT, RANKS, ORDER_TABLE):
            if storage.exists(uri := storage.join(output, name)):
                run.log_file(name, storage.read_bytes(uri))
        run.log_json(METRICS, {name: value for name, value in result.items() if name != "tracked"})

    recording.deliver(metrics)
    recording.deliver(files, "files")


def _ends(metric: str) -> tuple[str, str]:
    """Return the names of the ends of a metric's interval, such as `t2v_ci95/R1_low`.

    MLflow's pages sort groups of metrics by name, so intervals follow the metrics themselves.
    """
    group, _, name = metric.rpartition("/")
    return f"{group}_ci95/{name}_low", f"{group}_ci95/{name}_high"


def _earlier_ends(metric: str) -> tuple[str, str]:
    return f"{EARLIER_INTERVALS}{metric}/low", f"{EARLIER_INTERVALS}{metric}/high"


def _resolved(config: EvaluateConfig) -> EvaluateConfig:
    def there(uri: str | None) -> str | None:
        return None if uri is None else storage.resolve(uri)

    return replace(
        config,
        data=None if config.data is None else find_data(config.data),
        manifest=there(config.manifest),
        checkpoint=None if config.checkpoint is None else find_checkpoint(config.checkpoint),
        embedding_file=there(config.embedding_file),
        order_pairs=there(config.order_pairs),
        output=storage.resolve(config.output),
        embeddings=there(config.embeddings),
        features=EvaluationFeatures(store=there(config.features.store)),
        tracking=tracking.resolve(config.tracking),
    )


def _with_recorded_candidates(config: EvaluateConfig) -> EvaluateConfig:
    """Return the config with the number of candidates that the output folder began with.

    The default was 128 before it became the published number, so that the same command would not
    continue an earlier evaluation otherwise. A number other than the default was asked for and is
    kept.
    """
    uri = storage.join(config.output, CONFIG)
    if config.k_rerank != PUBLISHED_CANDIDATES or not storage.exists(uri):
        return config
    record = storage.read_json(uri)
    number = settings_of(record).get("k_rerank", PUBLISHED_CANDIDATES)
    if _identity(record) is None or number == config.k_rerank:
        return config
    logger.warning(
        "the evaluation in %s began with %d candidates to rerank and continues with them; to rerank"
        " %d, as published, choose another --output",
        config.output,
        number,
        config.k_rerank,
    )
    return replace(config, k_rerank=number)


def _with_recorded_rules(config: EvaluateConfig) -> EvaluateConfig:
    """Return the config with the rules of the version that began the evaluation in its folder."""
    uri = storage.join(config.output, CONFIG)
    record = storage.read_json(uri) if storage.exists(uri) else {}
    if _identity(record) is None:
        return config
    return with_earlier_values(config, settings_of(record))


def _text_tokens(config: EvaluateConfig, benchmark: Benchmark, model: VideoTextConfig) -> int:
    """Return the maximum tokens per caption: from the config, the benchmark or the model."""
    inputs = model.inputs
    of_benchmark = benchmark.max_text_tokens if inputs.follows_benchmark else None
    of_evaluator = text_tokens_for(config.scoring, benchmark.name)
    asked = config.max_text_tokens or of_evaluator or of_benchmark or inputs.max_text_tokens
    most = inputs.most_text_tokens
    if not inputs.any_text_length and asked != inputs.max_text_tokens:
        raise SettingError(
            f"max_text_tokens = {asked}: {model.title} was trained on texts padded to "
            f"{inputs.max_text_tokens} tokens and takes no other length"
        )
    if asked > most:
        if config.max_text_tokens is not None:
            raise SettingError(f"max_text_tokens = {asked}: the model supports at most {most}")
        logger.warning(
            "captions are truncated to %d tokens, the model's maximum, instead of %d", most, asked
        )
    return min(asked, most)


def _check_frames(inputs: EvaluationInputs) -> None:
    """Check that the store holds frames as the model needs them."""
    config = inputs.config
    if config.manifest is not None and is_manifest(config.data_uri):
        raise SettingError(
            "manifest selects clips from a clip store; omit it if data is a manifest itself"
        )
    if not is_manifest(config.data_uri):
        size = inputs.model.inputs.image_size
        check_frames(ClipStore(config.data_uri), size, inputs.num_frames, config.resize)
    _check_features(inputs)


def _check_features(inputs: EvaluationInputs) -> None:
    """Check that stored tokens are those of the clips, and of the checkpoint's frame encoder.

    Raises:
        SettingError: The videos are decoded, so their frames have no stored tokens.
        STGTError: The tokens are of other clips, of another encoder, or of augmented frames.
    """
    config = inputs.config
    if (uri := config.features.store) is None:
        return
    if is_manifest(config.data_uri):
        raise SettingError(
            f"features.store = {uri!r}: {config.data_uri} is a manifest, whose videos are decoded, "
            "and only frames of a clip store have stored tokens; give the store as --data"
        )
    features = FrameFeatures(uri)
    features.check_store(ClipStore(config.data_uri))
    features.check_shape(inputs.model.frame_token_shape, inputs.model.title)
    if features.views:
        raise SettingError(
            f"features.store = {uri!r}: holds augmented views of each clip, and an evaluation uses "
            "frames as they are; give features that were written without --views"
        )
    if inputs.num_frames > inputs.model.inputs.num_frames:
        raise SettingError(
            f"num_frames = {inputs.num_frames}: the model takes at most "
            f"{inputs.model.inputs.num_frames} frames"
        )
    # Otherwise, workers compare the encoder that they have loaded.
    if inputs.model.frames_are_fixed and (found := known_encoder(config.checkpoint_uri)):
        features.check_encoder(found, config.checkpoint_uri)


def _claim(inputs: Inputs) -> None:
    """Claim the folders, so that results and embeddings of different evaluations are never mixed.

    Raises:
        STGTError: A folder belongs to an evaluation of another model, gallery or config.
    """
    config = inputs.config
    is_of_file = isinstance(inputs, FileInputs)
    encoded = _identity_of_file(inputs) if is_of_file else _identity_of_embeddings(inputs)
    scored = fingerprint(
        [
            encoded,
            config.benchmark,
            config.k_rerank,
            config.allow_missing,
            config.dual_softmax,
            config.resamples,
            # Evaluations of earlier versions had none of these.
            *([["scoring", config.scoring]] if config.scoring != DEFAULT_RULE.name else []),
            *([["leakage", *_identities_of(inputs.training)]] if inputs.training else []),
            *([["order", storage.digest(config.order_pairs)]] if config.order_pairs else []),
        ]
    )
    _claim_folder(inputs, config.output, "the evaluation", scored)
    if not is_of_file:
        _claim_folder(inputs, inputs.embeddings, "embeddings", encoded)


def _identities_of(training: TrainingData) -> list[str]:
    """Return the training data with digests: if data grow, their earlier check is outdated."""
    return [*training.uris, *(digest_of(uri) for uri in training.uris)]


def _identity_of_file(inputs: FileInputs) -> str:
    """Return a hash of what the scores of an evaluation of a file of embeddings depend on."""
    return fingerprint(
        [
            inputs.file.uri,
            storage.digest(inputs.file.uri),
            inputs.config.data,
            inputs.gallery.clip_ids,
        ]
        + [inputs.gallery.captions]
    )


def _identity_of_embeddings(inputs: EvaluationInputs) -> str:
    """Return a hash of what the embeddings of a model depend on."""
    config, gallery = inputs.config, inputs.gallery
    return fingerprint(
        [
            config.checkpoint,
            checkpoints.weights_version(config.checkpoint_uri),
            config.data,
            digest_of(config.data_uri),
            gallery.clip_ids,
            gallery.captions,
            inputs.num_frames,
            config.resize,
            config.max_text_tokens,
            config.precision,
            *(
                [["features", FrameFeatures(config.features.store).digest]]
                if config.features.store is not None
                else []
            ),
            *(["captions as written"] if keeps_captions_as_written(config.scoring) else []),
            # A store is made by its own rules, and evaluations of earlier versions had no others.
            *(
                [config.frame_rules]
                if is_manifest(config.data_uri) and config.frame_rules > 1
                else []
            ),
        ]
    )


def _claim_folder(inputs: Inputs, folder: str, what: str, identity: str) -> None:
    def refuse(found: Mapping[str, Any], differing: list[str]) -> STGTError:
        del differing
        if _identity(found) is None:
            return STGTError(
                f"{folder} holds other files, with their own {CONFIG}; choose another folder"
            )
        return STGTError(
            f"{folder} holds {what} of another checkpoint, gallery or config; choose another "
            "folder, or delete this one"
        )

    # A folder without results may be claimed with other settings, but a config.json that does not
    # belong to an evaluation is never overwritten.
    made = [storage.list_names(storage.join(folder, name)) for name in (VIDEOS, TEXTS, PAIRS)]
    begun = any(made) or storage.exists(storage.join(folder, METRICS))
    uri = storage.join(folder, CONFIG)
    foreign = storage.exists(uri) and _identity(storage.read_json(uri)) is None
    claim_folder(
        folder,
        CONFIG,
        config_record("evaluate", inputs.config, identity=identity),
        refuse,
        compared=lambda found: {"identity": _identity(found)},
        has_results=begun or foreign,
    )


def _identity(record: Mapping[str, Any]) -> str | None:
    """Return the identity in an evaluation's `config.json`; None for any other file."""
    return settings_of(record).get("identity")
