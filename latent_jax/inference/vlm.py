"""The facade: a loaded model that takes chat messages and speaks, sees and imagines."""

import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypedDict, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float

from latent_jax import methods
from latent_jax.assets import TINY_VL
from latent_jax.config.fields import check, shown
from latent_jax.config.training import Config as RunConfig
from latent_jax.data.chat import Processor
from latent_jax.data.layout import Image, Layout, Slots
from latent_jax.data.prompt_batch import one_per_row
from latent_jax.errors import UserError
from latent_jax.inference import batches, decode, prompts
from latent_jax.inference.spans import Given, Writing, counted, room, shape_of, words
from latent_jax.methods.contract import Batch
from latent_jax.models import hf_export, hf_io
from latent_jax.models.heads import LatentVLM
from latent_jax.models.parameters import Structure
from latent_jax.models.qwen2_5_vl.config import ModelConfig, from_json
from latent_jax.models.qwen2_5_vl.model import Qwen2_5_VL
from latent_jax.runtime.files import read_json
from latent_jax.training import latent_config
from latent_jax.training.workdir import Run, is_workdir, named_step, place, split

Messages = Sequence[dict[str, Any]]
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


class Options(TypedDict, total=False):
    """How answers are made; see VLM.reply."""

    temperature: float
    top_p: float
    seed: int
    thoughts: Sequence[Sequence[np.ndarray]] | None
    spans: Sequence[Given] | None


class Reply(NamedTuple):
    """An answer: its text, special tokens skipped; its token ids, the end included; where they are kept, the latents of
    its spans; and how many spans it opened and closed."""

    text: str
    ids: list[int]
    spans: list[prompts.Thought]
    opened: int
    closed: int


