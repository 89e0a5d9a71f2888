"""Removes secrets that this process knows from texts that leave it: log lines, errors, records."""

from __future__ import annotations

import logging
import os
import re

from pipelines.common.config import hide_credentials

HIDDEN = "***"
_OF_MLFLOW = ("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")
_SECRET_VARIABLE = re.compile(
    r"(?i)(password|passwd|secret|token|access_key|api_key|secret_key|credentials)$"
)
MIN_CHARACTERS = 8
"""Shortest value of any other secret variable that is replaced. A shorter one may be a word, such
as a placeholder of tests, and would be replaced inside of other words."""


def without_secrets(text: str) -> str:
    """Return a text with *** in place of secrets.

    These are credentials in URIs, and the values of environment variables whose names say that they
    hold a password, a secret, a token or a key.
    """
    text = hide_credentials(text)
    for name, value in os.environ.items():
        known = len(value) >= MIN_CHARACTERS and _SECRET_VARIABLE.search(name)
        if value and (known or name in _OF_MLFLOW):
            text = text.replace(value, HIDDEN)
    return text


class RedactingFormatter(logging.Formatter):
    """Formats log lines, with tracebacks, without secrets."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        return without_secrets(super().format(record))
