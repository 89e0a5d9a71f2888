"""The code of a registered model, which MLflow runs from this file to load the model.

MLflow copies this file into the model and runs it, so that no object is pickled. What it imports
from this project travels with the model. It is one of the modules that import mlflow, because the
model is one of MLflow's.
"""

from __future__ import annotations

import atexit
import tempfile
from pathlib import Path
from typing import Any

import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel, PythonModelContext

from pipelines.registry.inference import InputRow, RetrievalModel
from pipelines.registry.weights import assemble
from stgt.errors import SettingError


class RegisteredModel(PythonModel):
    """Answers requests of captions, videos, or pairs of both."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load the weights, from the model's own files or from S3."""
        settings = dict(context.model_config)
        weights = settings.pop("weights")
        with tempfile.TemporaryDirectory() as scratch:
            if weights is None:
                folder = Path(context.artifacts["checkpoint"])
            else:
                folder = assemble(weights, Path(scratch) / "checkpoint")
            self._model = RetrievalModel(str(folder), settings)  # type: ignore[arg-type]
        atexit.register(self._model.close)

    def predict(  # noqa: D417 - the context is MLflow's
        self,
        context: PythonModelContext,
        model_input: pd.DataFrame,
        params: dict[str, Any] | None = None,
    ) -> pd.DataFrame:
        """Answer a request; see `RetrievalModel.predict`.

        Args:
            model_input: Columns `caption`, `video_uri`, `start_s` and `end_s`, all optional.
            params: `task`.

        Raises:
            MlflowException: The task is unknown, or there is neither a caption nor a video.
        """
        if not {"caption", "video_uri"} & set(model_input.columns):
            raise MlflowException.invalid_parameter_value(
                "the input has neither a column caption nor a column video_uri; give one or both"
            )
        rows = [
            InputRow(**{name: _value(row, name) for name in ("caption", "video_uri")})
            if _value(row, "video_uri") is None
            else InputRow(**{name: _value(row, name) for name in InputRow.__dataclass_fields__})
            for row in model_input.to_dict("records")
        ]
        try:
            columns = self._model.predict(rows, (params or {}).get("task", "auto"))
        except SettingError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from error
        return pd.DataFrame(columns, dtype=object)


def _value(row: dict[Any, Any], name: str) -> Any:
    """Return an entry of a row; None if it is missing, which pandas also writes as NaN."""
    value = row.get(name)
    return None if value is None or value is pd.NA or value != value else value  # noqa: PLR0124


set_model(RegisteredModel())