@dataclasses.dataclass(frozen=True)
class VLM:
    """A Qwen2.5-VL model with its tokenizer, and what the method that trained it put beside it.

    settings: the config of that method; None where a checkpoint tells of none.

    Messages are in HF chat format; an image part holds a PIL image, a path or bytes; a part
    {"type": "imagine", "text": ...} stands for the image that the text describes, as the model imagines it; one without
    "text" for latents that are predicted from all that was said before it (methods/imagine.py).
    """

    model: LatentVLM
    processor: Processor
    settings: RunConfig | None
    eos: tuple[int, ...]
    name: str
    copies: tuple[LatentVLM, ...] = ()  # of the model, on the devices that share a batch
    positions: int | None = None  # the longest sequence that the checkpoint states

    @property
    def thinks(self) -> bool:
        """Whether the method that trained it has latents before an answer."""
        return bool(self.settings and methods.find(self.settings.method).think)

    @property
    def writes(self) -> bool:
        """Whether the method that trained it has latents inside an answer."""
        return bool(self.settings and methods.find(self.settings.method).span)

    @property
    def config(self) -> ModelConfig:
        return self.model.vlm.config

    def logits(self, messages: Messages) -> np.ndarray:
        """(tokens, vocabulary) float32 logits after the chat template with the generation prompt."""
        examples, given = self.prompts([messages])
        rows = one_per_row(examples, self.config)
        hidden = _hidden(self.model.vlm, rows.batch, given, rows.image_patches)[0, 0, : rows.lengths[0]]
        return np.asarray(self.model.vlm.logits(hidden))

    def generate(
        self, conversations: Sequence[Messages], max_new_tokens: int = 32, **options: Unpack[Options]
    ) -> list[str]:
        """Answers to a batch of conversations, special tokens skipped; greedy by default. See `reply`."""
        return [reply.text for reply in self.reply(conversations, max_new_tokens, **options)]

    def generate_ids(
        self, conversations: Sequence[Messages], max_new_tokens: int = 32, **options: Unpack[Options]
    ) -> list[list[int]]:
        """As `generate`: the new token ids of each conversation, the one that ended it included."""
        return [reply.ids for reply in self.reply(conversations, max_new_tokens, **options)]

    def reply(
        self,
        conversations: Sequence[Messages],
        max_new_tokens: int = 32,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        thoughts: Sequence[Sequence[np.ndarray]] | None = None,
        spans: Sequence[Given] | None = None,
        keep: bool = False,
    ) -> list[Reply]:
        """Answers to a batch of conversations, with what is known of their latents.

        Args:
          max_new_tokens: most tokens of an answer, its end and the latents inside it included.
          temperature: above 0, tokens are drawn from softmax(logits / temperature).
          top_p: and only from the fewest likeliest ones whose probabilities reach this.
          seed: of the draws. They do not depend on the other conversations of the batch, but a conversation that
            stands in it twice gets two answers.
          thoughts: for every conversation what stands in the place of its imagine parts, input embeddings (M, D) each,
            or () to leave the parts out; None: what the model thinks itself (`think`).
          spans: for every conversation what is fed as the latents inside its answer: None the model's own, () lets it
            open no span, else input embeddings (count, D) of each span in order, the last one for all that follow.
          keep: replies hold their spans.

        Raises UserError for a value out of range or a message that cannot be shown.
        """
        max_new_tokens = batches.check_new_tokens(max_new_tokens)
        batches.check_sampling(temperature, top_p, seed)
        if not isinstance(conversations, list | tuple):
            raise UserError(f"conversations: {shown(conversations)}; expected a list of conversations")
        if spans is not None and len(spans) != len(conversations):
            raise UserError(f"spans: got those of {len(spans)} conversations, expected {len(conversations)}")
        if not conversations:
            return []
        examples, given = self.prompts(conversations, thoughts)
        writing = self._writing(keep)
        if spans is not None and any(spans) and not writing:
            raise UserError(f"spans: {self.name} writes no latents inside its answers")
        answers = batches.answers(
            self.copies or (self.model,), examples, given, self.eos,
            max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed,
            writing=writing, inside=spans,
        )  # fmt: skip
        return [
            Reply(
                self.processor.tokenizer.decode(answer.ids, skip_special_tokens=True),
                answer.ids,
                [prompts.Thought(latents.astype(np.float32), inputs) for latents, inputs in answer.spans],
                *(counted(self.config, answer.ids) if writing else (0, 0)),
            )
            for answer in answers
        ]

    def _writing(self, keep: bool = False) -> Writing | None:
        span = methods.find(self.settings.method).span if self.settings else None
        return Writing(span, self.settings, keep) if span else None

    def span_counts(self, conversations: Sequence[Messages]) -> list[int]:
        """How many latents a span has in the answer to each conversation; 0: the model writes none."""
        writing = self._writing()
        if not writing:
            return [0] * len(conversations)
        examples, _ = self.prompts(conversations, [()] * len(conversations))
        return [Slots(shape_of(writing.span, example, self.settings)).count for example in examples]

    def words(self, reply: Reply, most: int) -> str:
        """The first `most` tokens of a reply that are no latents or marks of them, as text."""
        return self.processor.tokenizer.decode(words(self.config, reply.ids)[:most], skip_special_tokens=True)

    @property
    def span_room(self) -> int:
        """New tokens that the latents inside an answer take."""
        writing = self._writing()
        return room(writing) if writing else 0

    def score(
        self,
        conversations: Sequence[Messages],
        answers: Sequence[prompts.Given],
        thoughts: Sequence[Sequence[np.ndarray]] | None = None,
    ) -> list[np.ndarray]:
        """Log likelihoods (fp32, one a token) of given answers and of the `<|im_end|>` behind each, teacher-forced.

        answers: texts, or lists of parts {"type": "text", "text": ...} and {"type": "latents", "latents": (count, D)},
          the input embeddings of a span. thoughts: as in `reply`. Raises UserError where there is not one answer for
          each conversation.
        """
        if len(answers) != len(conversations) or not all(isinstance(answer, str | list | tuple) for answer in answers):
            raise UserError(f"answers: expected {len(conversations)} of them, each a text or a list of parts")
        examples, given = self.prompts(conversations, thoughts, answers)
        return batches.scores(self.copies or (self.model,), examples, given)

    def encode_image(self, image: Any) -> np.ndarray:
        """(visual tokens, hidden) float32: what the frozen encoder sees, in reading order."""
        example = self.processor.lay_out(Layout(images=(image,), trunk=(Image(0),)))
        rows = one_per_row([example], self.config)
        merged = _encode(self.model.vlm, rows.batch, rows.image_patches)
        order = example.feature_index[example.feature_index >= 0]
        return np.asarray(merged[0].astype(jnp.float32))[order]

    def imagine(self, text: str) -> np.ndarray:
        """(slots, target size) float32: what the latent head predicts from words alone, in the encoder's own space.

        Raises UserError where the checkpoint has no latent head.
        """
        ((thought,),) = self.think([[{"role": "user", "content": [{"type": "imagine", "text": text}]}]])
        return thought.latents

    def think(
        self, conversations: Sequence[Messages], *, variant: str = "", temperature: float = 0.0, seed: int = 0
    ) -> list[list[prompts.Thought]]:
        """For every conversation what its imagine parts stand for, in their order: latents (S, Z), inputs (M, D).

        variant: one of the method's ways to think, "" its own. temperature, seed: of methods that draw their latents.
        Raises UserError where the checkpoint's method has none.
        """
        try:
            return prompts.think(
                self.copies or (self.model,), self.processor, self.settings, conversations,
                variant=variant, temperature=temperature, seed=seed,
            )  # fmt: skip
        except prompts.NoThought:
            raise UserError(
                f"{self.name}: has no latent head ({hf_io.LATENT_WEIGHTS}), so it cannot imagine; expected a "
                "checkpoint of latent pretraining"
            ) from None

    def prompts(
        self,
        conversations: Sequence[Messages],
        thoughts: Sequence[Sequence[np.ndarray]] | None = None,
        answers: Sequence[prompts.Given] | None = None,
    ) -> prompts.Prompts:
        """The conversations laid out for an answer, or with given ones as in `score`; `thoughts` as in `reply`."""
        if thoughts is None:
            thoughts = [[thought.inputs for thought in own] for own in self.think(conversations)]
        width = self.config.text.hidden_size
        found = prompts.prompts(self.processor, self.settings, width, conversations, thoughts, answers)
        longest = max((len(example.tokens) for example in found.examples), default=0)
        if self.positions is not None and longest > self.positions:
            raise UserError(
                f"a conversation has {longest:,} tokens, expected at most {self.positions:,}, the "
                "max_position_embeddings of the model's config.json"
            )
        return found


