"""Opens a vocabulary wherever it is, and puts it where all nodes of a cluster can read it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.artifacts.checkpoints import VOCAB
from pipelines.common import storage
from stgt.errors import SettingError

if TYPE_CHECKING:
    from stgt.inputs.tokenizer import Tokenizer


def open_tokenizer(vocab: str) -> Tokenizer:
    """Load the tokenizer of a vocabulary.

    Args:
        vocab: A file, local or s3://, or a name on the Hugging Face Hub.

    Raises:
        SettingError: The vocabulary does not exist or cannot be used.
    """
    # Imported here because transformers loads slowly, and most commands need no tokenizer.
    from stgt.inputs.tokenizer import Tokenizer

    if storage.is_local(vocab):
        return Tokenizer(vocab)
    if not storage.is_file(vocab):
        raise SettingError(f"vocabulary {vocab}: no such file")
    with storage.as_local(vocab) as path:
        return Tokenizer(path)


def share_vocabulary(vocab: str, output: str) -> str:
    """Return a vocabulary that all nodes can read, as a copy in a remote output folder if needed.

    With a local output folder, all nodes see the same disk. With a remote one, a vocabulary file
    may exist only on the node of this process.

    Args:
        vocab: A file, local or s3://, or a name on the Hugging Face Hub.
        output: Output folder of the run.
    """
    if storage.is_local(output) or storage.is_remote(vocab) or not Path(vocab).is_file():
        return vocab
    copy = storage.join(output, VOCAB)
    storage.put_file(Path(vocab), copy)
    return copy
