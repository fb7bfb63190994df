"""The model of an evaluation and its checksum, batches of questions and their replies, and the limit of bad ones."""

import concurrent.futures
import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from latent_jax.benchmarks.items import Item, Reply, ScoredItem, check_text
from latent_jax.config import evaluation
from latent_jax.config.evaluation import Evaluation
from latent_jax.errors import UserError, one_line
from latent_jax.evaluation.predictions import Scoring

Send = Callable[[Sequence[Item]], Sequence[str]]  # questions -> the replies to them, in their order
_PIECE = 8 * 2**20
# Of a checkpoint what no answer depends on; of a model folder what is no part of the model.
_UNREAD = ("opt_state", "iterator", "extra", "README.md", "LICENSE")
_KINDS = (".safetensors", ".json", ".jinja", ".model", ".txt")


def known(path: str, directory: Path, earlier: dict | None, asks: bool) -> tuple[dict | None, list[str]]:
    """(checksum of the model behind `config.model.path`, what to say about it).

    earlier: what the workdir kept. Raises UserError where other weights answered there. A finished evaluation (not
    `asks`) whose model is gone keeps the checksum that it has.
    """
    kept = (earlier or {}).get("weights")
    try:
        found = checksum(path)
    except UserError:
        if asks:
            raise
        return kept, []
    if kept is not None and kept != found:
        raise UserError(
            f"{directory}: was begun with other weights at config.model.path={path!r} ({_named(kept)}, now "
            f"{_named(found)}); use a new --workdir"
        )
    if earlier is None or kept is not None:
        return found, []
    return found, [f"{directory} has no checksum of its model: its earlier replies are taken for those of this one"]


def stamp(path: str) -> dict[str, tuple] | None:
    """File -> number, size and time of all that `checksum` reads of a model on this machine: cheap, and another one
    where a file was written anew. None for what is not there, and for hub ids, whose files do not change."""
    if path and not Path(path).is_dir():
        return None
    try:
        _, _, files = _read_files(path)
        found = {str(file): file.stat() for file in files}
    except (UserError, OSError):
        return None
    return {name: (status.st_ino, status.st_size, status.st_mtime_ns) for name, status in found.items()}


def check_unchanged(path: str, before: dict[str, tuple] | None) -> None:
    """Raises UserError where the model became another one between its checksum and its loading."""
    now = stamp(path)
    if before is None or now == before:
        return
    changed = sorted(name for name in {*before, *(now or {})} if before.get(name) != (now or {}).get(name))
    raise UserError(
        f"{changed[0]}: changed while the model was being read; run the command again (of a run that goes on, name a "
        "step: config.model.path=WORKDIR/checkpoints/STEP)"
    )


def settled(config: Evaluation, directory: Path, stock: bool) -> tuple[Evaluation, list[str]]:
    """(the config with `evaluate.imagine` decided where it is left open, lines worth saying).

    As the evaluation in `directory` was begun, else as the checkpoint's method was made; False for a `stock` model of
    another library. Raises UserError where latents are asked of a model that has none: before anything is loaded, and
    before anything is downloaded wherever that can be known; `load_ours` looks again.
    """
    from latent_jax.config import schema
    from latent_jax.training.workdir import CONFIG

    path, imagine = config.model.path, config.evaluate.imagine
    notes: list[str] = []
    if imagine is None and (directory / CONFIG).exists():
        imagine = getattr(getattr(schema.read(directory / CONFIG)[0], "evaluate", None), "imagine", None)
    if stock or imagine is False:
        imagine = bool(imagine)
    elif imagine:
        if thinking(path) == "":
            raise no_head(path or "tiny_vl")
    else:
        imagine, notes = _as_made(path)
    config = dataclasses.replace(config, evaluate=dataclasses.replace(config.evaluate, imagine=imagine))
    evaluation.check(config)
    return config, notes


