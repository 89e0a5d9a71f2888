"""Opens a vocabulary wherever it is, and puts it where all nodes of a cluster can read it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.artifacts.checkpoints import (
    VOCAB,
    is_hub_name,
    open_tokenizer_of,
    small_files,
)
from pipelines.common import storage
from stgt.errors import SettingError
from stgt.interface.inputs import HUB_TOKENIZER_FILES

if TYPE_CHECKING:
    from stgt.interface.inputs import TextTokenizer

TOKENIZER = "tokenizer"
"""Folder in an output folder for the files of a model's tokenizer."""


def open_tokenizer(vocab: str) -> TextTokenizer:
    """Load the tokenizer of a vocabulary.

    Args:
        vocab: A vocabulary file of BERT, local or s3://, its name on the Hugging Face Hub, a folder
            with the files of a tokenizer, or `hf:NAME` for those of a model on the hub.

    Raises:
        SettingError: The vocabulary does not exist or cannot be used.
    """
    # Imported here because transformers loads slowly, and most commands need no tokenizer.
    from stgt.inputs.hub_tokenizer import load_tokenizer

    if is_hub_name(vocab):
        return open_tokenizer_of(vocab)
    if storage.is_local(vocab):
        return load_tokenizer(vocab)
    if storage.is_file(vocab):
        with storage.as_local(vocab) as path:
            return load_tokenizer(path)
    if not storage.list_names(vocab):
        raise SettingError(f"vocabulary {vocab}: no such file")
    with small_files(vocab) as folder:
        return load_tokenizer(folder)


def share_vocabulary(vocab: str, output: str) -> str:
    """Return a vocabulary that all nodes can read, as a copy in a remote output folder if needed.

    With a local output folder, all nodes see the same disk. With a remote one, a vocabulary file
    may exist only on the node of this process.

    Args:
        vocab: A file, local or s3://, or a name on the Hugging Face Hub.
        output: Output folder of the run.
    """
    if storage.is_local(output) or storage.is_remote(vocab) or not Path(vocab).exists():
        return vocab
    if Path(vocab).is_dir():  # the tokenizer of a model
        for name in (VOCAB, *HUB_TOKENIZER_FILES):
            if (Path(vocab) / name).is_file():
                storage.put_file(Path(vocab) / name, storage.join(output, TOKENIZER, name))
        return storage.join(output, TOKENIZER)
    copy = storage.join(output, VOCAB)
    storage.put_file(Path(vocab), copy)
    return copy
