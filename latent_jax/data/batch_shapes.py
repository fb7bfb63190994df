"""Which static shape a step's batches get: rows, tokens and patches that a sample of examples fills."""

import dataclasses
import itertools
import math
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from latent_jax.data.layout import Example, Room
from latent_jax.data.packing import BatchShape, FirstFit, Size, first_fit, size_of
from latent_jax.errors import UserError

# A step is worth its fill: of the budget that binds, of the other. Other examples than the sampled ones are to reach
# 95 % and 90 %, so the sample must reach a little more.
_TARGET_FILL = (0.96, 0.92)
_STREAM = 2048  # examples that a choice of batch_shape is simulated on
_TOKEN_BYTES = 36  # of a batch, at least: nine int32


def choose(
    sample: Sequence[Example | Size],
    *,
    batch_size: int,
    groups: int = 1,
    micro: int = 1,
    window_patches: int = 64,
    merge_unit: int = 4,
    row_tokens: int = 2048,
    room: Room | None = None,
    named: Mapping[str, int] = types.MappingProxyType({}),
    memory: float = math.inf,
) -> BatchShape:
    """Rows, tokens and patches under which nearly `batch_size` examples fit a step and little of it is padding.

    `sample` is in data order (see pipeline.sample_examples). `row_tokens` bounds a row, unless one example is longer.
    `room`: slots, targets and reads of an example; None: the most of any sampled one.
    Shapes around the mean need are tried on the sample. The chosen one fills at least 95 % of the budget that binds and
    90 % of the other, if the lengths allow that, and then holds the most examples. Sizes in `named` (rows, tokens,
    patches, image_patches; 0: not named) are kept, and the others are chosen for as many examples as those hold.
    Raises UserError if batch_size does not divide, if there is no example or none fits the named sizes, and if a step
    would take more than `memory` bytes.
    """
    if batch_size % (groups * micro) or batch_size < 1:
        raise UserError(f"train.batch_size {batch_size} must be a multiple of groups * micro-steps = {groups * micro}")
    sizes = [size if isinstance(size, Size) else size_of(size) for size in sample]
    if not sizes:
        raise UserError("no example to choose batch_shape from")
    unit, named = math.lcm(window_patches, merge_unit), {name: size for name, size in named.items() if size}
    sizes = _fitting(sizes, named)
    largest = Size(*(max(getattr(size, field.name) for size in sizes) for field in dataclasses.fields(Size)))
    fixed = dict(
        micro=micro,
        groups=groups,
        examples=batch_size // (groups * micro),
        merge_unit=merge_unit,
        channels=largest.channels,
        image_patches=named.get("image_patches", _up(largest.image_patches, unit)),
        **dataclasses.asdict(room or largest.room),
        **_target(sample),
    )
    _check_memory(sizes, fixed, named, memory)
    # The sample again and again: where steps begin in it shifts, so a few hundred examples show many steps.
    stream = list(itertools.islice(itertools.cycle(sizes), max(_STREAM, 4 * batch_size)))
    held = fixed["examples"] * fill(stream, _bounds(largest, row_tokens, unit, fixed, named))["examples"]
    mean = np.mean([size.patches for size in sizes])
    spare = np.arange(0.94, 1.12, 0.04)
    rows = {pair for more in spare for pair in _rows(stream, held, more, largest.tokens, row_tokens, named)}
    patches = {max(_up(mean * held * more, unit), _up(largest.patches, unit)) for more in spare}
    if "patches" in named:
        patches = {named["patches"]}
    tried = [
        BatchShape(rows=B, tokens=T, patches=P, **fixed)
        for (B, T), P in itertools.product(sorted(rows), sorted(patches))
    ]
    return max(tried, key=lambda batch_shape: _worth(fill(stream, batch_shape)))


def _check_memory(sizes: Sequence[Size], fixed: Mapping[str, int], named: Mapping[str, int], memory: float) -> None:
    """Raises UserError if a step of this size cannot be built, before any shape is tried."""
    examples, tokens = fixed["examples"], float(np.mean([size.tokens for size in sizes]))
    cells = max(examples * tokens, named.get("rows", 1) * named.get("tokens", tokens))
    patches = max(examples * float(np.mean([size.patches for size in sizes])), named.get("patches", 0))
    needed = fixed["micro"] * fixed["groups"] * (cells * _TOKEN_BYTES + patches * fixed["channels"])
    if needed > memory:
        raise UserError(
            f"config.train.batch_size: a step of {examples * fixed['micro'] * fixed['groups']} examples takes at least "
            f"{needed / 2**30:,.1f} GiB, this run's hosts have {memory / 2**30:,.1f}; expected fewer, or smaller "
            "config.data.rows, tokens and patches where they are set"
        )