def _as_made(path: str) -> tuple[bool, list[str]]:
    """Whether the model's method was made to answer over latents, and what to say of one that only can."""
    from latent_jax import methods
    from latent_jax.models import hf_io

    name = thinking(path)
    if name is None:  # a hub's model with a head: its settings tell, and it is downloaded anyway
        name = thinking(str(hf_io.resolve(path)))
    method = methods.find(name) if name else None
    if method is None or method.span or (method.think and method.think.answers):
        return method is not None, []
    return False, [
        f"no latents are asked for: the method {name} was not made to answer over them; "
        "--config.evaluate.imagine=true asks"
    ]


def no_head(model: str) -> UserError:
    return UserError(
        f"config.evaluate.imagine: got true, but {model} has no latent head; expected a model of the method imagine"
    )


def thinking(path: str) -> str | None:
    """The method of the model of `config.model.path` where it has latents at inference, before answers or inside; ""
    where it has none, None where only loading tells."""
    from latent_jax import methods
    from latent_jax.assets import TINY_VL
    from latent_jax.config import schema
    from latent_jax.models import hf_io
    from latent_jax.runtime.files import read_json
    from latent_jax.training import latent_config
    from latent_jax.training.workdir import CONFIG, is_workdir, named_step

    workdir, step = named_step(path) if path else (path, None)
    folder = Path(path or TINY_VL)
    if path and (step is not None or is_workdir(path)):
        name = schema.read_run(Path(workdir) / CONFIG)[0].method
    elif folder.is_dir():
        file = folder / hf_io.LATENT_CONFIG
        if not file.is_file() and not (folder / hf_io.LATENT_WEIGHTS).is_file():
            return ""
        name = latent_config.settings(read_json(file), str(file)).method
    else:
        return "" if _on_hub(path, hf_io.LATENT_CONFIG) is False else None
    method = methods.find(name)
    return name if method.think or method.span else ""


def _on_hub(model: str, file: str) -> bool | None:
    """Is the file part of a hub id's model? None where the hub does not say: loading it tells why."""
    import huggingface_hub

    try:
        return (Path(huggingface_hub.snapshot_download(model, local_files_only=True)) / file).is_file()
    except Exception:  # not in the cache, or no hub id at all: the hub raises its own, requests' and the file system's
        pass
    try:
        return file in huggingface_hub.list_repo_files(model)
    except Exception:
        return None


def checksum(path: str) -> dict:
    """{"sha256", "files", "step"}: of the names and bytes of all that is read of a model.

    An HF directory or hub id: weights, config, tokenizer, preprocessor, chat template and latent head. A workdir: the
    named or newest checkpoint (`step`; None elsewhere) without the optimiser's state, and the same small files. The
    bytes, not times or names of folders: a copy is the same model. Some seconds for 16 GB that are in memory.
    """
    root, step, files = _read_files(path)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:  # hashlib lets go of the interpreter's lock
        digests = list(pool.map(_digest, files))
    whole = hashlib.sha256()
    for file, digest in zip(files, digests, strict=True):
        whole.update(f"{file.relative_to(root)}\0{digest}\n".encode())
    return {"sha256": whole.hexdigest(), "files": len(files), "step": step}


def _read_files(path: str) -> tuple[Path, int | None, list[Path]]:
    """(folder, step of a workdir, files that are read of the model)."""
    from latent_jax.assets import TINY_VL
    from latent_jax.models import hf_io, sums  # jax: only when a model is asked for
    from latent_jax.training.workdir import CHECKPOINTS, ORIGIN, is_workdir, named_step, steps

    root, step = named_step(path) if path else (None, None)
    if root and (step is not None or is_workdir(root)):
        step = max(steps(root), default=None) if step is None else step
        folders = [root / ORIGIN, *([root / CHECKPOINTS / str(step)] if step is not None else [])]
        files = [file for folder in folders for file in folder.rglob("*")]
        files = [file for file in files if file.is_file()]
        files = [file for file in files if not {*file.relative_to(root).parts} & {*_UNREAD}]
    else:
        root = hf_io.resolve(path or TINY_VL)
        files = [file for file in root.iterdir() if file.suffix in _KINDS and file.is_file() and file.name != sums.FILE]
    return Path(root), step, sorted(file for file in files if file.name not in _UNREAD)


