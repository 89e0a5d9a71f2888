"""Exceptions raised to users. Each message states what is wrong, where, and what to do about it."""

from __future__ import annotations


class STGTError(Exception):
    """Base class of errors caused by the user's data, files or configuration.

    Errors are pickled between processes, so subclasses with their own constructor arguments must
    return them from `__reduce__`.
    """


class SettingError(STGTError, ValueError):
    """A setting or an argument has a value that cannot be used.

    A `ValueError` of another class is a mistake of this project or of a library, not of the user.
    """


class OutOfMemoryError(STGTError):
    """A process needed more memory than there is."""


class ManifestError(STGTError):
    """A manifest or annotation file cannot be used."""


class ClipStoreError(STGTError):
    """A clip store is missing, incomplete, damaged, or was created with different settings."""


class VideoDecodeError(STGTError):
    """One clip cannot be decoded.

    Attributes:
        clip_id: The clip's id in the manifest.
        reason: A key of `pipelines.video.decoder.REASONS`.
    """

    def __init__(self, clip_id: str, reason: str, message: str) -> None:
        super().__init__(f"clip {clip_id}: {reason}: {message}")
        self.clip_id = clip_id
        self.reason = reason
        self.message = message

    def __reduce__(self) -> tuple[type[VideoDecodeError], tuple[str, str, str]]:
        return type(self), (self.clip_id, self.reason, self.message)


class CheckpointError(STGTError, ValueError):
    """A checkpoint is missing, incomplete, damaged, or belongs to another run."""


class CheckpointMismatchError(CheckpointError):
    """The tensor names or shapes in a checkpoint differ from those of the model."""

    def __init__(self, where: str, missing: list[str], unexpected: list[str]) -> None:
        super().__init__(
            f"{where} does not match the model: missing {missing or 'nothing'}, "
            f"unexpected {unexpected or 'nothing'}; load it into a model built from its own config"
        )
        self.where = where
        self.missing = missing
        self.unexpected = unexpected

    def __reduce__(
        self,
    ) -> tuple[type[CheckpointMismatchError], tuple[str, list[str], list[str]]]:
        return type(self), (self.where, self.missing, self.unexpected)


class DataStallError(STGTError):
    """A training step waited too long for data."""


class TooFewPairsError(STGTError):
    """A batch has fewer than two pairs, so matching has no negatives to draw."""


class StoppedError(STGTError):
    """A run was stopped early on request, after saving a checkpoint."""


class PausedError(StoppedError):
    """A run reached the step that it was to pause after; the next start continues it."""


class NonFiniteLossError(STGTError):
    """A loss is NaN or infinite. The error carries the step and the clips of the batch."""

    def __init__(self, step: int, losses: dict[str, float], clip_ids: list[str]) -> None:
        super().__init__(
            f"loss is not finite at step {step}: {losses}; clips in this worker's batch: "
            f"{', '.join(clip_ids)}; lower the learning rate or inspect these clips"
        )
        self.step = step
        self.losses = losses
        self.clip_ids = clip_ids

    def __reduce__(
        self,
    ) -> tuple[type[NonFiniteLossError], tuple[int, dict[str, float], list[str]]]:
        return type(self), (self.step, self.losses, self.clip_ids)
