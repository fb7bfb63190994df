"""The model card of an export: a README.md whose front matter names its base model, task and licence for a hub."""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path

from latent_jax.errors import UserError
from latent_jax.models.hf_io import LATENT_CONFIG, LATENT_WEIGHTS
from latent_jax.models.sums import CARD
from latent_jax.runtime.files import read_bytes, read_json

LICENSE_KEYS = ("license", "license_name", "license_link")  # as hubs have them in a card's front matter
_MOST_CARD = 2**20


@dataclasses.dataclass(frozen=True)
class Card:
    """A run as the card describes it: base model, method, data, steps and measured numbers."""

    base_model: str
    method: str
    data: str
    steps: int
    command: str = ""
    numbers: Mapping[str, float] = dataclasses.field(default_factory=dict)
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    license: Mapping[str, str] = dataclasses.field(default_factory=dict)  # what the base model states, see LICENSE_KEYS

    def text(self, head: bool) -> str:
        """Markdown with YAML front matter. `head`: whether a latent head stands beside the weights."""
        # JSON's strings are YAML's: no name can break out of its line.
        front = {"library_name": "transformers", "pipeline_tag": "image-text-to-text"}
        if _is_hub_id(self.base_model):
            front["base_model"] = self.base_model
        front |= {key: self.license[key] for key in LICENSE_KEYS if key in self.license}
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


def stated_license(directory: Path) -> dict[str, str]:
    """The license that a model folder states: in its card's front matter, else in config.json; else {}."""
    try:
        text = read_bytes(directory / CARD, _MOST_CARD).decode(errors="replace").replace("\r\n", "\n")
        front = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
        pairs = re.findall(r"^(\w+):[ \t]*(\S.*?)[ \t]*$", front[1] if front else "", re.MULTILINE)
        found = {key: _unquoted(value) for key, value in pairs if key in LICENSE_KEYS}
    except UserError:  # no card, or none to read: no reason to stop
        found = {}
    if "license" in found or not (directory / "config.json").exists():
        return found if "license" in found else {}
    stated = read_json(directory / "config.json").get("license")
    return {"license": stated} if isinstance(stated, str) and stated else {}


def _unquoted(value: str) -> str:
    quoted = re.fullmatch(r"\"((?:[^\"\\]|\\.)*)\"|'(.*)'", value)
    if not quoted:
        return value
    return quoted[2] if quoted[1] is None else re.sub(r"\\(.)", r"\1", quoted[1])


def _is_hub_id(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and not Path(name).exists()


def _quoted(value: str) -> str:
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", " ") + '"'