def replies(
    vlm: Any,
    conversations: Sequence[list[dict]],
    tokens: int,
    *,
    thoughts: Any = None,
    spans: Any = None,
    seed: int = 0,
) -> list[str]:
    """Replies of the facade (inference/vlm.py), of at most `tokens` words each.

    Latents inside a reply do not count against its length; their spans are counted in it (items.Reply). `thoughts` and
    `spans` as in VLM.reply; of a model that writes none, `spans` mean nothing.
    """
    if not vlm.writes:
        return vlm.generate(conversations, tokens, thoughts=thoughts, seed=seed)
    found = vlm.reply(conversations, tokens + vlm.span_room, thoughts=thoughts, spans=spans, seed=seed)
    return [Reply(vlm.words(reply, tokens), reply.opened, reply.closed) for reply in found]


def too_many(config: Evaluation, name: str, rows: Sequence[ScoredItem], skipped: int, count: int) -> None:
    """Raises UserError where more questions cannot be asked than `config.data.max_bad` allows."""
    bad = [row for row in rows if row.skipped]
    if bad and len(bad) + skipped > config.data.max_bad * count:
        raise UserError(
            f"{name}, question {bad[0].item.id}: {bad[0].skipped}; so {len(bad) + skipped} of {count} questions, more "
            f"than config.data.max_bad = {config.data.max_bad}"
        )


def most_tokens(benchmark: ModuleType, scorer: str) -> int:
    """The longest reply that the benchmark's original allows."""
    limits = benchmark.MAX_NEW_TOKENS
    return limits[scorer] if isinstance(limits, dict) else limits


def each(batch: Sequence[Item], send: Send, scoring: Scoring) -> list[ScoredItem]:
    """Judged rows of a batch. A question that cannot be sent is a skipped row and no other question's trouble.

    send: items -> their replies.
    """
    texts = {item.id: _unsendable(item, scoring) for item in batch}
    good = [item for item in batch if not texts[item.id]]
    rows = {item.id: scoring.skip(item, why) for item in batch if (why := texts[item.id])}
    rows |= _asked(good, send, scoring)
    return [rows[item.id] for item in batch]


def _asked(items: Sequence[Item], send: Send, scoring: Scoring) -> dict[str, ScoredItem]:
    """Where a batch fails, each half is asked: what fails alone is the question's fault."""
    if not items:
        return {}
    try:
        replies = send(items)
    except (MemoryError, RuntimeError):
        raise  # the device's, not a question's
    except Exception as problem:
        if isinstance(problem, OSError) and problem.errno is not None:
            raise  # a disk that fails; what PIL says of an image has no number
        if len(items) == 1:
            return {items[0].id: scoring.skip(items[0], one_line(problem)[:300] or type(problem).__name__)}
        half = len(items) // 2
        return _asked(items[:half], send, scoring) | _asked(items[half:], send, scoring)
    if len(replies) != len(items):
        raise ValueError(f"{len(replies)} replies to {len(items)} conversations")
    return {item.id: scoring.judge(item, reply) for item, reply in zip(items, replies, strict=True)}


def _unsendable(item: Item, scoring: Scoring) -> str:
    try:
        check_text(scoring.prompt(item))
    except ValueError as problem:
        return str(problem)
    return ""


def _digest(file: Path) -> str:
    found = hashlib.sha256()
    with open(file, "rb") as content:
        while piece := content.read(_PIECE):
            found.update(piece)
    return found.hexdigest()


def _named(weights: dict) -> str:
    step = "" if weights.get("step") is None else f"step {weights['step']}, "
    return f"{step}sha256 {str(weights.get('sha256'))[:12]}"
