"""What can go wrong with one URL: failures that are final, and those that may pass."""

from __future__ import annotations

from pipelines.fetch.config import FetchReason


class FetchError(Exception):
    """A video cannot be fetched.

    Attributes:
        reason: Its reason code.
        message: What happened, for the quarantine.
    """

    def __init__(self, reason: FetchReason, message: str) -> None:
        super().__init__(f"{reason}: {message}")
        self.reason: FetchReason = reason
        self.message = message


class PassingError(FetchError):
    """A failure that may pass, so that the URL is tried again after a pause.

    Attributes:
        pause_s: Pause that the server asks for, in seconds.
        nothing_came: Whether nothing at all came back, as if there were no network.
    """

    def __init__(
        self,
        reason: FetchReason,
        message: str,
        pause_s: float | None = None,
        *,
        nothing_came: bool = False,
    ) -> None:
        super().__init__(reason, message)
        self.pause_s = pause_s
        self.nothing_came = nothing_came
