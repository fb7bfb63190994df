"""The embedded model's tokenizer: Qwen2's byte-level BPE and special tokens with a vocabulary that fits `scenes`.

Every word of the world, of its questions and of the chat's scaffolding is one token, with and without a leading space
where it occurs so; anything else falls back to pieces or bytes. Matches HF Qwen2Tokenizer (the published
tokenizer.json of Qwen2.5-VL) in pre-tokenisation, normalisation and special tokens.
"""

import collections
import json
import os
import random
import re
from pathlib import Path
from typing import Any

from latent_jax.data.scenes.captions import captions
from latent_jax.data.scenes.chat_template import CHAT_TEMPLATE
from latent_jax.data.scenes.questions import ANSWERS, Asker
from latent_jax.data.scenes.world import MATERIALS, PLACEMENTS, sample

SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
# Added to the vocabulary but, as published, kept when special tokens are skipped.
ADDED = (
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
)
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
# What stands around the world's own text: the chat template, the benchmarks' prompts, instructions of the methods.
SCAFFOLD = (
    "system\nYou are a helpful assistant.",
    "user\n",
    "assistant\n",
    "Picture 1: Video 1: ",
    "Describe the image.",
    "Describe this image in one sentence.",
    "What is in the image?",
    "Imagine an image of this scene: ",
    "Answer the question using a single word or phrase.",
    "Question: Answer: ",
    "The picture shows the description of it.",
)
_SCENES = 100


def write(directory: str | os.PathLike) -> dict[str, int]:
    """Writes tokenizer, chat template, preprocessor and generation files as HF expects them beside a checkpoint.

    Returns token -> id. The bytes depend on nothing but this package.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    alphabet = _byte_characters()
    merges = _train(_words(), alphabet)
    pieces = [*alphabet.values(), *(first + second for first, second in merges)]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    ids = {**vocabulary, **{token: len(vocabulary) + index for index, token in enumerate((*SPECIAL, *ADDED))}}
    files = {
        "vocab.json": vocabulary,
        "tokenizer.json": _tokenizer(vocabulary, merges, ids),
        "tokenizer_config.json": _tokenizer_config(ids),
        "special_tokens_map.json": {
            "additional_special_tokens": list(SPECIAL[1:]),
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
        },
        "chat_template.json": {"chat_template": CHAT_TEMPLATE},
        "preprocessor_config.json": _preprocessor_config(),
        "generation_config.json": {
            "bos_token_id": ids["<|endoftext|>"],
            "do_sample": False,
            "eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]],
            "pad_token_id": ids["<|endoftext|>"],
        },
    }
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    lines = ["#version: 0.2", *(f"{first} {second}" for first, second in merges)]
    (directory / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return ids


def _byte_characters() -> dict[int, str]:
    """GPT-2's printable stand-in for every byte: itself where it prints, else one from 256 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + index) for index, byte in enumerate(hidden)}


def _words() -> collections.Counter[str]:
    """Pre-tokenised words of the world's texts and of the scaffolding, with how often they occur."""
    texts = []
    for placement in PLACEMENTS:
        asker = Asker("compositional")
        for number in range(_SCENES):
            rng = random.Random(f"tokenizer {placement} {number}")
            scene = sample(rng, "compositional", placement=placement, objects=(2, 4), striped=0.3)
            texts += captions(scene, rng)
            for draft in asker.ask(scene, rng):
                texts += [draft.question, draft.answer, draft.full_answer]
    texts += _SCENES * SCAFFOLD
    spellings = {*ANSWERS, *MATERIALS, *(word.capitalize() for word in ANSWERS)}
    texts += sorted(spellings) + [f" {word}" for word in sorted(spellings)]
    # Python's re knows no \p{L}; these texts are ASCII.
    ascii_split = SPLIT.replace(r"\p{L}\p{N}", "a-zA-Z0-9").replace(r"\p{L}", "[a-zA-Z]").replace(r"\p{N}", "[0-9]")
    pattern = re.compile(ascii_split)
    return collections.Counter(word for text in texts for word in pattern.findall(text))


def _train(words: collections.Counter[str], alphabet: dict[int, str]) -> list[tuple[str, str]]:
    """Byte-pair merges, the most frequent pair first (ties by spelling), until every word is one piece."""
    split = {tuple(alphabet[byte] for byte in word.encode()): count for word, count in words.items()}
    merges: list[tuple[str, str]] = []
    while True:
        pairs: collections.Counter[tuple[str, str]] = collections.Counter()
        for pieces, count in split.items():
            for pair in zip(pieces, pieces[1:], strict=False):
                pairs[pair] += count
        if not pairs:
            return merges
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        split = {_merge(pieces, best): count for pieces, count in split.items()}


def _merge(pieces: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    merged: list[str] = []
    for piece in pieces:
        if merged and (merged[-1], piece) == pair:
            merged[-1] += piece
        else:
            merged.append(piece)
    return tuple(merged)


def _tokenizer(vocabulary: dict[str, int], merges: list[tuple[str, str]], ids: dict[str, int]) -> dict[str, Any]:
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": ids[token], **_added(token)} for token in (*SPECIAL, *ADDED)],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": SPLIT}, "behavior": "Isolated", "invert": False},
                byte_level,
            ],
        },
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": [list(pair) for pair in merges],
        },
    }


def _added(token: str) -> dict[str, str | bool]:
    return {
        "content": token,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": token in SPECIAL,
    }


def _tokenizer_config(ids: dict[str, int]) -> dict[str, Any]:
    return {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {str(ids[token]): _added(token) for token in (*SPECIAL, *ADDED)},
        "additional_special_tokens": list(SPECIAL[1:]),
        "bos_token": None,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 131072,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }


def _preprocessor_config() -> dict[str, Any]:
    """Published mean, std and patching; pixel limits around the world's 112 x 112 (56 x 56 to 224 x 224)."""
    return {
        "min_pixels": 56 * 56,
        "max_pixels": 224 * 224,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
    }
