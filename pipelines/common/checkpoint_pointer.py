"""Says what to do when somebody loads the entry of a checkpoint in MLflow as a model.

This file travels with the entry and runs without the rest of the project.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NoReturn


def _load_pyfunc(path: str) -> NoReturn:  # MLflow calls it by this name
    facts = json.loads((Path(path) / "checkpoint.json").read_text(encoding="utf-8"))
    raise RuntimeError(
        f"this entry only says where a checkpoint lies ({facts['checkpoint']}, step "
        f"{facts['step']}) and contains no weights; make a model that can be loaded with "
        f"`{facts['make_a_model']}`"
    )
