"""A set of digests that takes 16 bytes of memory for each of them, for lists of millions of rows.

A Python set of `bytes` takes some 90 bytes for each.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

DIGEST_BYTES = 16
DIGEST = np.dtype(f"S{DIGEST_BYTES}")
Digests = npt.NDArray[np.bytes_]
"""[count], digests of type `DIGEST`."""


def digests_of_hex(texts: Iterable[str]) -> Digests:
    """Return digests from texts of 32 hexadecimal digits each."""
    return np.frombuffer(bytes.fromhex("".join(texts)), dtype=DIGEST)


def digests_of_texts(texts: Iterable[str]) -> Digests:
    """Return the beginnings of the SHA-256 of texts, which may contain lone surrogates."""
    data = (text.encode("utf-8", "surrogatepass") for text in texts)
    joined = b"".join(hashlib.sha256(one).digest()[:DIGEST_BYTES] for one in data)
    return np.frombuffer(joined, dtype=DIGEST)


class DigestSet:
    """Digests in sorted arrays, of which each is at least twice as long as the next one.

    There are few arrays, since those of similar length are merged, and adding n digests one batch
    after another takes the time of sorting them.
    """

    def __init__(self, digests: Digests | None = None) -> None:
        """Begin with some digests, which may be repeated."""
        self._runs: list[Digests] = []
        if digests is not None and len(digests):
            self._runs.append(np.unique(digests))

    def __len__(self) -> int:
        """Return the number of different digests."""
        return sum(map(len, self._runs))

    def contains(self, digests: Digests) -> npt.NDArray[np.bool_]:
        """Return [count] bool: whether each digest is in the set."""
        found = np.zeros(len(digests), dtype=bool)
        for run in self._runs:
            places = np.minimum(np.searchsorted(run, digests), len(run) - 1)
            found |= run[places] == digests
        return found

    def add(self, digests: Digests) -> npt.NDArray[np.bool_]:
        """Add digests.

        Returns:
            [count] bool: whether each one was not there before. Of equal ones, only the first is
            new.
        """
        is_new = np.zeros(len(digests), dtype=bool)
        is_new[np.unique(digests, return_index=True)[1]] = True
        is_new &= ~self.contains(digests)
        if is_new.any():
            self._runs.append(np.sort(digests[is_new]))
        while len(self._runs) > 1 and len(self._runs[-2]) < 2 * len(self._runs[-1]):
            pair = [self._runs.pop(), self._runs.pop()]
            self._runs.append(np.sort(np.concatenate(pair), kind="stable"))
        return is_new
