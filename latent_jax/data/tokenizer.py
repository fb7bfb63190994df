"""A checkpoint's tokenizer; any fault of its files is one line."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from latent_jax.config import fields
from latent_jax.data import templates
from latent_jax.data.image_spec import read_json
from latent_jax.errors import UserError, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.json",
    "chat_template.jinja",
)


def read(directory: Path) -> "PreTrainedTokenizerFast":
    """The fast tokenizer of a checkpoint, with a chat template that ends. Raises UserError naming the faulty file."""
    for name in _FILES:
        if (directory / name).exists() and not (directory / name).is_file():
            raise UserError(f"{directory / name}: not a regular file")
    # "PyTorch was not found": so it is meant here.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except BaseException as problem:  # the tokenizer's files can make its Rust half panic, which is no Exception
        if isinstance(problem, KeyboardInterrupt | SystemExit):
            raise
        for name in _FILES:
            if name.endswith(".json") and (directory / name).exists():
                read_json(directory / name)  # names the file if its JSON is the fault
        raise UserError(f"{directory}: no usable tokenizer ({one_line(problem)[:200]})") from None
    if backend := getattr(tokenizer, "backend_tokenizer", None):
        # Trainers leave them in tokenizer.json; transformers too turns them off wherever it is not asked for them.
        backend.no_truncation()
        backend.no_padding()
    file = directory / "chat_template.json"
    if not tokenizer.chat_template and file.exists():
        tokenizer.chat_template = read_json(file).get("chat_template")
    if isinstance(tokenizer.chat_template, dict):  # several by name
        tokenizer.chat_template = tokenizer.chat_template.get("default")
    if not getattr(tokenizer, "is_fast", False) or not tokenizer.chat_template:
        raise UserError(f"{directory}: expected a fast tokenizer (tokenizer.json) with a chat template")
    if not isinstance(tokenizer.chat_template, str):
        raise UserError(f"{directory}: the chat template is {fields.shown(tokenizer.chat_template)}, expected a text")
    try:
        templates.check_ends(tokenizer.chat_template)
        shown = tokenizer.apply_chat_template([{"role": "user", "content": "Hello."}], tokenize=False)
    except UserError as problem:
        raise UserError(f"{directory}: {problem}") from None
    except Exception as problem:  # its syntax, or an attribute that the sandbox refuses
        raise UserError(f"{directory}: the chat template cannot be rendered ({one_line(problem)[:200]})") from None
    if "Hello." not in shown:
        raise UserError(f"{directory}: the chat template does not show what a user says")
    return tokenizer
