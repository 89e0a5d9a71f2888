"""Runs the whole pipeline on generated videos. Only this stage and the sweep call other stages.

A finished stage leaves a marker and is skipped in later runs. An interrupted quickstart therefore
resumes where it stopped, and a finished one only shows its result.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from pipelines.common import storage
from pipelines.quickstart.config import QuickstartConfig
from pipelines.quickstart.folder import PENDING, RESULT, claim, with_earlier_settings
from pipelines.quickstart.side_by_side import SIDE_BY_SIDE, compare_models, show_models
from pipelines.quickstart.stages import TRAINED, QuickstartSummary, Stages
from pipelines.train import recipes
from pipelines.video.synthetic import dataset

logger = logging.getLogger(__name__)


def run_quickstart(
    config: QuickstartConfig, connect: Callable[[QuickstartConfig], None]
) -> QuickstartSummary:
    """Write videos, ingest, train, and evaluate the untrained and the trained model.

    With `side_by_side`, other models are trained and compared afterwards; see `side_by_side.py`.

    Args:
        config: Sizes and output folder.
        connect: Starts or joins Ray. Called before each stage that needs it.

    Raises:
        STGTError: The folder is in use or holds a run with other settings, or a stage failed.
    """
    started = time.monotonic()
    folder = storage.resolve(config.output)
    with storage.lock(folder):
        config = with_earlier_settings(config, folder)
        claim(config, folder)
        job = Stages(config, folder, connect)
        if not storage.exists(job.at(RESULT)):
            storage.write_json(job.at(RESULT), _run_stages(job))
        summary: QuickstartSummary = storage.read_json(job.at(RESULT))
        if storage.exists(job.at(PENDING)):
            job.deliver(summary)
        _show(job, summary)
        if config.side_by_side:
            if not storage.exists(job.at(SIDE_BY_SIDE)):
                storage.write_json(job.at(SIDE_BY_SIDE), compare_models(job))
            models = storage.read_json(job.at(SIDE_BY_SIDE))
            summary.update(models)
            show_models(job, models)
    summary["seconds"] = round(time.monotonic() - started, 1)
    return summary


def _run_stages(job: Stages) -> QuickstartSummary:
    job.write_videos()
    job.recording.mark_pending()
    with job.recording.running():
        train, val = dataset.SPLITS
        trained_on = job.ingest(train)
        # The second ingest mostly waits for its workers, so the model is made beside it.
        with ThreadPoolExecutor(1) as beside:
            making = beside.submit(job.untrained)
            tested_on = job.ingest(val)
            untrained = making.result()
        train_store, val_store = trained_on["store"], tested_on["store"]
        stage1 = recipes.pretrain_stage1_tiny((train_store,), job.at("stage1"), job.vocab)
        stage1 = replace(
            job.from_scratch(stage1),
            init_from=untrained,
            model=replace(stage1.model, init_rules=job.config.init_rules),
        )
        checkpoint = job.train(stage1, job.config.stage1_steps, val_store)
        if job.config.stage2_steps:
            stage2 = recipes.pretrain_stage2_tiny(
                (train_store,), job.at("stage2"), init_from=checkpoint, vocab=job.vocab
            )
            checkpoint = job.train(stage2, job.config.stage2_steps, val_store)
        # A quickstart that an earlier version began has no pairs and continues without them.
        pairs = job.order_pairs if storage.exists(job.order_pairs) else None
        before = job.evaluate("untrained", untrained, val_store, order_pairs=pairs)
        after = job.evaluate(TRAINED, checkpoint, val_store, order_pairs=pairs)
    summary: QuickstartSummary = dict(after["metrics"])
    summary.update({f"untrained/{k}": value for k, value in before["metrics"].items()})
    summary["clips_ingested"] = trained_on["clips"] + tested_on["clips"]
    summary["clips_quarantined"] = trained_on["quarantined"] + tested_on["quarantined"]
    return summary


def _show(job: Stages, summary: QuickstartSummary) -> None:
    """Log the result as a table, and the locations of the report and of the MLflow runs."""
    rows = [f"{'':24}{'R@1':>8}{'R@5':>8}{'R@10':>8}{'median rank':>14}"]
    for label, prefix in (
        ("text to video", "t2v"),
        ("video to text", "v2t"),
        ("  untrained: text to video", "untrained/t2v"),
    ):
        recalls = "".join(f"{summary[f'{prefix}/R{k}']:>7.1f}%" for k in (1, 5, 10))
        rows.append(f"{label:26}{recalls[2:]}{summary[f'{prefix}/MdR']:>14.1f}")
    if (order := summary.get("order/accuracy")) is not None:
        rows.append(
            f"of captions that differ in the order or direction of events, the true one is "
            f"preferred in {order:.1f}% (chance: 50%)"
        )
    logger.info(
        "retrieval on held-out clips, each with a unique caption\n%s\n"
        "report with captions and their top five clips: %s\n"
        "all other results are in MLflow: mlflow ui --backend-store-uri %s",
        "\n".join(rows),
        job.at("evaluation", "trained", "report.html"),
        job.tracking.uri,
    )