def without_outliers(sample: Sequence[Example], row_tokens: int, max_bad: float) -> tuple[list[Example], list[Example]]:
    """(the examples that rows are made for, those left out): longer than `row_tokens` and rare.

    At most the share `max_bad` is left out, the longest first, and of few examples one: a single long caption would
    otherwise set the length of every row.
    """
    may = max(int(max_bad * len(sample)), 1) if max_bad and len(sample) > 1 else 0
    long = sorted((e for e in sample if len(e.tokens) > row_tokens), key=lambda e: len(e.tokens), reverse=True)[:may]
    return [example for example in sample if not any(example is each for each in long)], long


def _fitting(sizes: Sequence[Size], named: Mapping[str, int]) -> list[Size]:
    """The examples that fit the named sizes. Raises UserError if none does."""
    fitting = list(sizes)
    for name in ("tokens", "patches", "image_patches"):
        least, fitting = fitting, [size for size in fitting if getattr(size, name) <= named.get(name, math.inf)]
        if not fitting:
            raise UserError(
                f"config.data.{name}: got {named[name]}, expected at least {min(getattr(s, name) for s in least)}, "
                "what the smallest sampled example needs"
            )
    return fitting


def _bounds(largest: Size, row_tokens: int, unit: int, fixed: Mapping, named: Mapping[str, int]) -> BatchShape:
    """What is named, and beside it more room than any choice will have: a row an example, every image the largest."""
    tokens = max(row_tokens, largest.tokens) if "rows" in named else largest.tokens
    room = dict(rows=fixed["examples"], tokens=tokens, patches=fixed["examples"] * _up(largest.patches, unit))
    return BatchShape(**{name: named.get(name, size) for name, size in room.items()}, **fixed)


def _target(sample: Sequence[Example | Size]) -> dict[str, int | str]:
    """Shape and dtype of the latents that the sample's examples bring along; nothing where they bring none."""
    given = [e.target_latents for e in sample if isinstance(e, Example) and e.target_latents is not None]
    if not given:
        return {}
    most = max(given, key=len)  # some have fewer targets
    return dict(target_slots=len(most), target_size=most.shape[1], target_dtype=most.dtype.name)


def fill(sizes: Iterable[Size], batch_shape: BatchShape) -> dict[str, float]:
    """Mean share of `tokens`, `patches` and `examples` that full steps of these sizes use."""
    steps: list[np.ndarray] = []
    plan, used = FirstFit(batch_shape), np.zeros(3)
    for size in sizes:
        if plan.place(size) is None:
            steps.append(used)
            plan, used = FirstFit(batch_shape), np.zeros(3)
            if plan.place(size) is None:
                raise ValueError(f"{size} does not fit {batch_shape}")
        used = used + (size.tokens, size.patches, 1)
    whole = np.array([batch_shape.rows * batch_shape.tokens, max(batch_shape.patches, 1), batch_shape.examples])
    mean = np.mean(steps or [used], axis=0) / (whole * batch_shape.micro * batch_shape.groups)
    return dict(zip(("tokens", "patches", "examples"), mean.tolist(), strict=True))


def _worth(filled: dict[str, float]) -> float:
    """Examples a step, less a penalty for fills below target; of two that hold as many, the fuller wins."""
    pair = sorted((filled["tokens"], filled["patches"]), reverse=True)
    if not filled["patches"]:
        pair = [filled["tokens"]]
    shortfall = sum(max(0.0, want - have) for want, have in zip(_TARGET_FILL, pair, strict=False))
    return filled["examples"] + sum(pair) / 4 - 10 * shortfall


def _rows(
    stream: Sequence[Size], examples: float, more: float, longest: int, row_tokens: int, named: Mapping[str, int]
) -> Iterator[tuple[int, int]]:
    """(rows, tokens a row) for `more` times that many examples: as few rows as `row_tokens` allows, and a few more of
    equal length.

    Where rows hold few examples, a little more or less length decides how many: lengths step finely there.
    """
    if "tokens" in named:
        some = [size.tokens for size in stream[: math.ceil(examples * more)]]
        opened = 1 + max(row for row, _ in first_fit(some, named["tokens"]))
        yield named.get("rows", opened), named["tokens"]
        return
    tokens = float(np.mean([size.tokens for size in stream])) * examples * more
    limit = max(row_tokens, longest)
    fewest = math.ceil(tokens / limit)
    most = min(fewest + 4, math.ceil(tokens / longest))
    for rows in [named["rows"]] if "rows" in named else range(fewest, most + 1):
        length = min(max(tokens / rows, longest), limit)
        yield rows, _up(length, 128 if length > 1024 else 64 if length > 512 else 16)


def _up(value: float, unit: int) -> int:
    return math.ceil(value / unit) * unit
