"""Answers that are generated: `question [SEP] answer [SEP]`, word by word after the clip.

The Q-Former reads the question as the beginning of a caption and continues it with the answer.
Only the words of the answer and the [SEP] token that ends it count in the loss. To answer, all
answers of the vocabulary are ranked by their likelihood, which is the product of the probabilities
of these tokens, so answers of different lengths are compared as wholes.

Legend: N questions, S question tokens, K answers, A tokens of the longest answer, M visual tokens,
D vision width, Q query tokens, W words.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from stgt.inputs.tokenizer import TextTokens, Tokenizer
from stgt.network.captioning import query_keys_values
from stgt.network.qformer import QFormer
from stgt.network.qformer_steps import (
    KeysValues,
    attend,
    embed,
    feed_forward_text,
    keys_values,
    layers_of,
)
from stgt.question_answering.vocabulary import AnswerVocabulary

ANSWERS_AT_A_TIME = 256
"""Answers whose words are scored together, for one question. Logits of the published model's 30,523
words for 256 answers of 4 tokens take 125 MB."""


def tokenize_answers(tokenizer: Tokenizer, vocabulary: AnswerVocabulary) -> TextTokens:
    """Tokenize answers as the words that follow a question: without a first token, with [SEP].

    Answers are not cleaned as captions are, since different answers could become equal.

    Returns:
        Ids and mask [K, A].
    """
    most = max(len(answer) for answer in vocabulary.answers) + 2  # a token has a character or more
    text = tokenizer.as_written(vocabulary.answers, most)
    longest = int(text.attention_mask.sum(dim=1).max())
    return TextTokens(text.input_ids[:, 1:longest], text.attention_mask[:, 1:longest])


def answer_losses(
    qformer: QFormer,
    video_tokens: torch.Tensor,
    questions: TextTokens,
    answers: TextTokens,
    bos_id: int,
) -> torch.Tensor:
    """Compute the negative log-likelihood [N] float of an answer to each question.

    Args:
        qformer: The Q-Former.
        video_tokens: [N, M, D] float.
        questions: Ids and mask [N, S], from the tokenizer.
        answers: Ids and mask [N, A] of the answer to each question, from `tokenize_answers`.
        bos_id: Id of the captioning start token, which replaces the first token of a question.
    """
    lengths = questions.attention_mask.sum(dim=1, keepdim=True)
    longest = answers.input_ids.shape[1]
    places = lengths + torch.arange(longest, device=lengths.device)  # of the answers' tokens
    ids, mask = (
        F.pad(question, (0, longest)).scatter(1, places, answer)
        for question, answer in (
            (questions.input_ids, answers.input_ids),
            (questions.attention_mask, answers.attention_mask.to(questions.attention_mask.dtype)),
        )
    )
    ids[:, 0] = bos_id
    _, logits = qformer.encode_causal(video_tokens, ids, mask)
    # The token at a place is predicted by the state before it.
    chosen = (places - 1)[..., None].expand(-1, -1, logits.shape[-1])
    predicted = logits.gather(1, chosen).float()
    losses = F.cross_entropy(predicted.transpose(1, 2), answers.input_ids, reduction="none")
    return (losses * answers.attention_mask).sum(dim=1)


def answer_log_likelihoods(
    qformer: QFormer,
    video_tokens: torch.Tensor,
    questions: TextTokens,
    answers: TextTokens,
    bos_id: int,
) -> torch.Tensor:
    """Compute the log-likelihood [N, K] float32 of every answer to each question.

    The clip and the question run through the layers once, and their keys and values serve all
    answers.

    Args:
        qformer: A Q-Former in eval mode.
        video_tokens: [N, M, D] float.
        questions: Ids and mask [N, S], from the tokenizer.
        answers: Ids and mask [K, A] of all answers, from `tokenize_answers`.
        bos_id: Id of the captioning start token.
    """
    queries = query_keys_values(qformer, video_tokens)
    found = []
    for number, length in enumerate(questions.attention_mask.sum(dim=1).tolist()):
        ids = questions.input_ids[number : number + 1, :length].clone()
        ids[:, 0] = bos_id
        clip = [
            KeysValues(
                queries[number : number + 1, layer, 0], queries[number : number + 1, layer, 1]
            )
            for layer in range(queries.shape[1])
        ]
        states, seen = _continued(qformer, ids, 0, clip)
        first = _log_probabilities(qformer, states[:, -1])  # [1, W]
        found.append(
            torch.cat(
                [
                    _continuation(qformer, first, seen, length, ids_of, mask_of)
                    for ids_of, mask_of in zip(
                        answers.input_ids.split(ANSWERS_AT_A_TIME),
                        answers.attention_mask.split(ANSWERS_AT_A_TIME),
                        strict=True,
                    )
                ]
            )
        )
    return torch.stack(found)


def _continuation(
    qformer: QFormer,
    first: torch.Tensor,
    seen: list[KeysValues],
    length: int,
    ids: torch.Tensor,
    mask: torch.Tensor,
) -> torch.Tensor:
    """Return the log-likelihoods [K] of answers [K, A] after one question of `length` tokens."""
    scores = first[0, ids[:, 0]][:, None]
    if ids.shape[1] > 1:
        states, _ = _continued(qformer, ids[:, :-1], length, seen)
        later = _log_probabilities(qformer, states).gather(2, ids[:, 1:, None])[..., 0]
        scores = torch.cat([scores, later], dim=1)
    return (scores * mask).sum(dim=1)


def _continued(
    qformer: QFormer, ids: torch.Tensor, start: int, seen: list[KeysValues]
) -> tuple[torch.Tensor, list[KeysValues]]:
    """Run texts [N, S] that begin at position `start` through the layers, after what was seen.

    Returns:
        Their states [N, S, H], and the keys and values of each layer with theirs added.
    """
    count, size = ids.shape
    before = seen[0].keys.shape[2]
    mask = torch.ones(size, before + size, dtype=torch.bool, device=ids.device).tril(before)
    positions = torch.arange(start, start + size, device=ids.device)
    states = embed(qformer, qformer.word_embeddings(ids) + qformer.position_embeddings(positions))
    kept = []
    for layer, known in zip(layers_of(qformer), seen, strict=True):
        known = KeysValues(
            known.keys.expand(count, -1, -1, -1), known.values.expand(count, -1, -1, -1)
        )
        everything = known.followed_by(keys_values(layer.attention, states))
        kept.append(everything)
        states = feed_forward_text(layer, attend(layer.attention, states, everything, mask))
    return states, kept


def _log_probabilities(qformer: QFormer, states: torch.Tensor) -> torch.Tensor:
    """Return the log-probabilities [..., W] float32 of the next word after states [..., H]."""
    logits = qformer.caption_head(states, qformer.word_embeddings.weight)
    return logits.float().log_softmax(dim=-1)
