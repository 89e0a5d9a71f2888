"""Trains other kinds of models on the quickstart's clips, and compares them with STGT on one page.

All models take as many steps on the same clips as stage 1 of the quickstart, with the same
optimizer and batches. The checkpoint of stage 1 is that of STGT here. They are compared on held-out
clips and the same clips played backwards: played backwards, "moves left and then grows" becomes
"shrinks and then moves right". Both clips have the same frames, so only a model that knows their
order can tell which of the two captions is true.
"""

from __future__ import annotations

import logging
from dataclasses import replace

from pipelines.common import storage
from pipelines.compare.config import CompareConfig
from pipelines.quickstart.stages import DONE, QuickstartSummary, Stages
from pipelines.train import recipes, run_folder
from pipelines.video.synthetic import dataset
from pipelines.video.synthetic.order_pairs import write_reversal_pairs
from stgt.errors import STGTError

logger = logging.getLogger(__name__)

SIDE_BY_SIDE = "side_by_side.json"
"""The metrics of all models. Exists once they were compared."""
SPLIT = "reversed"
"""Name of the split with clips that are also played backwards."""
STGT_MODEL = "stgt"
OTHERS = {"alpro": "alpro_msrvtt_tiny", "clip": "clip_msrvtt_tiny"}
"""Recipe of each of the other models."""
TITLES = {STGT_MODEL: "STGT", "alpro": "ALPRO", "clip": "CLIP, frames averaged"}
SHOWN = ("sim/t2v/R1", "t2v/R1", "sim/order/accuracy", "order/accuracy")


def compare_models(stages: Stages) -> QuickstartSummary:
    """Train and evaluate the models, write the page of the comparison, and return their metrics.

    Raises:
        STGTError: A stage failed.
    """
    # Imported here, since it loads slowly.
    from pipelines.compare.run import run_compare

    pairs = _write_clips(stages)
    store = stages.ingest(SPLIT)["store"]
    train_store = storage.read_json(stages.at("clips", "train", DONE))["store"]
    found: QuickstartSummary = {}
    for name in (STGT_MODEL, *OTHERS):
        # The last checkpoint, as of the others; the folder of a run stands for the best one.
        checkpoint = run_folder.checkpoint_uri(stages.at("stage1"), stages.config.stage1_steps)
        if name in OTHERS:
            recipe = recipes.RECIPES[OTHERS[name]](
                (train_store,), stages.at(f"stage1_{name}"), vocab=stages.vocab
            )
            recipe = stages.from_scratch(replace(recipe, hold_out=0))
            checkpoint = stages.train(recipe, stages.config.stage1_steps, store)
        summary = stages.evaluate(f"{SPLIT}_{name}", checkpoint, store, SPLIT, pairs)
        found |= {
            f"{name}/{metric}": summary["metrics"][metric]
            for metric in SHOWN
            if metric in summary["metrics"]
        }
    run_compare(
        CompareConfig(
            runs=tuple(stages.at("evaluation", f"{SPLIT}_{name}") for name in TITLES),
            output=stages.at("comparison"),
            tracking=stages.tracking,
        )
    )
    return found


def _write_clips(stages: Stages) -> str:
    """Write the videos that are played backwards; return the table of pairs of captions."""
    pairs = stages.at("annotations", f"order_pairs_{SPLIT}.parquet")
    if storage.exists(pairs):
        return pairs
    config = stages.config
    held_out = dataset.plan_videos(config.train_videos, config.val_videos, config.seed)["val"]
    videos = dataset.with_reversals(held_out)
    if not videos:
        raise STGTError(
            f"none of the {config.val_videos} held-out clips can be told from itself played "
            "backwards; raise --val-videos"
        )
    stages.connect()
    stages.render(videos)
    dataset.annotate_videos(stages.at("annotations", f"results_{SPLIT}.csv"), videos)
    write_reversal_pairs(pairs, videos)
    return pairs


def show_models(stages: Stages, found: QuickstartSummary) -> None:
    """Log the metrics of all models as a table, and the location of the page."""
    rows = [f"{'':24}{'R@1':>8}{'reranked':>10}{'order':>8}{'reranked':>10}"]
    for name, title in TITLES.items():
        values = [found.get(f"{name}/{metric}") for metric in SHOWN]
        cells = ["-" if value is None else f"{value:.1f}%" for value in values]
        rows.append(f"{title:24}{cells[0]:>8}{cells[1]:>10}{cells[2]:>8}{cells[3]:>10}")
    logger.info(
        "models side by side on clips and the same clips played backwards, after as many steps "
        "(text to video; order: preference for the true one of two captions, chance 50%%)\n%s\n"
        "page with intervals: %s",
        "\n".join(rows),
        stages.at("comparison", "compare.html"),
    )
