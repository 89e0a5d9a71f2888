"""Claims the output folder of an export."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipelines.common import storage
from pipelines.common.output_folder import claim_folder
from stgt.errors import STGTError

CLAIM = "export.json"
"""File in an output folder that says what is exported there. It is written first."""


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
        return STGTError(
            f"{output} holds another export (it differs in {', '.join(differing)} from this "
            f"export of {what}); choose another output folder, or delete this one"
        )

    names = [name for name in storage.list_names(output) if not name.startswith(".")]
    if names and CLAIM not in names:
        raise STGTError(
            f"{output} already contains {names[0]}, which no export wrote; choose a new folder"
        )
    claim_folder(output, CLAIM, record, refuse)
