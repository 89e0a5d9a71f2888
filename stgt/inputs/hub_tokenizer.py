"""Tokenizers in the form of the Hugging Face Hub, which models other than STGT bring along.

Legend: N texts, S text tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from stgt.errors import SettingError
from stgt.inputs.tokenizer import TextTokens, Tokenizer
from stgt.interface.inputs import VOCAB_FILE

if TYPE_CHECKING:
    from stgt.interface.inputs import TextTokenizer

SETTINGS = "tokenizer_config.json"
LOWER_CASED = "Gemma"
"""Beginning of the names of tokenizers that do not lower the case of texts themselves, although the
models that use them here, SigLIP 2, were trained on lower-cased texts."""


def load_tokenizer(source: str | Path) -> TextTokenizer:
    """Load a tokenizer.

    Args:
        source: A folder with vocab.txt, as models of this project have it, or with tokenizer files
            of the hub; a vocabulary file of BERT; or the name of a BERT vocabulary on the hub.

    Raises:
        SettingError: There is none, or it cannot be used.
    """
    folder = Path(source)
    if not folder.is_dir():
        return Tokenizer(source)
    if (folder / VOCAB_FILE).is_file():
        return Tokenizer(folder / VOCAB_FILE)
    if (folder / SETTINGS).is_file():
        return HubTokenizer(folder)
    raise SettingError(
        f"{folder} contains no tokenizer: neither {SETTINGS}, as on the hub, nor {VOCAB_FILE}; "
        "copy the files of the model's tokenizer there"
    )


class HubTokenizer:
    """A tokenizer of transformers, loaded from local files without running their code.

    Texts are given to it as they are: unlike STGT, these models were trained on texts that only
    their tokenizer cleaned.
    """

    def __init__(self, folder: Path) -> None:
        """Load a tokenizer.

        Args:
            folder: Folder with its files.

        Raises:
            SettingError: The files are missing, damaged or of an unknown tokenizer.
        """
        from transformers import AutoTokenizer

        try:
            self._hub: Any = AutoTokenizer.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False
            )
        except (OSError, ValueError, KeyError, ImportError) as error:
            reason = " ".join(str(error).split())[:300]
            raise SettingError(
                f"the tokenizer in {folder} cannot be loaded ({reason}); copy all tokenizer files "
                "of the model there"
            ) from error
        if self._hub.pad_token_id is None:
            raise SettingError(
                f"the tokenizer in {folder} has no padding token; use the files of the model's own "
                "tokenizer"
            )

    def __len__(self) -> int:
        return len(self._hub)

    @property
    def pad_id(self) -> int:
        """Id of the padding token."""
        return int(self._hub.pad_token_id)

    @property
    def sep_id(self) -> int:
        """Id of the token that ends a text; -1 if there is none."""
        ending = self._hub.eos_token_id
        ending = self._hub.sep_token_id if ending is None else ending
        return -1 if ending is None else int(ending)

    def entries(self) -> list[str]:
        """Return the vocabulary in id order."""
        by_id = sorted(self._hub.get_vocab().items(), key=lambda item: item[1])
        return [entry for entry, _ in by_id]

    def save_to(self, folder: Path) -> None:
        """Write the tokenizer's files to a folder."""
        self._hub.save_pretrained(str(folder))

    def __call__(self, captions: Sequence[str], max_tokens: int) -> TextTokens:
        """Tokenize, truncate and pad captions; see `encode`."""
        import torch

        input_ids, attention_mask = self.encode(captions, max_tokens)
        return TextTokens(torch.from_numpy(input_ids), torch.from_numpy(attention_mask))

    def encode(
        self, captions: Sequence[str], max_tokens: int
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Tokenize, truncate and pad captions, without loading torch.

        Args:
            captions: N texts.
            max_tokens: Length S to which captions are truncated or padded.

        Returns:
            Ids and attention mask, each [N, S].

        Raises:
            SettingError: `captions` is empty, a bare string, or contains something other than
                strings.
        """
        if (
            isinstance(captions, str)
            or not captions
            or not all(isinstance(caption, str) for caption in captions)
        ):
            raise SettingError(f"captions: expected a non-empty list of strings, got {captions!r}")
        lowered = type(self._hub).__name__.startswith(LOWER_CASED)
        encoded = self._hub(
            [caption.lower() for caption in captions] if lowered else list(captions),
            padding="max_length",
            truncation=True,
            max_length=max_tokens,
            return_attention_mask=True,
            return_tensors="np",
        )
        return (
            np.asarray(encoded["input_ids"], dtype=np.int64),
            np.asarray(encoded["attention_mask"], dtype=np.int64),
        )