@functools.partial(jax.jit, static_argnames="image_patches")
def _encode(model: Qwen2_5_VL, batch: Batch, image_patches: int) -> Float[jax.Array, "G M D"]:
    return model.encode(batch, image_patches=image_patches)[0]


@functools.partial(jax.jit, static_argnames="image_patches")
def _hidden(model: Qwen2_5_VL, batch: Batch, given: Any, image_patches: int) -> Float[jax.Array, "G B T D"]:
    return model.decode(decode.embed(model, batch, given, image_patches), batch)[0]


def load(path: str | Path = "", dtype: str | None = None, devices: Sequence[jax.Device] | None = None) -> VLM:
    """Loads an HF directory, a hub id, a workdir (its newest checkpoint or a step), or "" for the embedded model.

    Args:
      path: of a step, WORKDIR/checkpoints/STEP.
      dtype: "float32" or "bfloat16"; None keeps the checkpoint's.
      devices: each gets a copy of the model and its share of what `generate` is given; None: the default device alone.

    Raises UserError.
    """
    if not isinstance(path, str | os.PathLike):
        raise UserError(f"model: got {shown(path)}, expected a directory or a hub id")
    if dtype is not None and (not isinstance(dtype, str) or dtype not in DTYPES):
        raise UserError(f"dtype: got {shown(dtype)}, expected one of {', '.join(DTYPES)}")
    wanted = DTYPES[dtype] if dtype else None
    workdir, step = named_step(path) if path else (path, None)
    settings: RunConfig | None = None
    head: Mapping[str, np.ndarray | jax.Array] = {}
    if path and (step is not None or is_workdir(path)):
        run = Run.of(workdir)
        vlm, head = split(run.arrays(step))
        origin, settings = run.origin, run.config
        head = latent_config.head(methods.find(run.config.method), head)
        # Workdirs of earlier versions keep the source's pixel limits beside the model, and the run's in its config.
        limits = run.config.data.min_pixels or None, run.config.data.max_pixels or None
        processor = Processor.from_directory(origin, *limits)
        vlm = place(vlm, wanted)
    else:
        origin = hf_io.resolve(path or TINY_VL)
        # Before the tokenizer: transformers reads the same config.json, and believes whatever sizes stand there.
        stated_eos(origin, from_json(origin / "config.json").text.vocab_size)
        processor = Processor.from_directory(origin)
        vlm = hf_io.load(origin, dtype=wanted)
        if saved := hf_export.load_latent(origin):
            head, settings = saved[0], latent_config.settings(saved[1], str(origin / hf_io.LATENT_CONFIG))
    config = dataclasses.replace(
        from_json(origin / "config.json"), image_mean=processor.image.mean, image_std=processor.image.std
    )
    structure = Structure.of(nnx.eval_shape(lambda: Qwen2_5_VL(config, rngs=nnx.Rngs(0))))
    made = latent_config.rebuild(head, settings, config, origin / hf_io.LATENT_WEIGHTS, wanted) if settings else None
    model = LatentVLM(structure.build(vlm), made)
    copies = tuple(jax.device_put(model, device) for device in devices or ())
    eos = eos_ids(origin, processor.tokenizer, config.text.vocab_size)
    return VLM(model, processor, settings, eos, str(path or "tiny_vl"), copies, stated_positions(origin))


def eos_ids(directory: Path, tokenizer: Any, rows: int) -> tuple[int, ...]:
    """Where generation stops: generation_config.json's eos_token_id, else config.json's, else the tokenizer's.

    Raises UserError where one is no id of an embedding of so many rows: no reply could end by it.
    """
    if stated := stated_eos(directory, rows):
        return stated
    if tokenizer.eos_token_id is None:
        raise UserError(f"{directory}: no eos_token_id in generation_config.json, config.json or the tokenizer")
    return (tokenizer.eos_token_id,)


def stated_positions(directory: Path) -> int | None:
    """The longest sequence that the model was made for; None where config.json does not say."""
    file = directory / "config.json"
    config = read_json(file)
    text = config.get("text_config")
    found = {**config, **(text if isinstance(text, dict) else {})}.get("max_position_embeddings")
    return None if found is None else check(f"{file}: max_position_embeddings", found, int, dict(low=1, high=2**31))


def stated_eos(directory: Path, rows: int) -> tuple[int, ...]:
    """What the two config files say of it; () where neither does."""
    for name in ("generation_config.json", "config.json"):
        file = directory / name
        found = read_json(file).get("eos_token_id") if file.exists() else None
        if found is not None:
            ids = check(f"{file}: eos_token_id", found, int | tuple[int, ...], dict(low=0, high=rows - 1))
            if ids == ():
                raise UserError(f"{file}: eos_token_id is empty, expected at least one id")
            return ids if isinstance(ids, tuple) else (ids,)
    return ()
