"""The config.json of an evaluation: written when it begins, compared when it resumes.

Its config and, as `measured`, the backend's settings, a checksum of the model (`weights`), the longest reply
(`max_new_tokens`) and a fingerprint of the prepared records (`data`). Prompts, answers and verdicts are compared
with each line of predictions.jsonl (predictions.resume).
"""

from collections.abc import Mapping
from pathlib import Path

from latent_jax.config import schema
from latent_jax.config.evaluation import Evaluation
from latent_jax.errors import UserError
from latent_jax.runtime import provenance
from latent_jax.training.workdir import CONFIG

# How interventions replace latents (analysis/interventions.py): 1 in the head's space, within a batch; 2 as inputs, by
# question.
REPLACED = 2
# The longest replies of the versions that did not keep them, where they are others today.
_EARLIER_TOKENS = {"blink": 64, "scienceqa": 16, "vsp": 128}


def read(config: Evaluation, directory: Path) -> tuple[dict | None, list[str]]:
    """(what an earlier life of this workdir kept, lines worth saying); (None, []) for a new one.

    Raises UserError where the config would change what was replied.
    """
    file = directory / CONFIG
    if not file.exists():
        return None, []
    old, kept = schema.read(file)
    notes = schema.check_resume(old, config)
    backend = kept.get("backend")
    if not isinstance(backend, dict) or not {"min_pixels", "max_pixels"} <= backend.keys():
        raise UserError(f"{file}: 'measured' has no 'backend' with its pixel limits; was it changed by hand?")
    latents = config.evaluate.latents
    if latents in ("noise", "permuted") and old.seed != config.seed:
        raise UserError(
            f"this workdir was begun with another config: config.seed ({old.seed!r} -> {config.seed!r}), on which "
            f"replies to {latents} latents depend; use the old value or a new --workdir"
        )
    return kept, [*notes, *provenance.changes(schema.read_all(file))]


def check(config: Evaluation, directory: Path, kept: Mapping | None, now: Mapping, done: int, asks: bool) -> None:
    """Raises UserError where the replies in the workdir were made with other settings than the next ones would be.

    kept: what `read` found. now: today's `max_new_tokens` and `data`. done: how many replies are there. asks: more will
    be asked.
    """
    if not done:
        return
    if kept is None:
        raise UserError(
            f"{directory}: has replies and no {CONFIG} that says which model gave them; bring it back, or use a new "
            "--workdir"
        )
    tokens = kept.get("max_new_tokens")
    if tokens is None:
        tokens = config.evaluate.max_new_tokens or _EARLIER_TOKENS.get(config.benchmark, now["max_new_tokens"])
    if tokens != now["max_new_tokens"]:
        raise UserError(
            f"{directory}: was begun with replies of at most {tokens} tokens, now it is {now['max_new_tokens']}; use a "
            "new --workdir"
        )
    if asks and config.evaluate.latents != "own" and kept.get("replaced") != REPLACED:
        raise UserError(
            f"{directory}: was begun by a version that put other {config.evaluate.latents} latents in the place of a "
            "model's own; use a new --workdir"
        )
    if asks and kept.get("data") not in (None, now["data"]):
        raise UserError(
            f"{directory}: was begun with other records of {config.benchmark} at config.data.path="
            f"{config.data.path!r}; bring the old back, or use a new --workdir"
        )


def write(config: Evaluation, directory: Path, settings: Mapping, kept: Mapping | None, now: Mapping) -> None:
    """Keeps config, settings and `now` in config.json. Raises UserError where another backend began it."""
    for key, value in (kept["backend"] if kept else {}).items():
        if settings.get(key) != value:
            raise UserError(
                f"{directory}: was begun with {key} = {value!r}, now it is {settings.get(key)!r}; use a new --workdir"
            )
    directory.mkdir(parents=True, exist_ok=True)
    replaced = {"replaced": REPLACED} if config.evaluate.latents != "own" else {}
    schema.write(config, directory / CONFIG, {"backend": dict(settings), **now, **replaced})
