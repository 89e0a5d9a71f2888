"""Digests in 16 bytes each, against a set of Python."""

from __future__ import annotations

import hashlib
import random

import numpy as np

from pipelines.common.digest_set import DIGEST, DigestSet, digests_of_hex, digests_of_texts


def test_it_tells_what_is_new_as_a_set_of_python_does() -> None:
    source, known, found = random.Random(0), set[bytes](), DigestSet()
    # Few different ones, some of which end in zero bytes or begin with them.
    all_of_them = [bytes([one % 3, 0, one]) + bytes(12) + bytes([one % 2]) for one in range(200)]
    for _ in range(300):
        batch = [source.choice(all_of_them) for _ in range(source.randrange(6))]
        digests = np.frombuffer(b"".join(batch), dtype=DIGEST)
        assert found.contains(digests).tolist() == [one in known for one in batch]
        expected = []
        for one in batch:
            expected.append(one not in known)
            known.add(one)
        assert found.add(digests).tolist() == expected
        assert len(found) == len(known)


def test_it_may_begin_with_repeated_digests() -> None:
    digests = digests_of_texts(["a", "b", "a"])
    found = DigestSet(digests)
    assert len(found) == 2
    assert found.contains(digests_of_texts(["c", "b"])).tolist() == [False, True]
    assert not DigestSet().contains(digests).any()


def test_digests_of_texts_and_of_hexadecimal_digits_are_the_same() -> None:
    texts = ["https://a.example/1.mp4", "\u00e9", ""]
    digits = [hashlib.sha256(text.encode()).hexdigest()[:32] for text in texts]
    assert digests_of_texts(texts).tolist() == digests_of_hex(digits).tolist()
