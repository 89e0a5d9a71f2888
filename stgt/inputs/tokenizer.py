"""WordPiece tokenizer with a captioning start token.

Legend: N texts, S text tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from transformers import BertTokenizerFast  # type: ignore[attr-defined]

from stgt.errors import SettingError
from stgt.inputs.caption_text import clean_caption

if TYPE_CHECKING:
    import torch

# torch is imported where it is used: a command that only looks up the size of a vocabulary, and
# data workers that do not augment, start seconds sooner without it.

DEC_TOKEN = "[DEC]"  # noqa: S105 - a vocabulary entry, not a secret
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


@dataclass(frozen=True)
class TextTokens:
    """A batch of tokenized texts."""

    input_ids: torch.Tensor
    """[N, S] int64, padded."""
    attention_mask: torch.Tensor
    """[N, S] int64, 1 = real token."""

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    def to(self, device: torch.device) -> TextTokens:
        """Return the batch on a device."""
        return TextTokens(self.input_ids.to(device), self.attention_mask.to(device))

    def select(self, rows: torch.Tensor) -> TextTokens:
        """Return the texts at `rows` [R] int64."""
        return TextTokens(self.input_ids[rows], self.attention_mask[rows])


class Tokenizer:
    """BERT's uncased WordPiece with [DEC] appended as the captioning start token."""

    def __init__(self, vocab: str | Path = "bert-base-uncased") -> None:
        """Load a vocabulary.

        Args:
            vocab: Local vocabulary file with one entry per line, or a model name on the hub.

        Raises:
            SettingError: The local file does not exist, is not text, or lacks BERT's special
                tokens, or the hub has no vocabulary of this name.
        """
        path = Path(vocab)
        if path.is_file():
            try:
                entries = path.read_text(encoding="utf-8").splitlines()
            except UnicodeDecodeError as error:
                raise SettingError(f"vocabulary {path}: is not a text file: {error}") from error
            if missing := [token for token in SPECIAL_TOKENS if token not in entries]:
                raise SettingError(f"vocabulary {path}: lacks {', '.join(missing)}")
            self._bert = BertTokenizerFast(vocab=str(path), do_lower_case=True)
        elif path.suffix == ".txt" or path.is_absolute():
            raise SettingError(f"vocabulary {path}: no such file")
        else:
            self._bert = BertTokenizerFast.from_pretrained(str(vocab))
            # Where the hub cannot be reached, transformers returns only the special tokens.
            if len(self._bert) <= len(SPECIAL_TOKENS):
                raise SettingError(
                    f"vocabulary {vocab}: the Hugging Face Hub cannot be reached or has none of "
                    "this name; give a local file, or check the name and the connection"
                )
        self._bert.add_special_tokens({"bos_token": DEC_TOKEN})

    def __len__(self) -> int:
        return len(self._bert)

    @property
    def bos_id(self) -> int:
        """Id of the captioning start token."""
        return self._bert.convert_tokens_to_ids(DEC_TOKEN)

    @property
    def pad_id(self) -> int:
        """Id of the padding token."""
        return self._bert.pad_token_id

    @property
    def sep_id(self) -> int:
        """Id of the [SEP] token, which ends a text."""
        return self._bert.sep_token_id

    def decode(self, input_ids: torch.Tensor) -> list[str]:
        """Return the texts of ids [N, S] int64, without special tokens."""
        return [
            text.strip() for text in self._bert.batch_decode(input_ids, skip_special_tokens=True)
        ]

    def entries(self) -> list[str]:
        """Return the vocabulary in id order, without the captioning start token."""
        by_id = sorted(self._bert.get_vocab().items(), key=lambda item: item[1])
        return [entry for entry, _ in by_id if entry != DEC_TOKEN]

    def save_to(self, folder: Path) -> None:
        """Write the vocabulary to a model folder."""
        self.save(folder / "vocab.txt")

    def save(self, path: Path) -> None:
        """Write the vocabulary to a file that this class can load."""
        path.write_text("\n".join(self.entries()) + "\n", encoding="utf-8")

    def __call__(self, captions: Sequence[str], max_tokens: int) -> TextTokens:
        """Clean, tokenize, truncate and pad captions; see `encode`."""
        import torch

        input_ids, attention_mask = self.encode(captions, max_tokens)
        return TextTokens(torch.from_numpy(input_ids), torch.from_numpy(attention_mask))

    def as_written(self, captions: Sequence[str], max_tokens: int) -> TextTokens:
        """Tokenize, truncate and pad captions without cleaning them first; see `encode`."""
        import torch

        input_ids, attention_mask = self.encode(captions, max_tokens, clean=False)
        return TextTokens(torch.from_numpy(input_ids), torch.from_numpy(attention_mask))

    def encode(
        self, captions: Sequence[str], max_tokens: int, clean: bool = True
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Clean, tokenize, truncate and pad captions, without loading torch.

        Args:
            captions: N texts.
            max_tokens: Length S to which captions are truncated or padded.
            clean: Whether to clean captions as published for STGT. Without it, all words and
                punctuation marks are kept.

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
        encoded = self._bert(
            # In lower case, entries such as [DEC] are not taken for special tokens.
            [clean_caption(caption) if clean else caption.lower() for caption in captions],
            padding="max_length",
            truncation=True,
            max_length=max_tokens,
            return_tensors="np",
        )
        return (
            np.asarray(encoded["input_ids"], dtype=np.int64),
            np.asarray(encoded["attention_mask"], dtype=np.int64),
        )
