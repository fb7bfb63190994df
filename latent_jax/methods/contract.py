"""What a training method is: one typed value that the rest of the system asks, and names no method itself.

Letters as in docs/architecture.md: A micro-steps, G groups, E examples of a group, S slots of an example, Z the width
of the space that latents are predicted in.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from latent_jax.config.training import Config, sections
from latent_jax.data.layout import Example, Layout, Room

if TYPE_CHECKING:
    from latent_jax.data.chat import Processor as Processor
else:  # it reads images: a training step, which imports this file, needs no PIL
    Processor = Any

Batch = dict[str, Array]
HostBatch = Mapping[str, np.ndarray | Array]
Record = dict[str, Any]
Messages = Sequence[dict[str, Any]]  # a conversation in chat format
Terms = dict[str, tuple[Array, Array]]  # name -> (sum, weight)


@runtime_checkable
class Loader(Protocol):
    """Where a frozen array of the head comes from; models/frozen.py has a file's tensor and a copy of the model's own.

    dtype: of the checkpoint's dtypes by path, the one that it has; None: as `build_head` declares it. Reads no file.
    check: before a run is begun, UserError where the array could not be loaded; `like` is its shape and dtype.
    call: (path, shape and dtype and sharding, the model's arrays by path) -> the array.
    """

    def dtype(self, stored: Mapping[str, np.dtype]) -> np.dtype | None: ...

    def check(self, path: str, like: jax.ShapeDtypeStruct) -> None: ...

    def __call__(self, path: str, like: jax.ShapeDtypeStruct, model: Mapping[str, Array]) -> Array: ...


@dataclasses.dataclass(frozen=True)
class Statistics:
    """What is measured on the data before step one, kept with the head, and never trained.

    examples: (config) -> how many records, spread over the first source.
    layout: as the method's own, of what is measured.
    measure: (model, host batches with leading (A, G), config) -> {path of a Statistic: value}; {} keeps what is there.
    """

    examples: Callable[[Any], int]
    layout: Callable[[Record, int, Any, Any], Layout]
    measure: Callable[[Any, Iterable[HostBatch], Any], dict[str, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class CachedTargets:
    """What a latent cache keeps for a method (data/latent_cache.py).

    images: (record) -> the encoded images whose latents are kept, in the order of the targets; at most room.targets.
    made_from: (config) -> the settings that decide what is kept, JSON-able.
    shape: (model config, config) -> (S, Z), with S over all targets that an example has room for.
    layout: (record, config) -> what is encoded: each of `images` a target.
    encode: (vision tower, model config, batch, config) -> the targets (G, E, S, Z), those of one image side by side.
    """

    images: Callable[[Record], Sequence[bytes]]
    made_from: Callable[[Any], dict]
    shape: Callable[[Any, Any], tuple[int, int]]
    layout: Callable[[Record, Any], Layout]
    encode: Callable[[Any, Any, Batch, Any], Float[Array, "G E S Z"]]


@dataclasses.dataclass(frozen=True)
class Think:
    """What a method thinks before an answer: latents for every {"type": "imagine"} part of a conversation.

    They may come from sequences of their own, and what the answer sees may be another thing than what was predicted.

    shape: (config) -> what the answer holds in a part's place: rows and columns of visual tokens, or a number of them.
    layouts: (messages, config, processor, variant) -> the sequences that are thought over, one for each imagine part.
    run: (model, batch of such sequences with G = 1 and E = X, config, keys (X,), temperature) -> (latents (X, S, Z) in
      their own space, inputs (X, M, D) that stand in the answer), compiled with a static config. A key is of what its
      sequence says and of a seed, whatever else is in the batch; at temperature 0 nothing is drawn.
    variants: ways to think that a study may ask for; the first is what an answer takes.
    answers: whether the method was made to answer over latents that it thinks after a question, so that an evaluation
      asks for them unless told otherwise.
    """

    shape: Callable[[Any], int | tuple[int, int]]
    layouts: Callable[[Messages, Any, Any, str], Sequence[Layout]]
    run: Callable[[Any, Batch, Any, Key[Array, " X"], Float[Array, ""]], tuple[Array, Array]]
    variants: tuple[str, ...] = ("own",)
    answers: bool = False


@dataclasses.dataclass(frozen=True)
class Span:
    """Latents that the model writes for itself inside an answer.

    A span begins where the answer has the opening vision mark. Then come its latents, each made of the final hidden
    state before it and fed back in the place of a token embedding, and the closing mark. How many there are is known
    before the answer begins; the tokens of latents and of the closing mark are not drawn.

    most: (config) -> S, the most latents of a span; a part of the compiled program, as the rest of this value.
    shape: (prompt, config) -> how many a span has in the answer to it, which take M-RoPE positions as text does, or the
      (rows, columns) of the image whose positions they take.
    feed: (model, hidden (R, D), carry, i (R,), config) -> (latents (R, Z) in their own space, inputs (R, D), carry):
      latent i of a span, from 0. A row's result depends on that row alone; rows that are at words are ignored.
    start: (model, batch, merged visual tokens (1, M, D) or None, config) -> carry: what `feed` keeps of every prompt, a
      pytree of arrays with leading axis R, which keep their dtypes; `batch` as training sees it, with G = 1 and E = R.
    rule: (tokens (R, W), number of tokens written (), config) -> (R,): rows whose next token is the opening mark,
      whatever the model would say. None: the model opens its spans itself.
    kept: J, spans of an answer whose latents can be looked at or replaced.
    """

    most: Callable[[Any], int]
    shape: Callable[[Example, Any], int | tuple[int, int]]
    feed: Callable[[Any, Float[Array, "R D"], Any, Int[Array, " R"], Any], tuple[Array, Array, Any]]
    start: Callable[[Any, Batch, Array | None, Any], Any] = lambda model, batch, merged, config: None
    rule: Callable[[Int[Array, "R W"], Int[Array, ""], Any], Bool[Array, " R"]] | None = None
    kept: int = 4


@dataclasses.dataclass(frozen=True)
class Method:
    """A training method.

    config: its config: a frozen dataclass that extends `Config` with the sections that the method declares, each a
      frozen dataclass of `fields.option`s.
    layout: (record, index in the data order, config, processor) -> what an example shows, a function of just these.
    coefficients: (config, fraction of the run) -> the weight of every term of the loss.
    weights: (batch, config) -> what every term's sum is divided by, from the batch alone: micro-steps and devices add
      their sums without knowing of each other.
    loss: (model, batch without A, config) -> (terms, metrics), each name -> (sum, weight).
    room: (config) -> what an example of a batch has room for.
    build_head: (model config, config, rngs) -> what the method puts beside the model: its paths begin with `head.`;
      `Declare` says a parameter's axes, and whether weight decay is for it.
    learns: (path, config) -> whether a weight is trained; None: the head, and of the model what config.model says.
      With config.model.lora_rank, adapters learn in place of the language model's matrices that it names.
    frozen: (config) -> {path: loader} of the arrays under `head.` that are loaded before the first step and never
      trained. They keep their dtype, in the step too. A checkpoint holds them, so that a resumed run needs no file.
    heads: methods whose saved head this one takes up, beside its own.
    head_settings: dotted settings that decide what a head predicts or reads: one saved with others is refused.
    exported: (path without `head.`) -> whether inference needs it, and an export has it.
    passes: (config) -> how often a step runs the language model's blocks over the batch.
    typical: (config) -> a record of typical length, which `plan` lays out by `layout` and sizes batches for
      (data/typical.py makes its parts); None: one image and a few words.
    think: None where the method has no latents before an answer; span: None where it has none inside.
    statistics, targets: None where the method measures nothing, or has no targets to cache.
    report: the module that reports on held-out data after the last step: `run`, `lacking`, and the FILES it writes.
    """

    config: type[Config]
    layout: Callable[[Record, int, Any, Any], Layout]
    coefficients: Callable[[Any, Float[Array, ""]], dict[str, Array]]
    weights: Callable[[Batch, Any], dict[str, Array]]
    loss: Callable[[Any, Batch, Any], tuple[Terms, Terms]]
    room: Callable[[Any], Room] = lambda config: Room()
    build_head: Callable[[Any, Any, nnx.Rngs], nnx.Module | None] = lambda model_config, config, rngs: None
    learns: Callable[[str, Any], bool] | None = None
    frozen: Callable[[Any], Mapping[str, Loader]] = lambda config: {}
    heads: tuple[str, ...] = ()
    head_settings: tuple[str, ...] = ()
    exported: Callable[[str], bool] = lambda path: True
    passes: Callable[[Any], int] = lambda config: 1
    typical: Callable[[Any], Record | None] | None = None
    think: Think | None = None
    span: Span | None = None
    statistics: Statistics | None = None
    targets: CachedTargets | None = None
    report: str = ""

    @property
    def sections(self) -> dict[str, type]:
        """Name -> class of the config sections that the method declares, in their order."""
        return sections(self.config)
