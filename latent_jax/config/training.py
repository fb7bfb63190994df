"""The config of a training run: the sections that all methods share, and the checks that involve several options."""

import dataclasses
import re
from pathlib import Path

from latent_jax.config import fields
from latent_jax.config.fields import option
from latent_jax.errors import UserError

PRESETS = Path(__file__).parents[1] / "models" / "presets"


@dataclasses.dataclass(frozen=True)
class Model:
    path: str = option("", "HF directory or hub id of the checkpoint; empty = the embedded tiny model")
    init: str = option("checkpoint", "where the weights come from", choices=("checkpoint", "random"))
    preset: str = option("", "a published shape that ships with the package, for planning and random weights")
    compute_dtype: str = option(
        "auto",
        "matmul dtype; auto = bfloat16 on an accelerator, float32 on a CPU",
        choices=("auto", "float32", "bfloat16"),
    )
    remat: str = option(
        "auto",
        "what the backward pass recomputes; auto = full on an accelerator, none on a CPU",
        choices=("auto", "none", "full", "dots"),
    )
    attention: str = option(
        "auto",
        "attention kernel of the training step; auto = the mesh's own: cudnn on GPUs, splash on TPUs, else reference",
        choices=("auto", "reference", "cudnn", "splash"),
    )
    unroll: int = option(1, "layers that one turn of the layer loop holds; more compile longer, may run faster", low=1)
    trainable: str = option(
        "language", "which tower learns; the method's own heads always do", choices=("language", "all")
    )
    lora_rank: int = option(
        0, "rank of low-rank adapters that learn in place of the language model's own weights; 0 = none", low=0
    )
    lora_alpha: float = option(16.0, "strength of the adapters: they are scaled by lora_alpha / lora_rank", above=0)


@dataclasses.dataclass(frozen=True)
class Data:
    name: str = option("scenes", "dataset, or a mixture 'a:0.8,b:0.2' with sampling weights")
    path: str = option("", "directory of the prepared dataset; empty = generated or embedded")
    split: str = option("train", "split to read")
    share: float = option(
        1.0, "share of the split's records that is used; a smaller share is part of a larger", above=0, high=1
    )
    holdout: int = option(
        0, "records of the split that are kept from training, for the report; 0 = report on evaluate.split", low=0
    )
    latent_cache: str = option("", "directory of the targets' latents, made on first use; empty = computed in the step")
    replay: float = option(0.25, "share of ordinary image -> caption examples", low=0, high=1)
    min_pixels: int = option(0, "least pixels of a resized image; 0 = the checkpoint's", low=0, high=2**31)
    max_pixels: int = option(0, "most pixels of a resized image; 0 = the checkpoint's", low=0, high=2**31)
    threads: int = option(2, "threads that decode and resize images", low=1, high=1024, resumable=True)
    groups: int = option(0, "groups that a step is packed into; 0 = one for each data shard", low=0, high=2**20)
    row_tokens: int = option(4096, "longest row that is chosen from a sample of lengths", low=64)
    rows: int = option(0, "rows of a group; 0 = from a sample of lengths", low=0, high=2**20)
    tokens: int = option(0, "tokens of a row; 0 = from a sample of lengths", low=0, high=2**24)
    patches: int = option(0, "patches of a group; 0 = from a sample of lengths", low=0, high=2**30)
    image_patches: int = option(0, "most patches of one image; 0 = from a sample of lengths", low=0, high=2**30)
    sample: int = option(256, "examples measured to choose the sizes above", low=1)
    max_bad: float = option(
        0.05, "share of broken records that is skipped before it is an error", low=0, high=1, resumable=True
    )


@dataclasses.dataclass(frozen=True)
class Train:
    steps: int = option(1000, "optimiser steps of the whole run", low=1, high=2**31 - 1, resumable=True)
    batch_size: int = option(32, "most examples of a step, over all devices", low=1, high=2**20)
    accumulate: int = option(1, "micro-steps of a step", low=1, high=2**20)
    learning_rate: float = option(2e-4, "peak learning rate", low=0)
    head_learning_rate: float = option(0.0, "peak learning rate of the method's own heads; 0 = the same", low=0)
    warmup: float = option(
        0.05,
        "fraction of the steps over which the learning rate rises to the peak, the first update by one share of it",
        low=0,
        high=1,
    )
    schedule: str = option("cosine", "the learning rate after the warm-up", choices=("cosine", "linear", "constant"))
    end_factor: float = option(
        0.1,
        "what the learning rate falls towards, over the peak; the update after the last would have it",
        low=0,
        high=1,
    )
    weight_decay: float = option(
        0.1, "AdamW's decoupled decay, on matrices only (no norms, biases, slot embeddings)", low=0
    )
    clip: float = option(1.0, "largest global gradient norm; 0 = no clipping", low=0)
    beta1: float = option(0.9, "AdamW's first moment decay", low=0, below=1)
    beta2: float = option(0.95, "AdamW's second moment decay", low=0, below=1)
    epsilon: float = option(1e-8, "AdamW's denominator offset", above=0)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    every: int = option(500, "steps between checkpoints; the last step always gets one", low=1, resumable=True)
    keep: int = option(3, "newest checkpoints kept; 0 = all", low=0, resumable=True)
    export: bool = option(True, "at the end, write the HF checkpoint to WORKDIR/hf", resumable=True)
    fallback: bool = option(
        False, "where the newest checkpoint is damaged, go on from the newest whole one before it", resumable=True
    )


