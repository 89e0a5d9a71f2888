"""The exceptions a user of the package may see. Each message says what, where and what to do."""

from __future__ import annotations


class STGTError(Exception):
    """Base of every error that is about the user's data, files or configuration.

    Children with arguments of their own name them in `__reduce__`: errors cross processes.
    """


class ManifestError(STGTError):
    """A manifest or annotation file cannot be used."""


class ClipStoreError(STGTError):
    """A clip store is missing, incomplete, damaged, or was made with other settings."""


class VideoDecodeError(STGTError):
    """One clip cannot be decoded.

    Attributes:
        clip_id: the clip, as named in the manifest.
        reason: a code of `pipelines.decode.REASONS`.
    """

    def __init__(self, clip_id: str, reason: str, message: str) -> None:
        super().__init__(f"clip {clip_id}: {reason}: {message}")
        self.clip_id = clip_id
        self.reason = reason
        self.message = message

    def __reduce__(self) -> tuple[type[VideoDecodeError], tuple[str, str, str]]:
        return type(self), (self.clip_id, self.reason, self.message)


class CheckpointError(STGTError, ValueError):
    """A checkpoint is missing, incomplete, damaged or belongs to another run."""


class CheckpointMismatchError(CheckpointError):
    """Names or shapes of a checkpoint differ from those of the model."""

    def __init__(self, where: str, missing: list[str], unexpected: list[str]) -> None:
        super().__init__(
            f"{where} does not fit the model: missing {missing or 'nothing'}, "
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
    """A training step waited too long for its clips."""


class StoppedError(STGTError):
    """A run ended before its end because it was told to, after a checkpoint."""


class NonFiniteLossError(STGTError):
    """A loss is NaN or infinite; carries the step and the clips of the batch."""

    def __init__(self, step: int, losses: dict[str, float], clip_ids: list[str]) -> None:
        super().__init__(
            f"loss is not finite at step {step}: {losses}; clips of this worker's batch: "
            f"{', '.join(clip_ids)}; lower the learning rate or inspect these clips"
        )
        self.step = step
        self.losses = losses
        self.clip_ids = clip_ids

    def __reduce__(
        self,
    ) -> tuple[type[NonFiniteLossError], tuple[int, dict[str, float], list[str]]]:
        return type(self), (self.step, self.losses, self.clip_ids)
