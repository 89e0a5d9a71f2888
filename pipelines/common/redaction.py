"""Removes secrets that this process knows from texts that leave it: log lines, errors, records."""

from __future__ import annotations

import logging
import os
import re

from pipelines.common.config import hide_credentials

HIDDEN = "***"
_SECRET_VARIABLE = re.compile(r"(?i)(password|passwd|secret|token|access_key|api_key|secret_key)$")
MIN_CHARACTERS = 8
"""Shortest value of a secret variable that is replaced wherever it stands. A shorter one may be a
word, such as a placeholder of tests."""
_OF_MLFLOW = ("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")
"""Variables whose shorter values are replaced as well, where they are no part of a word or path."""


def without_secrets(text: str) -> str:
    """Return a text with *** in place of secrets.

    These are credentials in URIs, and the values of environment variables whose names say that they
    hold a password, a secret, a token or a key.
    """
    text = hide_credentials(text)
    for name, value in os.environ.items():
        if len(value) >= MIN_CHARACTERS and _SECRET_VARIABLE.search(name):
            text = text.replace(value, HIDDEN)
        elif value and name in _OF_MLFLOW:
            text = re.sub(rf"(?<![\w/.-]){re.escape(value)}(?![\w/.-])", HIDDEN, text)
    return text


class RedactingFormatter(logging.Formatter):
    """Formats log lines, with tracebacks, without secrets."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        return without_secrets(super().format(record))
