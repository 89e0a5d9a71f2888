"""Turns errors of MLflow, and of the libraries below it, into one sentence without credentials."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from pipelines.common.redaction import without_secrets
from stgt.errors import SettingError, STGTError

REASON_CHARACTERS = 500
"""Longest reason of an error, and of the end of a run."""
SERVERS = ("http://", "https://", "databricks")
FIRST_SERVER_ERROR = 500
REFUSALS = {
    "UNAUTHENTICATED": "the server does not accept the credentials, or wants some (401); set "
    "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN",
    "PERMISSION_DENIED": "this user has no permission (403); ask for it, or set other credentials "
    "with MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN",
}
"""What to do about answers without an explanation of the server's own, by MLflow's error code."""


class MlflowUnavailableError(OSError):
    """MLflow did not do what it was asked: it does not answer, refuses, or cannot write."""

    def __init__(self, uri: str, reason: str, is_outage: bool = False) -> None:
        super().__init__(f"MLflow at {uri} cannot be used: {reason}")
        self.uri = uri
        self.reason = reason
        self.is_outage = is_outage
        """Whether a server did not answer or failed, which may pass by itself."""

    def __reduce__(self) -> tuple[type[MlflowUnavailableError], tuple[str, str, bool]]:
        return type(self), (self.uri, self.reason, self.is_outage)


class TrackingSettingError(SettingError):
    """A setting of the user makes it impossible to record runs."""


@contextmanager
def mlflow_errors(uri: str) -> Iterator[None]:
    """Turn every error of MLflow and of the libraries below it into `MlflowUnavailableError`."""
    try:
        yield
    except (MlflowUnavailableError, STGTError):
        raise
    except Exception as error:
        raise MlflowUnavailableError(uri, _reason(error), _is_outage(uri, error)) from error


def _is_outage(uri: str, error: Exception) -> bool:
    # MLflow's errors know a status, which is that of a failing server if there was no connection.
    status = getattr(error, "get_http_status_code", lambda: 0)()
    return uri.startswith(SERVERS) and status >= FIRST_SERVER_ERROR


def _reason(error: Exception) -> str:
    """Return the cause of an error in one line without credentials.

    MLflow's own messages begin with addresses and internals, so the message of the operating system
    or of the database behind them is preferred.
    """
    chain: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in chain:
        chain.append(current)
        current = getattr(current, "orig", None) or current.__cause__ or current.__context__
    said = str(error) or type(error).__name__
    refusal = REFUSALS.get(str(getattr(error, "error_code", "")))
    if refusal is not None and said.startswith("API request to"):
        return refusal
    for one in reversed(chain):
        if type(one).__module__ == "sqlite3":
            said = str(one)
            break
        if isinstance(one, OSError) and one.errno is not None and one.strerror:
            where = "" if one.filename is None else f": {one.filename}"
            said = f"{one.strerror.lower()}{where}"
            break
        if isinstance(behind := getattr(one, "reason", None), Exception):
            said = str(behind)  # of urllib3, which gave up trying again
            break
    lines = said.strip().splitlines() or [type(error).__name__]
    return without_secrets(lines[0])[:REASON_CHARACTERS]
