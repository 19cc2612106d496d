"""Coloured squares with captions, and a text encoder of CLIP's kind with random weights, as folders."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

COLOURS = {"red": (220, 30, 30), "green": (20, 180, 40), "blue": (30, 40, 210), "white": (240, 240, 240)}
LENGTH, WIDTH = 6, 8


def save_text_encoder(folder: Path, seed: int = 0, length: int = LENGTH, whole: bool = False, **changes: Any) -> Path:
    """Two layers, a vocabulary of letters and a few merges; `whole` writes a CLIP with its image half."""
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder.mkdir(parents=True, exist_ok=True)
    merges = ["r e", "re d</w>", "b l", "bl u", "blu e</w>", "a r", "ar e</w>"]
    letters = list("abcdefghijklmnopqrstuvwxyz0123456789,.")
    words = [*letters, *(f"{letter}</w>" for letter in letters), *(merge.replace(" ", "") for merge in merges)]
    vocabulary = {word: place for place, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    settings = {
        "vocab_size": len(vocabulary),
        "hidden_size": WIDTH,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": length,
        "bos_token_id": vocabulary["<|startoftext|>"],
        "eos_token_id": vocabulary["<|endoftext|>"],
        **changes,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if whole:
            image = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
            vision = {**image, "image_size": 8, "patch_size": 4}
            CLIPModel(CLIPConfig(text_config=settings, vision_config=vision)).save_pretrained(folder)
        else:
            CLIPTextModel(CLIPTextConfig(**settings)).save_pretrained(folder)
    return folder


def save_autoencoder(folder: Path) -> Path:
    """4 latent channels at half the size."""
    from diffusers import AutoencoderKL

    with torch.random.fork_rng():
        torch.manual_seed(0)
        ways = {"down": "DownEncoder", "up": "UpDecoder"}
        blocks: Any = {f"{way}_block_types": (f"{name}Block2D",) * 2 for way, name in ways.items()}
        AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, **blocks).save_pretrained(folder)
    return folder


def texts_of(number: int) -> list[str]:
    """One to three captions of square `number`."""
    colour = list(COLOURS)[number % len(COLOURS)]
    return [f"a {colour} square", f"{colour}", f"number {number}"][: 1 + number % 3]


def save_squares(folder: Path, counts: Sequence[int] = (11, 3), size: int = 8) -> Path:
    """train/ and test/ with so many squares of `size` pixels, and a captions.jsonl each."""
    for split, count in zip(("train", "test"), counts, strict=True):
        (folder / split).mkdir(parents=True)
        lines = []
        for number in range(count):
            pixels = np.zeros((size, size, 3), dtype=np.uint8)
            pixels[1:-1, 1:-1] = list(COLOURS.values())[number % len(COLOURS)]
            pixels[number % size] = number
            Image.fromarray(pixels).save(folder / split / f"{number:02d}.png")
            texts = texts_of(number)
            lines.append({"file_name": f"{number:02d}.png", "text": texts[0] if len(texts) == 1 else texts})
        (folder / split / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder
