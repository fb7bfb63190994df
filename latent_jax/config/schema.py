"""The config: made, overridden, checked, written and read back.

Every run is described by one frozen, hashable `Config`. Config files build it with `default` and plain assignments on a
`ml_collections.ConfigDict`; `override` applies the command line's `--config.a.b=value`; `resolve` checks everything and
freezes it. A training run's class is its method's, which extends `Config` (training.py) with sections of its own; an
evaluation's is `Evaluation` (evaluation.py).
"""

import dataclasses
import functools
import inspect
import json
import types
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_collections

from latent_jax import methods
from latent_jax.config import evaluation, fields, training
from latent_jax.config.evaluation import Evaluation
from latent_jax.config.training import Config, sections
from latent_jax.errors import UserError
from latent_jax.runtime import files, provenance

_NAMED = 5  # settings that a line names, of those that differ
RESERVED = ("versions", "git_commit", "measured", "checksum")


@functools.cache
def schema(method: str) -> type[Config]:
    """The config class of a method.

    Raises UserError for a method that does not exist, and where its `config` is not a config class.
    """
    found = methods.find(method)
    if problem := _no_config(found.config) or _no_settings(found.config, found.head_settings):
        raise UserError(f"config.method: method {method!r}: {problem}")
    return found.config


def _no_config(kind: object) -> str:
    """Why an object cannot be the config class of a method; '' where it can."""
    if not isinstance(kind, type) or not issubclass(kind, Config):
        return f"config is {kind!r}, expected a frozen dataclass that extends config.training.Config"
    for owner in kind.__mro__[: kind.__mro__.index(Config)]:
        own = inspect.get_annotations(owner)
        if own and "__dataclass_fields__" not in vars(owner):  # its sections would be left out without a word
            return f"{owner.__name__} is not a dataclass, expected @dataclasses.dataclass(frozen=True) before it"
        if taken := {*RESERVED, *Config.__dataclass_fields__} & set(own):
            return f"sections {sorted(taken)} are taken by the common config"
    for name, section in sections(kind).items():
        if not dataclasses.is_dataclass(section):
            return f"{name} is {fields.shown(section)}, expected a section: a frozen dataclass of options"
        parameters = vars(section)["__dataclass_params__"]
        if not parameters.frozen:  # the config is hashed where it is a part of a compiled program
            return f"section {name} is not frozen, expected @dataclasses.dataclass(frozen=True)"
        for field in dataclasses.fields(section):
            if "doc" not in field.metadata or not fields.known(fields.annotations(section)[field.name]):
                return (
                    f"{name}.{field.name} is no option, expected NAME: TYPE = option(DEFAULT, DOC), the type of int, "
                    "float, bool, str, a tuple or a union of these"
                )
    try:
        kind()
    except TypeError as problem:
        return f"has no default for every section: {problem}"
    return ""


def _no_settings(kind: type[Config], keys: Iterable[str]) -> str:
    """Which of a method's head_settings is no setting of its config; '' where all are."""
    known = leaves(kind())
    return next((f"head_settings: {key!r} is no setting of its config" for key in keys if key not in known), "")


def default(method: str = "pretrain") -> ml_collections.ConfigDict:
    """Every section with every default, for a config file to change. Wrong keys and types are found by `resolve`."""
    # The types are the schema's to check: ConfigDict's own checks would speak another language, and earlier.
    config = ml_collections.ConfigDict(to_dict(schema(method)()), type_safe=False)
    config.method = method
    return config


def default_evaluation() -> ml_collections.ConfigDict:
    """As `default`, of the job `evaluate`."""
    return ml_collections.ConfigDict(to_dict(Evaluation()), type_safe=False)


def override(config: ml_collections.ConfigDict, overrides: Iterable[tuple[str, str]]) -> None:
    """Applies the command line's `a.b=text` pairs in place. Raises UserError naming the key, in the schema's words."""
    for key, text in overrides:
        name = f"config.{key}"
        if key in ("method", "job") and text != (fixed := config.get(key)):
            raise UserError(f"{name}: a config file fixes its {key} ({fixed!r}); choose the file of {text!r}")
        owner: type = _schema(config)
        node, parts = config, key.split(".")
        for depth, part in enumerate(parts):
            declared = {field.name: field for field in dataclasses.fields(owner)}
            if part not in declared:
                raise fields.unknown(name, part, declared)
            annotation = fields.annotations(owner)[part]
            section, last = dataclasses.is_dataclass(annotation), depth + 1 == len(parts)
            if section == last:
                raise UserError(
                    f"{name}: "
                    + (
                        f"is a section; set one of {', '.join(fields.annotations(annotation))}"
                        if section
                        else f"'{part}' is a single value"
                    )
                )
            if last:
                node[part] = fields.parse(name, text, annotation, declared[part].metadata)
            else:
                owner, node = annotation, node[part]


def resolve(config: Mapping | ml_collections.ConfigDict) -> Config | Evaluation:
    """Checks every key, type, range and combination, and freezes the result.

    Returns an instance of `schema(method)` or Evaluation: attribute access, hashable. Raises UserError on the first
    fault.
    """
    config = config.to_dict() if isinstance(config, ml_collections.ConfigDict) else config
    frozen: Config | Evaluation = _build(_schema(config), config, "config")
    if isinstance(frozen, Evaluation):
        evaluation.check(frozen)
    else:
        training.check(frozen)
    return frozen


def to_dict(config: Any) -> dict[str, Any]:
    """A resolved config, or a section, as nested plain dicts."""
    return {
        field.name: to_dict(value) if dataclasses.is_dataclass(value := getattr(config, field.name)) else value
        for field in dataclasses.fields(config)
    }


def leaves(config: Any) -> dict[str, tuple[Any, dataclasses.Field, fields.Annotation]]:
    """Dotted key -> (value, field, annotation) of every setting, in the schema's order."""
    found: dict[str, tuple[Any, dataclasses.Field, fields.Annotation]] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            found |= {f"{field.name}.{key}": leaf for key, leaf in leaves(value).items()}
        else:
            found[field.name] = (value, field, fields.annotations(type(config))[field.name])
    return found


def describe(config: Config | Evaluation) -> str:
    """One line a setting: its key, its value, what it takes and what it means."""
    lines = []
    for key, (value, field, annotation) in leaves(config).items():
        takes = fields.expected(annotation, field.metadata)
        lines.append(f"  --config.{key}={value}\n        {field.metadata['doc']} ({takes})")
    return "\n".join(lines)


def write(config: Config | Evaluation, path: Path, measured: Mapping = types.MappingProxyType({})) -> None:
    """Writes config.json, whole or not at all: every setting, the package versions, the git commit.

    `measured` is JSON-able: what the run chose by looking at its data, which a resumed run must not choose again.
    """
    found = {"versions": provenance.versions(), "git_commit": provenance.git_commit(), "measured": dict(measured)}
    content = {**to_dict(config), **found}
    files.write_text(path, json.dumps({**content, "checksum": _checksum(content)}, indent=2) + "\n")


def read(path: Path) -> tuple[Config | Evaluation, dict]:
    """Reads a config.json back: the resolved config and `measured`. Raises UserError naming the file and the key."""
    found = read_all(path)
    measured = found.get("measured", {})
    if not isinstance(measured, dict):
        raise UserError(f"{path}: measured: got {measured!r}, expected an object")
    try:
        return resolve({key: value for key, value in found.items() if key not in RESERVED}), measured
    except UserError as problem:
        raise UserError(f"{path}: {problem}") from None


def read_run(path: Path) -> tuple[Config, dict]:
    """As `read`, of a training run. Raises UserError where the config is that of another job."""
    config, measured = read(path)
    if not isinstance(config, Config):
        raise UserError(f"{path}: is the config of the job {config.job!r}, expected that of a training run")
    return config, measured


def read_all(path: Path) -> dict:
    """The content of a config.json. Raises UserError where it is not what `write` wrote; files of earlier versions
    have no checksum."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file; expected the config.json of a run")
    found = files.read_json(path, dict, "the config.json of a run")
    if "checksum" in found and found.pop("checksum") != _checksum(found):
        raise UserError(f"{path}: is not what the run wrote (checksum); restore it, or use a new --workdir")
    return found


def _checksum(content: Mapping) -> str:
    return files.checksum(json.dumps(json.loads(json.dumps(content)), sort_keys=True))


def check_resume(old: Config | Evaluation, new: Config | Evaluation) -> list[str]:
    """May a run begun with `old` go on with `new`?

    Returns one line for each change that is allowed and still worth saying. Raises UserError naming every key that
    differs and that trained numbers depend on.
    """
    if old.job != new.job:
        raise UserError(f"this workdir is of the job {old.job!r}, not {new.job!r}; use a new --workdir")
    before, after = leaves(old), leaves(new)
    differ = [key for key in {**before, **after} if _value(before, key) != _value(after, key)]
    refused = [key for key in differ if key not in after or not after[key][1].metadata["resumable"]]
    if refused:
        told = [f"config.{key} ({_value(before, key)!r} -> {_value(after, key)!r})" for key in refused[:_NAMED]]
        told += [f"{len(refused) - _NAMED} more"] if len(refused) > _NAMED else []
        raise UserError(
            f"this workdir was begun with another config: {', '.join(told)}; use the old values or a new --workdir"
        )
    if isinstance(old, Evaluation) or isinstance(new, Evaluation) or old.train.steps == new.train.steps:
        return []
    if stretched := _shares_of_the_run(after):
        return [
            f"train.steps changes from {old.train.steps} to {new.train.steps}: {' and '.join(stretched)} "
            f"{'is' if len(stretched) == 1 else 'are'} stretched to it, so that numbers may jump where the run resumes"
        ]
    return []


def _shares_of_the_run(found: dict) -> list[str]:
    """What a training run's settings place by fractions of its steps."""
    shares = [f"the {found['train.schedule'][0]} schedule"] if found["train.schedule"][0] != "constant" else []
    shares += ["the warm-up"] if found["train.warmup"][0] else []
    return shares + [key for key, (value, _, _) in found.items() if key.endswith("_schedule") and value]


def _value(found: dict, key: str) -> Any:
    return found[key][0] if key in found else None


def _schema(config: Mapping | ml_collections.ConfigDict) -> type[Config] | type[Evaluation]:
    """The config class of the job, and of a training run's method."""
    if config.get("job", Config.job) == Evaluation.job:
        return Evaluation
    return schema(_method(config))


def _method(config: Mapping | ml_collections.ConfigDict) -> str:
    method = config.get("method", Config.method)
    if not isinstance(method, str):
        raise UserError(f"config.method: got {method!r}, expected one of {', '.join(methods.names())}")
    return method


def _build(owner: type, values: object, where: str) -> Any:
    if not isinstance(values, Mapping):
        raise UserError(f"{where}: got {values!r}, expected a section with {', '.join(fields.annotations(owner))}")
    declared = {field.name: field for field in dataclasses.fields(owner)}
    for name in values:
        if name not in declared:
            raise fields.unknown(f"{where}.{name}", str(name), declared)
    built = {}
    for name, field in declared.items():
        key, annotation = f"{where}.{name}", fields.annotations(owner)[name]
        if name not in values:
            continue
        if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
            built[name] = _build(annotation, values[name], key)
        else:
            built[name] = fields.check(key, values[name], annotation, field.metadata)
    return owner(**built)
