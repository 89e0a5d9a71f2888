"""Vocabularies: local, remote, and shared with other nodes."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest

from pipelines.artifacts.vocabulary import open_tokenizer, share_vocabulary
from pipelines.common import storage
from pipelines.video.synthetic import dataset
from stgt.errors import SettingError


@pytest.fixture
def vocab(tmp_path: Path) -> str:
    path = str(tmp_path / "vocab.txt")
    dataset.write_vocabulary(path)
    return path


@pytest.fixture
def remote() -> str:
    """A folder that is no local path."""
    return f"memory://{uuid.uuid4().hex}"


def test_a_remote_vocabulary_is_the_same_as_its_local_copy(vocab: str, remote: str) -> None:
    uri = storage.join(remote, "words.txt")
    storage.put_file(Path(vocab), uri)
    assert open_tokenizer(uri).entries() == open_tokenizer(vocab).entries()


def test_a_missing_remote_vocabulary_is_named(remote: str) -> None:
    with pytest.raises(SettingError, match=f"vocabulary {remote}/none.txt: no such file"):
        open_tokenizer(f"{remote}/none.txt")


def test_a_local_vocabulary_is_copied_into_a_remote_output_folder(vocab: str, remote: str) -> None:
    copy = share_vocabulary(vocab, remote)
    Path(vocab).unlink()  # as on a node that does not have it
    assert copy.startswith(remote)
    assert len(open_tokenizer(copy).entries()) > 5


def test_what_all_nodes_can_read_is_not_copied(vocab: str, remote: str, tmp_path: Path) -> None:
    output = tmp_path / "run"
    assert share_vocabulary(vocab, str(output)) == vocab
    assert not output.exists()
    assert share_vocabulary("bert-base-uncased", remote) == "bert-base-uncased"
    assert share_vocabulary(f"{remote}/words.txt", remote) == f"{remote}/words.txt"
    assert not storage.exists(storage.join(remote, "vocab.txt"))
