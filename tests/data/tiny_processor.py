"""A small Qwen-like checkpoint directory (tokenizer, template, preprocessing) for the tests of this folder."""

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from latent_jax.data.chat import Processor

SPECIALS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
TEMPLATE = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}<|im_start|>system\nBe helpful.<|im_end|>\n"
    "{% endif %}<|im_start|>{{ m['role'] }}\n{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for p in m['content'] %}{% if p['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif p['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>{% else %}{{ p['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = "What colour is the red ball left of the blue cube? It is large, and small things are green. one two naïve"


def tokenizer(specials=SPECIALS, template=TEMPLATE):
    inner = Tokenizer(models.BPE())
    inner.normalizer = normalizers.NFC()
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=sorted(alphabet), show_progress=False)
    inner.train_from_iterator([WORDS] * 4, trainer)
    inner.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    return PreTrainedTokenizerFast(tokenizer_object=inner, chat_template=template, pad_token="<|endoftext|>")


def write(directory: Path, **changes) -> Path:
    tokenizer(**changes).save_pretrained(directory)
    preprocessing = {
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "min_pixels": 28 * 28,
        "max_pixels": 112 * 112,
    }
    (directory / "preprocessor_config.json").write_text(json.dumps(preprocessing))
    vision = {"window_size": 56, "patch_size": 14, "spatial_merge_size": 2, "tokens_per_second": 2}
    (directory / "config.json").write_text(json.dumps({"model_type": "qwen2_5_vl", "vision_config": vision}))
    return directory


def processor(directory: Path) -> Processor:
    return Processor.from_directory(write(directory))
