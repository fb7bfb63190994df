"""The model card of an export: a README.md whose front matter tells a hub what it is and what it came from."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from latent_jax.models.hf_io import LATENT_CONFIG, LATENT_WEIGHTS


@dataclasses.dataclass(frozen=True)
class Card:
    """What is told of a run: what it started from, by which method, on what, how long, and what was measured."""

    base_model: str
    method: str
    data: str
    steps: int
    command: str = ""
    numbers: Mapping[str, float] = dataclasses.field(default_factory=dict)
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    license: str = ""

    def text(self, head: bool) -> str:
        """Markdown with YAML front matter. `head`: whether a latent head stands beside the weights."""
        # JSON's strings are YAML's: no name can break out of its line.
        front = {"library_name": "transformers", "pipeline_tag": "image-text-to-text"}
        if _is_hub_id(self.base_model):
            front["base_model"] = self.base_model
        if self.license:
            front["license"] = self.license
        parts = [
            "---\n" + "".join(f"{key}: {_quoted(value)}\n" for key, value in front.items()) + "---",
            f"# {Path(self.base_model).name or 'model'}, {self.method}",
            f"Trained by latent_jax from `{self.base_model}`: method `{self.method}`, data `{self.data}`, "
            f"{self.steps:,} steps.",
        ]
        if self.numbers:
            rows = "".join(f"| {name} | {value:.4g} |\n" for name, value in self.numbers.items())
            parts.append("| measured on held-out data | |\n|---|---|\n" + rows.rstrip())
        parts.append(
            "The weights load in stock transformers (`Qwen2_5_VLForConditionalGeneration.from_pretrained`), without "
            "remote code."
        )
        if head:
            parts.append(
                f"`{LATENT_WEIGHTS}` and `{LATENT_CONFIG}` are the latent head, which other clients leave alone. With "
                'it the model imagines:\n\n```python\nimport latent_jax\n\nvlm = latent_jax.load("THIS_DIRECTORY")\n'
                'latents = vlm.imagine("a red ball left of a blue cube")\n```'
            )
        if self.command:
            parts.append(f"```\n{self.command}\n```")
        if self.versions:
            parts.append(", ".join(f"{name} {version}" for name, version in self.versions.items()))
        return "\n\n".join(parts)


def _is_hub_id(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and not Path(name).exists()


def _quoted(value: str) -> str:
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", " ") + '"'