@dataclasses.dataclass(frozen=True)
class Mesh:
    """May change on resume: the data order stays, only the order of summation differs."""

    replica: int = option(1, "devices that hold copies of the shards; -1 = all that is left", low=-1, resumable=True)
    fsdp: int = option(
        -1, "devices that parameters and batch are sharded over; -1 = all that is left", low=-1, resumable=True
    )
    cpu_devices: int = option(
        1,
        "devices that a CPU is divided into, one core each; ignored on accelerators",
        low=1,
        high=1024,
        resumable=True,
    )
    tp: int = option(
        1, "devices that heads and feed-forward are split over; -1 = all that is left", low=-1, resumable=True
    )


@dataclasses.dataclass(frozen=True)
class Hosts:
    """How the processes of a run find each other: one a host, each started with the same command."""

    cluster: str = option(
        "auto",
        "who says which hosts take part; auto = the environment, where srun, mpirun or GKE started several processes",
        choices=("auto", "none", "slurm", "ompi", "mpi4py", "k8s", "tpu"),
        resumable=True,
    )
    coordinator: str = option(
        "", "ADDRESS:PORT of host 0, where no cluster tells; then set count and index", resumable=True
    )
    count: int = option(0, "hosts, with coordinator", low=0, resumable=True)
    index: int = option(-1, "which of them this is, from 0, with coordinator", low=-1, resumable=True)
    timeout: int = option(60, "seconds after which a silent host is lost and all others end", low=5, resumable=True)
    start_timeout: int = option(300, "seconds that the hosts wait for each other at the start", low=5, resumable=True)


@dataclasses.dataclass(frozen=True)
class Evaluate:
    every: int = option(
        0, "steps between losses on held-out data (validation/... in the metrics); 0 = none", low=0, resumable=True
    )
    examples: int = option(
        256,
        "held-out records of these losses and of pretraining's last report; 0 = the whole split",
        low=0,
        resumable=True,
    )
    split: str = option("validation", "held-out split of these losses and of that report", resumable=True)


@dataclasses.dataclass(frozen=True)
class Log:
    every: int = option(1, "steps between lines of metrics.jsonl", low=1, resumable=True)
    tensorboard: bool = option(True, "write TensorBoard event files too", resumable=True)
    progress: bool = option(True, "show progress on standard error", resumable=True)
    profile: str = option("", "FIRST:LAST: the steps whose trace is left in WORKDIR/profile", resumable=True)


@dataclasses.dataclass(frozen=True)
class Config:
    """The fields that every training run has. A method's config extends it with sections of its own."""

    job: str = option("train", "what to do", choices=("train",))
    method: str = option("pretrain", "a module of latent_jax/methods, or one of your own: my_package.my_method")
    seed: int = option(0, "seed of weights, data order and noise", low=0, high=2**31 - 1)
    model: Model = Model()
    data: Data = Data()
    train: Train = Train()
    checkpoint: Checkpoint = Checkpoint()
    mesh: Mesh = Mesh()
    hosts: Hosts = Hosts()
    evaluate: Evaluate = Evaluate()
    log: Log = Log()


def sections(kind: type[Config]) -> dict[str, type]:
    """Name -> class of the sections by which a method's config extends `Config`, in the order of their declaration."""
    own = (field.name for field in dataclasses.fields(kind) if field.name not in Config.__dataclass_fields__)
    known = fields.annotations(kind)
    return {name: known[name] for name in own}


def named_sizes(data: Data) -> dict[str, int]:
    """The sizes of a batch that a config names; 0 where it leaves them to the data."""
    return {name: getattr(data, name) for name in ("rows", "tokens", "patches", "image_patches")}


