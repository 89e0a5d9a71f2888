"""Claims the output folder of an export."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pipelines.common import storage
from pipelines.common.output_folder import claim_folder
from stgt.errors import STGTError

_LEFTOVER = re.compile(r"\..+\.[0-9a-f]{32}\.tmp")
"""Names of files that a killed worker had begun to write."""
CLAIM = "export.json"
"""File in an output folder that says what is exported there. It is written first."""
_WORDS = {
    "kind": "form",
    "manifest_sha256": "manifest",
    "catalogue_sha256": "clip store",
    "store": "clip store",
}
"""What the entries of the record are called in messages."""


def claim_output(output: str, record: Mapping[str, Any], what: str) -> None:
    """Record what is exported to a folder, or check that an interrupted export is continued.

    Args:
        output: The folder.
        record: What determines the contents of the folder, with flat values.
        what: What is exported, for error messages.

    Raises:
        STGTError: The folder holds something else.
    """

    def refuse(found: Mapping[str, Any], differing: list[str]) -> STGTError:
        # Exports of another form have other entries, which need not be listed.
        names = ["kind"] if "kind" in differing else differing
        said = sorted({_WORDS.get(name, name) for name in names})
        return STGTError(
            f"{output} holds an export with another {' and '.join(said)} than this one, of {what}; "
            "choose another output folder, or delete this one"
        )

    names = [name for name in storage.list_names(output) if not name.startswith(".")]
    if names and CLAIM not in names:
        raise STGTError(
            f"{output} already contains {names[0]}, which no export wrote; choose a new folder"
        )
    claim_folder(output, CLAIM, record, refuse)


def remove_leftovers(*folders: str) -> None:
    """Delete the unfinished files of killed workers, once all workers have ended."""
    for folder in folders:
        for name in storage.list_names(folder):
            if _LEFTOVER.fullmatch(name):
                storage.remove(storage.join(folder, name))
