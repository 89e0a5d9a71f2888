"""Puts clips with similar captions next to each other, so that they are negatives of each other.

In a random batch, most captions differ in something that is easy to see, such as what is shown.
Once a model knows that, contrast and matching ask for nothing else. Among captions that share most
of their words, they ask for the rest, such as the direction of a movement.

The order depends only on the captions, their order and a seed, so every data worker finds the same
one, and a resumed run goes on with it. It is made for windows of `WINDOW` samples of an epoch. Of
a clip with several captions, the first one counts, which need not be the one that a batch has.
Where an epoch's length is no multiple of a group's, later groups lie across the ends of batches.
"""

from __future__ import annotations

import re
import zlib
from collections import OrderedDict
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]

WINDOW = 2048
"""Samples that are ordered together. The time per sample grows with it (0.05 ms for 2,048)."""
KEPT_WINDOWS = 2
BUCKETS = 1024
"""Words are told apart by a hash with this many values, which bounds memory and time."""
WORD = re.compile(r"\w+")
STEPS = 16
"""Steps of a word's weight for a factor of e in how rare it is."""


def _words(captions: Sequence[str]) -> npt.NDArray[np.float32]:
    """Return [N, BUCKETS] float32: 1 where a caption has a word of the bucket."""
    found = np.zeros((len(captions), BUCKETS), dtype=np.float32)
    for row, caption in enumerate(captions):
        for word in WORD.findall(caption.lower()):
            found[row, zlib.crc32(word.encode()) % BUCKETS] = 1
    return found


def similar_together(captions: Sequence[str], size: int, seed: Sequence[int]) -> IntArray:
    """Order captions such that groups of similar ones follow each other.

    A group begins with a caption drawn at random and continues with those that share most of its
    words, where rare words count more. Captions that are equal to it are left for other groups,
    since they are no negatives of each other. The groups come in random order.

    Args:
        captions: N texts.
        size: Number of captions in a group, at least 1. Only the last group may have fewer.
        seed: Determines the order.

    Returns:
        [N] int64, a permutation.
    """
    generator = np.random.default_rng(seed)
    words = _words(captions)
    counts = words.sum(axis=0)
    rarity = np.log(len(captions) / np.maximum(counts, 1))
    weights = np.rint(STEPS * rarity).astype(np.float32)
    texts = np.array(captions, dtype=object)
    left = generator.permutation(len(captions))
    groups = []
    while len(left):
        first, others = left[0], left[1:]
        # Sums of whole numbers far below 2**24, so they are exact in float32.
        shared = (words @ (words[first] * weights))[others]
        shared[texts[others] == texts[first]] = -1
        nearest = np.argsort(-shared, kind="stable")[: size - 1]
        groups.append(np.concatenate([left[:1], others[nearest]]))
        left = np.delete(others, nearest)
    whole = [group for group in groups if len(group) == size]
    order = [whole[place] for place in generator.permutation(len(whole))]
    rest = [group for group in groups if len(group) < size]
    return np.concatenate([*order, *rest]).astype(np.int64)


class SimilarOrder:
    """An order of samples in which groups with similar captions follow each other.

    It maps a position of the training to the position of the sample in the plan. Each sample stays
    within its window, and windows end with an epoch, so an epoch has the samples of the plan.
    """

    def __init__(
        self,
        size: int,
        epoch: int,
        seed: int,
        captions: Callable[[IntArray], Sequence[str]],
    ) -> None:
        """Create the order.

        Args:
            size: Number of samples in a group.
            epoch: Number of samples per epoch of the plan.
            seed: Determines the order.
            captions: Returns the captions of the samples at positions [n] of the plan.
        """
        self._size, self._epoch, self._seed, self._captions = size, epoch, seed, captions
        self._windows: OrderedDict[tuple[int, int], IntArray] = OrderedDict()

    def __call__(self, positions: IntArray) -> IntArray:
        """Return the positions in the plan [n] int64 of the samples at positions [n] int64."""
        epochs, samples = np.divmod(np.asarray(positions, dtype=np.int64), self._epoch)
        windows, offsets = np.divmod(samples, WINDOW)
        found = np.empty_like(samples)
        for epoch, window in np.unique(np.stack([epochs, windows]), axis=1).T.tolist():
            inside = (epochs == epoch) & (windows == window)
            found[inside] = self._window(epoch, window)[offsets[inside]]
        return found

    def _window(self, epoch: int, window: int) -> IntArray:
        key = (epoch, window)
        if key not in self._windows:
            stop = min((window + 1) * WINDOW, self._epoch)
            places = epoch * self._epoch + np.arange(window * WINDOW, stop)
            seed = (self._seed, *key)
            order = similar_together(self._captions(places), self._size, seed)
            self._windows[key] = places[order]
            while len(self._windows) > KEPT_WINDOWS:
                self._windows.popitem(last=False)
        return self._windows[key]
