"""Fills a latent cache: every target image of the training data once through the frozen encoder.

`--config.data.latent_cache=DIR` makes the cache on first use and only reads it after that. A run that is killed while
the cache is made goes on where it stopped. A record that training would skip (a broken image) gets no latents, and so
training skips it.
"""

import dataclasses
import functools
import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jaxtyping import Float

from latent_jax.config.training import Config, mixture
from latent_jax.data import batch_shapes, packing, pipeline
from latent_jax.data.chat import Processor
from latent_jax.data.latent_cache import Cached, LatentCache
from latent_jax.data.layout import Example, Layout
from latent_jax.errors import UserError
from latent_jax.methods.contract import Batch, CachedTargets, Method
from latent_jax.models import hf_io
from latent_jax.models.parameters import Structure
from latent_jax.models.qwen2_5_vl.config import ModelConfig
from latent_jax.models.qwen2_5_vl.vision import VisionTower
from latent_jax.runtime import sharding
from latent_jax.training.state import Arrays, compute_dtype

# What a group holds in one pass: enough to keep a device busy, and little beside a training step.
_PATCHES, _EXAMPLES = 8192, 256
_SECONDS_BETWEEN_LINES = 15.0


@dataclasses.dataclass(frozen=True)
class TargetCache:
    """Makes and opens the caches of a run: everything that latents depend on, and the mesh that computes them."""

    config: Config
    method: Method
    processor: Processor
    model_config: ModelConfig
    origin: Path
    mesh: jax.sharding.Mesh

    def attach(self, data: Sequence[tuple[Sequence, float]], say: Callable[[str], None]) -> list[tuple[Cached, float]]:
        """[(source, weight), ...] with latents attached to every record, from caches in `config.data.latent_cache`.

        A source's cache is in DIR/NAME-SPLIT; missing shards are made first. Raises UserError if the method has no
        latent targets, or if a cache was made from something else.
        """
        images = self.targets.images
        names = [name for name, _ in mixture(self.config.data.name)]
        caches = [self.open(name, len(source)) for name, (source, _) in zip(names, data, strict=True)]
        for cache, (source, _) in zip(caches, data, strict=True):
            self.fill(cache, source, say)
        return [(Cached(source, cache, images), weight) for cache, (source, weight) in zip(caches, data, strict=True)]

    @functools.cached_property
    def targets(self) -> CachedTargets:
        """What the method keeps of a record. Raises UserError where it has no latent targets."""
        found = self.method.targets
        if found is None or not self.method.room(self.config).targets:
            raise UserError(f"config.data.latent_cache: method {self.config.method!r} has no latent targets to keep")
        return found

    def open(self, name: str, records: int) -> LatentCache:
        """The cache of one source, checked against all that its latents depend on.

        They are kept in the dtype that the encoder computes in: pooled in fp32, then, for bfloat16, rounded once (which
        changes nothing where a cell of the grid is a single merged token).
        """
        data, targets = self.config.data, self.targets
        made_from = {
            "dataset": name,
            "split": data.split,
            "encoder": _checksum(self.origin),
            "vision": dataclasses.asdict(self.model_config.vision),
            "preprocessing": dataclasses.asdict(self.processor.image),
            "latent": targets.made_from(self.config),
        }
        shape = targets.shape(self.model_config, self.config)
        dtype = compute_dtype(self.config, self.mesh).name
        return LatentCache.open(Path(data.latent_cache) / f"{name}-{data.split}", made_from, records, shape, dtype)

    def fill(self, cache: LatentCache, source: Sequence, say: Callable[[str], None]) -> None:
        """Makes the missing shards, each written as soon as it is whole."""
        missing = cache.missing()
        if not missing:
            return
        if jax.process_count() > 1:
            raise UserError(f"{cache.folder}: not complete; make the latent cache in a run of one process first")
        with cache.filling():
            self._fill(cache, source, cache.missing(), say)

    def _fill(self, cache: LatentCache, source: Sequence, missing: list[int], say: Callable[[str], None]) -> None:
        total = sum(len(cache.indices(shard)) for shard in missing)
        say(f"latent cache: {total} of {cache.records} images to encode, into {cache.folder}")
        began = told = time.monotonic()
        batch_shape = self.batch_shape(source, cache)
        run = self.compiled(batch_shape)
        seen = known = 0
        for shard in missing:
            rows = self.encoded(source, cache.indices(shard), batch_shape, run)
            cache.write(shard, rows)
            seen, known = seen + len(cache.indices(shard)), known + len(rows)
            if time.monotonic() - told > _SECONDS_BETWEEN_LINES:
                told = time.monotonic()
                say(f"latent cache: {seen} of {total} images")
        say(f"latent cache: done in {time.monotonic() - began:.0f} s, {total - known} records left out")

    def batch_shape(self, source: Sequence, cache: LatentCache) -> packing.BatchShape:
        """Static shapes of a pass, of which a shard takes a whole number."""
        config, vision = self.config, self.model_config.vision
        groups = sharding.data_shards(self.mesh)
        sample = pipeline.sample_examples(source, self._layout, self.processor, config.data.sample)
        sizes = [packing.size_of(example) for example in sample]
        patches = max(1.0, float(np.mean([size.patches for size in sizes])))
        passes = -(-cache.shard_records // (groups * max(1, min(_EXAMPLES, int(_PATCHES / patches)))))
        chosen = batch_shapes.choose(
            sizes,
            batch_size=groups * -(-cache.shard_records // (groups * passes)),
            groups=groups,
            window_patches=vision.window_patches,
            merge_unit=vision.merge_unit,
        )
        # Room for all targets, whatever the sampled records have: the shape of a row is made of it.
        return dataclasses.replace(chosen, targets=self.method.room(config).targets)

    def compiled(self, batch_shape: packing.BatchShape) -> Callable:
        """Batch -> targets (G, E, S, Z), for passes of this shape. Loads the encoder."""
        config = dataclasses.replace(
            self.config, data=dataclasses.replace(self.config.data, image_patches=batch_shape.image_patches)
        )
        dtype = compute_dtype(config, self.mesh)
        structure = Structure.of(nnx.eval_shape(lambda: VisionTower(self.model_config.vision, nnx.Rngs(0), dtype)))
        everywhere = sharding.replicated(self.mesh)
        prefix = "vision."
        places = {prefix + path: everywhere for path in structure.variables}
        # A frozen encoder stays in its checkpoint's dtype and is cast where it is used (state.Setup.build).
        found = hf_io.load(self.origin, self.model_config, shardings=places, prefix=prefix)
        arrays = {path.removeprefix(prefix): array.astype(dtype) for path, array in found.items()}

        @jax.jit
        def run(arrays: Arrays, batch: Batch) -> Float[jax.Array, "G E S Z"]:
            first = {key: value[0] for key, value in batch.items()}
            return self.targets.encode(structure.build(arrays), self.model_config, first, config)

        place = sharding.batch_sharding(self.mesh)
        return lambda batch: run(arrays, jax.device_put(batch, place))

    def encoded(
        self, source: Sequence, indices: range, batch_shape: packing.BatchShape, run: Callable
    ) -> dict[int, tuple[Sequence[bytes], np.ndarray]]:
        """{record index: (encoded images, latents (s, Z))} of a shard, without the records that training would skip.

        s is the share of S that belongs to the record's targets.
        """
        order: list[tuple[int, Sequence[bytes]]] = []
        found: dict[int, tuple[Sequence[bytes], np.ndarray]] = {}

        def usable() -> Iterator[Example]:
            for index, images, example in self._examples(source, indices, batch_shape):
                if example is not None:
                    order.append((index, images))
                    yield example

        def collect(latents: jax.Array, targets: np.ndarray, numbers: np.ndarray) -> None:
            fetched = np.asarray(latents)
            for group, place in np.argwhere(targets.any(-1)):
                index, images = order[numbers[group, place]]
                share = fetched.shape[2] * targets[group, place].sum() // targets.shape[-1]
                found[index] = images, fetched[group, place, :share]

        pending = None
        for batch in packing.batches(usable(), batch_shape):
            started = run(batch), batch["target_mask"][0], batch["number"][0]
            if pending:  # fetched one late, so that the device never waits for the host
                collect(*pending)
            pending = started
        if pending:
            collect(*pending)
        return found

    def _examples(
        self, source: Sequence, indices: range, batch_shape: packing.BatchShape
    ) -> Iterator[tuple[int, Sequence[bytes], Example | None]]:
        """(index, encoded images, Example), decoded by threads, a few ahead; no Example if training would skip it."""

        def one(index: int) -> tuple[int, Sequence[bytes], Example | None]:
            record = source[index]
            try:
                with pipeline.naming(record):
                    images = self.targets.images(record)
                    example = self.processor.lay_out(self._layout(record, index)) if images else None
                    if example is not None:
                        batch_shape.check(example)
            except UserError:
                return index, (), None
            return index, images, example

        ahead = 8 * self.config.data.threads
        with ThreadPoolExecutor(self.config.data.threads) as pool:
            for at in range(0, len(indices), ahead):
                yield from pool.map(one, indices[at : at + ahead])

    def _layout(self, record: dict, index: int) -> Layout:
        return self.targets.layout(record, self.config)


def _checksum(directory: Path) -> str:
    """SHA-256 of the vision tower's weights: names, dtypes, shapes and values, as the checkpoint stores them."""
    digest = hashlib.sha256()
    checkpoint = hf_io.Checkpoint.open(directory)
    for name in sorted(name for name in checkpoint.tensors if name.startswith("visual.")):
        checkpoint.check(name)
        tensor = checkpoint.tensors[name]
        digest.update(f"{name} {tensor.dtype} {tensor.shape}\n".encode())
        digest.update(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