def mixture(name: str) -> tuple[tuple[str, float], ...]:
    """'a:0.8,b:0.2' -> (('a', 0.8), ('b', 0.2)), weights summing to 1; a plain name has weight 1.

    Raises UserError for an empty name, a weight that is not a number > 0, or a name given twice.
    """
    pairs = []
    for part in name.split(","):
        dataset, _, weight = part.strip().partition(":")
        try:
            pairs.append((dataset.strip(), float(weight or 1)))
        except ValueError:
            pairs.append((dataset, -1.0))
    names = [dataset for dataset, _ in pairs]
    if not all(names) or len(set(names)) < len(names) or not all(0 < weight < float("inf") for _, weight in pairs):
        raise UserError(f"config.data.name: got {name!r}, expected a dataset or 'a:0.8,b:0.2' with weights > 0")
    total = sum(weight for _, weight in pairs)
    return tuple((dataset, weight / total) for dataset, weight in pairs)


def profiled(text: str) -> range:
    """'FIRST:LAST' of `log.profile` -> these steps, from 1; '' -> none. Raises UserError for anything else."""
    if not text:
        return range(0)
    found = re.fullmatch(r"([0-9]{1,9}):([0-9]{1,9})", text)
    first, last = (int(part) for part in found.groups()) if found else (0, 0)
    if not 1 <= first <= last:
        raise UserError(f"config.log.profile: got {text!r:.100}, expected FIRST:LAST with 1 <= FIRST <= LAST, or ''")
    return range(first, last + 1)


def check(config: Config) -> None:
    """The checks that involve more than one option. Raises UserError."""
    train, data, mesh, model = config.train, config.data, config.mesh, config.model
    if train.batch_size % train.accumulate:
        raise UserError(
            f"config.train.accumulate: got {train.accumulate}, expected a divisor of "
            f"config.train.batch_size = {train.batch_size}"
        )
    check_pixels(data.min_pixels, data.max_pixels)
    if model.lora_rank and model.trainable == "all":
        raise UserError(
            f"config.model.lora_rank: got {model.lora_rank} with config.model.trainable=all; adapters leave the "
            "model's weights frozen, expected config.model.trainable=language"
        )
    mixture(data.name)
    if data.latent_cache and (model.trainable == "all" or model.init == "random"):
        raise UserError(
            f"config.data.latent_cache: got {data.latent_cache!r}, expected '' with config.model.trainable="
            f"{model.trainable!r} and config.model.init={model.init!r}: a cache is of a checkpoint's frozen encoder"
        )
    sizes = {axis: getattr(mesh, axis) for axis in ("replica", "fsdp", "tp")}
    for axis, size in sizes.items():
        if size == 0:
            raise UserError(f"config.mesh.{axis}: got 0, expected an integer >= 1, or -1 for all that is left")
    if list(sizes.values()).count(-1) > 1:
        raise UserError(f"config.mesh: got {sizes}, expected at most one -1 (all that is left)")
    check_hosts(config.hosts)
    profiled(config.log.profile)
    shapes = sorted(path.stem for path in PRESETS.glob("*.json"))
    fields.check("config.model.preset", model.preset, str, {"choices": ["", *shapes]})
    if model.preset and not model.path and model.init == "checkpoint":
        raise UserError(
            f"config.model.preset: {model.preset!r} is a shape without weights; set config.model.path, "
            "or config.model.init=random"
        )


def check_hosts(hosts: Hosts) -> None:
    """Raises UserError where the processes of a run could not find each other, or would each run alone unnoticed."""
    if not hosts.coordinator:
        for name, unset in (("count", 0), ("index", -1)):
            if (value := getattr(hosts, name)) != unset:
                raise UserError(
                    f"config.hosts.{name}: got {value} without config.hosts.coordinator, expected both or neither"
                )
        return
    if not 0 <= hosts.index < hosts.count:
        raise UserError(
            f"config.hosts.index: got {hosts.index} of config.hosts.count = {hosts.count}, expected 0 <= index < count "
            "beside config.hosts.coordinator"
        )
    address, _, port = hosts.coordinator.rpartition(":")
    if not address or not port.isascii() or not port.isdigit() or not 0 < int(port) < 2**16:
        raise UserError(
            f"config.hosts.coordinator: got {hosts.coordinator!r}, expected ADDRESS:PORT, a port below 65536"
        )


def check_pixels(least: int, most: int) -> None:
    """Raises UserError where the least number of pixels of an image is above the most; 0: no limit."""
    if most and least > most:
        raise UserError(f"config.data.min_pixels: got {least}, expected at most config.data.max_pixels = {most}")
