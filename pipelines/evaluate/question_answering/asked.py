"""The questions of an evaluation and the clips that they are about.

A question about a clip that cannot be used stays: it counts as answered wrongly, and the clip is
listed with its reason.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pipelines.artifacts.clip_store import ClipStore, shard_name
from pipelines.artifacts.locations import is_manifest
from pipelines.artifacts.questions import Question, read_questions
from pipelines.common import storage
from pipelines.evaluate.question_answering.config import AnswersConfig
from pipelines.feed.sources import ClipSource
from stgt.errors import ClipStoreError

CLIPS_PER_PART = 64
NOT_INGESTED = "not_ingested"


@dataclass(frozen=True)
class Asked:
    """Questions, and where their clips are."""

    questions: list[Question]
    places: dict[str, tuple[int, int]]
    """Shard and row of each clip that is there, by its id."""
    missing: dict[str, str]
    """Reason of each clip that is not there, by its id."""

    def parts(self) -> list[dict[str, Any]]:
        """Divide the questions into items of work, by the shards of their clips.

        The division does not depend on the workers. An item has `part`, `shard`, and for each
        question `row` (of its clip in the shard), `number` and `question`.
        """
        numbers: dict[tuple[int, int], list[int]] = {}
        for number, one in enumerate(self.questions):
            if one.clip_id in self.places:
                numbers.setdefault(self.places[one.clip_id], []).append(number)
        items = []
        places = sorted(numbers)
        for shard in sorted({shard for shard, _ in places}):
            clips = [place for place in places if place[0] == shard]
            for start in range(0, len(clips), CLIPS_PER_PART):
                some = [
                    (place[1], number)
                    for place in clips[start : start + CLIPS_PER_PART]
                    for number in numbers[place]
                ]
                items.append(
                    {
                        "part": len(items),
                        "shard": shard,
                        "row": [row for row, _ in some],
                        "number": [number for _, number in some],
                        "question": [self.questions[number].question for _, number in some],
                    }
                )
        return items

    @property
    def num_clips(self) -> int:
        """Number of clips that are asked about, including missing ones."""
        return len(self.places) + len(self.missing)


def open_asked(config: AnswersConfig, source: ClipSource) -> Asked:
    """Read the questions and find their clips.

    Args:
        config: Names the manifest with the questions and the clips.
        source: The clips.

    Raises:
        ManifestError: The manifest cannot be used.
        SettingError: The questions are not those of the benchmark.
        ClipStoreError: None of the clips is there.
    """
    questions = read_questions(config.questions)
    if config.named is not None:
        config.named.check(len(questions), config.questions)
    wanted = {one.clip_id for one in questions}
    places = {
        clip_id: (shard, row)
        for shard in range(len(source.shard_sizes))
        for row, clip_id in enumerate(source.clip_ids(shard))
        if clip_id in wanted
    }
    reasons = {} if is_manifest(config.data) else dict(_quarantined(ClipStore(config.data)))
    missing = {
        clip_id: reasons.get(clip_id, f"{NOT_INGESTED}: the clip is not in {config.data}")
        for clip_id in sorted(wanted - places.keys())
    }
    if not places:
        raise ClipStoreError(
            f"{config.data} contains none of the {len(wanted):,} clips that {config.questions} "
            f"asks about (the first is {questions[0].clip_id}); give the store that was made from "
            "the videos of these questions"
        )
    return Asked(questions, places, missing)


def _quarantined(store: ClipStore) -> Iterator[tuple[str, str]]:
    if not store.num_quarantined:
        return
    for record in store.catalogue["shards"]:
        if record["quarantined"]:
            name = shard_name(record["shard"], record.get("revision", 0))
            uri = storage.join(store.quarantine, name)
            for row in storage.read_table(uri, ["clip_id", "reason", "message"]).to_pylist():
                yield row["clip_id"], f"{row['reason']}: {row['message']}"


def reasons_of(missing: dict[str, str]) -> str:
    """Summarize why clips are missing, most frequent first: `3 undecodable, 1 timeout`."""
    counted = Counter(reason.partition(":")[0] for reason in missing.values())
    return ", ".join(f"{count} {reason}" for reason, count in counted.most_common())
