"""Models that answer questions begin with weights of models that do not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from stgt.alpro.config import alpro_tiny
from stgt.config import stgt_tiny
from stgt.errors import CheckpointMismatchError
from stgt.interface.kinds import build
from stgt.model_folder import load_initial_weights, load_model, save_model
from stgt.question_answering.vocabulary import AnswerVocabulary

VOCABULARY = AnswerVocabulary(("cat", "dog", "two"))


def changed(config: Any, num_answers: int, num_frames: int) -> Any:
    return replace(config, num_answers=num_answers, num_frames=num_frames)


@pytest.mark.parametrize("config", [stgt_tiny(), alpro_tiny()])
def test_a_classifier_is_new_and_time_embeddings_are_used_twice(
    config: Any, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    source = build(changed(config, 0, 3))
    save_model(source, tmp_path)
    model = build(changed(config, 3, 6))
    new = {name: value.clone() for name, value in model.state_dict().items()}

    load_initial_weights(model, tmp_path)

    (table,) = model.time_tables
    theirs = source.state_dict()
    for name, value in model.state_dict().items():
        if name.startswith("classifier."):
            torch.testing.assert_close(value, new[name])
        elif name == table:
            expected = theirs[name].repeat_interleave(2, dim=-2)
            torch.testing.assert_close(value, expected)
        else:
            torch.testing.assert_close(value, theirs[name])


@pytest.mark.parametrize("config", [stgt_tiny(), alpro_tiny()])
def test_a_saved_model_keeps_its_answers(config: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build(changed(config, 3, 3))
    model.answers = VOCABULARY
    save_model(model, tmp_path)

    again = load_model(tmp_path)

    assert again.answers == VOCABULARY
    mine, theirs = model.state_dict(), again.state_dict()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_a_classifier_of_another_size_is_refused(tmp_path: Path) -> None:
    save_model(build(changed(stgt_tiny(), 3, 3)), tmp_path)

    with pytest.raises(CheckpointMismatchError, match=r"classifier\.2\.weight"):
        load_initial_weights(build(changed(stgt_tiny(), 4, 3)), tmp_path)
