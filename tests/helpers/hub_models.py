"""Small dual encoders in the form of the Hugging Face Hub, with the files of the real ones."""

from __future__ import annotations

import io
import json
from pathlib import Path

import torch
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTokenizer,
    GemmaTokenizer,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    SiglipTokenizer,
)

SIZE, POSITIONS = 32, 16
TOWER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
SENTENCES = (
    "a red ball moves to the left", "the blue square moves right and then it stops",
    "two people are cooking in a small kitchen", "a dog runs over green grass",
)  # fmt: skip
PIECES = 60


def clip_folder(folder: Path, size: int = SIZE) -> Path:
    """A CLIP of random weights with a byte-level tokenizer."""
    letters = sorted({letter for one in SENTENCES for letter in one if letter != " "})
    entries = [*letters, *(f"{letter}</w>" for letter in letters)]
    merges = ["r e", "re d</w>", "b a", "l e", "le f"]
    entries += ["re", "red</w>", "ba", "le", "lef", "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(
        vocab={entry: number for number, entry in enumerate(entries)},
        merges=[tuple(one.split()) for one in merges],
        model_max_length=POSITIONS,
    )
    text = {
        **TOWER, "vocab_size": len(tokenizer), "max_position_embeddings": POSITIONS,
        "eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    torch.manual_seed(0)
    model = CLIPModel(
        CLIPConfig(
            text_config=text,
            vision_config={**TOWER, "image_size": size, "patch_size": 16},
            projection_dim=24,
        )
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessor(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}
    ).save_pretrained(folder)
    return folder


def _siglip(folder: Path, tokenizer: SiglipTokenizer | GemmaTokenizer) -> Path:
    text = {**TOWER, "vocab_size": len(tokenizer), "max_position_embeddings": POSITIONS}
    torch.manual_seed(0)
    model = SiglipModel(
        SiglipConfig(
            text_config=text, vision_config={**TOWER, "image_size": SIZE, "patch_size": 16}
        )
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    half = [0.5, 0.5, 0.5]
    SiglipImageProcessor(
        size={"height": SIZE, "width": SIZE}, image_mean=half, image_std=half
    ).save_pretrained(folder)
    return folder


def siglip_folder(folder: Path) -> Path:
    """A SigLIP of random weights with a SentencePiece tokenizer."""
    import sentencepiece

    folder.mkdir(parents=True, exist_ok=True)
    pieces = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES), model_writer=pieces, vocab_size=PIECES,
        model_type="unigram", pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
        hard_vocab_limit=False,
    )  # fmt: skip
    (folder / "spiece.model").write_bytes(pieces.getvalue())
    tokenizer = SiglipTokenizer(str(folder / "spiece.model"), model_max_length=POSITIONS)
    return _siglip(folder, tokenizer)


def siglip2_folder(folder: Path) -> Path:
    """A SigLIP 2 with a fixed resolution, which has SigLIP's towers and Gemma's tokenizer."""
    letters = sorted({letter.replace(" ", "\u2581") for one in SENTENCES for letter in one})
    entries = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *letters]
    tokenizer = GemmaTokenizer(
        vocab={entry: number for number, entry in enumerate(entries)},
        merges=[],
        padding_side="right",
        model_max_length=POSITIONS,
    )
    return _siglip(folder, tokenizer)


FOLDERS = {"clip": clip_folder, "siglip": siglip_folder, "siglip2": siglip2_folder}


def change_json(path: Path, **changes: object) -> None:
    """Change settings in a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
