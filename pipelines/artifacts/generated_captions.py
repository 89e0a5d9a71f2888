"""Captions that a model wrote, as manifests and clip stores hold them: in `extras`, as `generated`.

`extras.generated` has
    captions    the captions of the clip, without repetitions, the best one of a beam search first
    model       name and fingerprint of the model that wrote them
    settings    how they were written
The captions of the annotations are in the column `captions` and stay as they are.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

EXTRA = "generated"
CAPTIONS = "captions"

CaptionChoice = Literal["original", "generated", "both"]
"""Which captions of a clip to use: those of the annotations, those that a model wrote, or both."""


def with_generated(
    extras: str, captions: Sequence[str], model: Mapping[str, Any], settings: Mapping[str, Any]
) -> str:
    """Return the extras of a row with generated captions, in place of any that it has already.

    Args:
        extras: The column `extras` of the row: a JSON object.
        captions: The captions; with none, the row is left without generated captions.
        model: Name and fingerprint of the model.
        settings: How the captions were written.

    Raises:
        ValueError: `extras` is not a JSON object.
    """
    values = json.loads(extras or "{}")
    if not isinstance(values, dict):
        raise ValueError(f"extras = {extras!r}: must be a JSON object")  # noqa: TRY004
    if not captions and EXTRA not in values:
        return extras
    values.pop(EXTRA, None)
    if captions:
        values[EXTRA] = {
            CAPTIONS: list(captions),
            "model": dict(model),
            "settings": dict(settings),
        }
    return json.dumps(values, sort_keys=True)


def generated_captions(extras: str | None) -> list[str]:
    """Return the generated captions in the column `extras` of a row; empty if there are none.

    A data set may have a column of its own with the same name, which is not taken for captions.
    """
    if not extras or f'"{EXTRA}"' not in extras:
        return []
    values = json.loads(extras)
    found = values.get(EXTRA) if isinstance(values, dict) else None
    captions = found.get(CAPTIONS) if isinstance(found, dict) else None
    if not isinstance(captions, list):
        return []
    return [text for text in captions if isinstance(text, str) and text]


def chosen_captions(
    captions: Sequence[str], extras: str | None, choice: CaptionChoice
) -> list[str]:
    """Return the captions of a clip to use; with `both`, each text once, original ones first."""
    if choice == "original":
        return list(captions)
    written = generated_captions(extras)
    if choice == "generated":
        return written
    return list(dict.fromkeys([*captions, *written]))
