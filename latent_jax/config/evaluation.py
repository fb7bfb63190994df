"""The config of the job `evaluate`, and the checks that involve several of its options."""

import dataclasses
import importlib
import pkgutil

from latent_jax.config.fields import option
from latent_jax.config.training import check_pixels
from latent_jax.errors import UserError

# What may stand where a model predicts latents: its own, an intervention, or none.
LATENTS = ("own", "zero", "noise", "mean", "shuffled", "permuted", "donor", "none")


@dataclasses.dataclass(frozen=True)
class Model:
    path: str = option("", "HF directory, hub id or workdir of what is evaluated; empty = the embedded tiny model")
    dtype: str = option("auto", "of the weights; auto = the checkpoint's", choices=("auto", "float32", "bfloat16"))


@dataclasses.dataclass(frozen=True)
class Data:
    name: str = option("", "dataset; empty = the benchmark's own, or with no path the embedded one of its form")
    path: str = option("", "directory of the prepared dataset; empty = the embedded one")
    split: str = option("", "split to ask; empty = the benchmark's usual one")
    min_pixels: int = option(0, "least pixels of a resized image; 0 = the checkpoint's", low=0)
    max_pixels: int = option(0, "most pixels of a resized image; 0 = the checkpoint's", low=0)
    max_bad: float = option(
        0.05, "share of unusable questions that is skipped before it is an error", low=0, high=1, resumable=True
    )


@dataclasses.dataclass(frozen=True)
class Evaluate:
    scorer: str = option(
        "official",
        "whose prompt, parser and metrics; numbers of two never share a table",
        choices=("official", "lmms_eval"),
    )
    prompt: str = option(
        "", "another prompt: {question} stands for the bare question, {prompt} for the scorer's own; empty = the latter"
    )
    batch_size: int = option(16, "questions asked at a time", low=1, resumable=True)
    max_new_tokens: int = option(0, "longest reply; 0 = the benchmark's own", low=0)
    examples: int = option(0, "questions asked, from the first; 0 = all", low=0, resumable=True)
    imagine: bool | None = option(
        None,
        "ask for latents after each prompt, and for the answer over them; none = as the checkpoint's method was made",
    )
    latents: str = option("own", "what stands where latents are predicted", choices=LATENTS)
    interventions: bool = option(
        False, "then repeat it with every other thing in the latents' place, and compare", resumable=True
    )
    donors: str = option("", "latents=donor: JSON file {question id: id of the question whose latents it gets}")
    choices: str = option("", "GQA's *_choices.json, for validity and plausibility", resumable=True)


@dataclasses.dataclass(frozen=True)
class Log:
    progress: bool = option(True, "show progress on standard error", resumable=True)


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The whole config of an evaluation."""

    job: str = option("evaluate", "what to do", choices=("evaluate",))
    benchmark: str = option("gqa", "a module of latent_jax/benchmarks")
    seed: int = option(0, "seed of resampling", low=0, high=2**31 - 1, resumable=True)
    model: Model = Model()
    data: Data = Data()
    evaluate: Evaluate = Evaluate()
    log: Log = Log()


def benchmarks() -> list[str]:
    """The modules of latent_jax/benchmarks that declare `SCORERS`."""
    from latent_jax import benchmarks as package

    names = sorted(module.name for module in pkgutil.iter_modules(package.__path__))
    return [name for name in names if hasattr(importlib.import_module(f"{package.__name__}.{name}"), "SCORERS")]


def check(config: Evaluation) -> None:
    """The checks that involve more than one option. Raises UserError."""
    if config.benchmark not in benchmarks():
        raise UserError(f"config.benchmark: got {config.benchmark!r}, expected one of {', '.join(benchmarks())}")
    module = importlib.import_module(f"latent_jax.benchmarks.{config.benchmark}")
    if config.evaluate.scorer not in module.SCORERS:
        raise UserError(
            f"config.evaluate.scorer: got {config.evaluate.scorer!r}, expected one of {', '.join(module.SCORERS)} for "
            f"{config.benchmark}"
        )
    if config.evaluate.choices and not hasattr(module, "check_choices"):
        raise UserError(f"config.evaluate.choices: {config.benchmark} has no choices file, expected ''")
    imagine = config.evaluate.imagine is not False  # None is settled once the checkpoint is known
    if config.evaluate.latents != "own" and (config.evaluate.interventions or not imagine):
        raise UserError(
            f"config.evaluate.latents: got {config.evaluate.latents!r}; it takes config.evaluate.imagine=true and "
            "config.evaluate.interventions=false"
        )
    if (config.evaluate.latents == "donor") != bool(config.evaluate.donors) and not config.evaluate.interventions:
        raise UserError(
            f"config.evaluate.donors: got {config.evaluate.donors!r} with config.evaluate.latents="
            f"{config.evaluate.latents}; expected a file with latents=donor or interventions=true, and none else"
        )
    if config.evaluate.interventions and not imagine:
        raise UserError("config.evaluate.interventions: got true; it takes config.evaluate.imagine=true")
    check_pixels(config.data.min_pixels, config.data.max_pixels)
