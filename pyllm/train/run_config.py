"""All settings of a run from the command line and a YAML file, checked by name and kind."""

from __future__ import annotations

import difflib
import json
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from pyllm.errors import ConfigError, listed, shown
from pyllm.train.settings import TrainConfig

MAX_CONFIG_BYTES = 1_000_000


@dataclass(frozen=True)
class RunConfig:
    """What a run is made of, beside :class:`TrainConfig`.

    Either `model` names a folder or hub model whose training goes on, or `arch` and the sizes describe a new one.
    """

    data: tuple[str, ...] = ()  # files: .txt, .jsonl, .bin
    weights: tuple[float, ...] | None = None  # shares of the files; default: by size
    valid: tuple[str, ...] = ()  # held-out files
    valid_share: float = 0.01  # of each file of `data`, held out where there is no `valid`; 0: none
    tokenizer: str | None = None  # folder; default `model`
    packing: str = "documents"
    mask_prompt: bool = False
    mask_share: float | None = None  # of a text, hidden; default 0.15, with denoise 0.3
    mean_span: float = 3.0  # of what is hidden in one place with spans (tokens) or denoise (words)
    random_share: float = 0.0  # of the masks that are a random token, with denoise
    generator: str | None = None  # folder or hub name of the model whose tokens are detected, with rtd
    mask_rule: str = "bert"  # or "bernoulli": how they are chosen
    data_cache: str | None = None  # where tokens are kept; default: the user's cache folder
    model: str | None = None
    arch: str | None = None
    layers: int = 6
    hidden: int = 384
    heads: int = 6
    kv_heads: int | None = None
    ffn: int | None = None
    tie: bool = True
    vocab_size: int | None = None  # default: the tokenizer's
    init_std: float | None = None  # of the first weights of a new model; default 0.02
    context: int | None = None  # default 256, at most the model's
    batch_tokens: int | None = None  # of a micro-batch; default: eight contexts


OURS = {f.name: f for f in fields(RunConfig)}
THEIRS = {f.name: f for f in fields(TrainConfig)}
NAMES = (*OURS, *THEIRS)


def read_yaml(path: Path) -> dict[str, Any]:
    """The settings in a YAML file, by name; raises `ConfigError`."""
    import yaml

    with path.open("rb") as file:
        data = file.read(MAX_CONFIG_BYTES + 1)
    if len(data) > MAX_CONFIG_BYTES:
        raise ConfigError(f"{path}: expected at most {MAX_CONFIG_BYTES} bytes, found more")
    try:
        values = yaml.safe_load(data)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ConfigError(f"{path}: expected names and values, such as 'steps: 1000', found {shown(values)}")
    return values


def settings(values: Mapping[str, Any], where: str = "settings") -> tuple[RunConfig, TrainConfig]:
    """Both parts of a run's settings; `ConfigError` names everything that is unknown, missing or of a wrong kind."""
    problems, kinds = [], {**typing.get_type_hints(RunConfig), **typing.get_type_hints(TrainConfig)}
    made: dict[str, Any] = {}
    for name, value in values.items():
        if name not in kinds or name not in NAMES:
            near = difflib.get_close_matches(name, NAMES, 1)
            problems.append(f"{name}: unknown" + (f"; did you mean {near[0]}?" if near else ""))
            continue
        try:
            made[name] = _converted(value, kinds[name])
        except ValueError as error:
            problems.append(f"{name}: expected {error}, found {shown(value)}")
    missing = [n for n, f in THEIRS.items() if f.default is MISSING and n not in values]
    if not values.get("data"):
        missing.append("data")
    problems += [f"{name}: is needed" for name in missing]
    if made.get("model") and made.get("arch"):
        problems.append("model and arch: give one, to go on training a model or to begin a new one")
    elif not made.get("model") and not made.get("arch"):
        problems.append("model or arch: one is needed, to go on training a model or to begin a new one")
    if problems:
        raise ConfigError(listed(where, problems))
    ours = RunConfig(**{name: value for name, value in made.items() if name in OURS})
    return ours, TrainConfig(**{name: value for name, value in made.items() if name in THEIRS})


def as_json(ours: RunConfig, theirs: TrainConfig) -> str:
    """All settings as a JSON object, which is YAML as well."""
    return json.dumps({**vars(ours), **vars(theirs), "out": str(theirs.out)}, indent=2)


def _converted(value: Any, kind: Any) -> Any:
    """The value as its kind; `ValueError` says what was expected."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        inner = [k for k in typing.get_args(kind) if k is not type(None)]
        return None if value is None else _converted(value, inner[0])
    if typing.get_origin(kind) is tuple:
        item = typing.get_args(kind)[0]
        items = value if isinstance(value, (list, tuple)) else [value]
        return tuple(_converted(one, item) for one in items)
    if kind is Path and isinstance(value, (str, Path)):
        return Path(value)
    if kind is bool and isinstance(value, bool):
        return value
    if kind is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if kind is float and not isinstance(value, bool):
        if isinstance(value, (int, float)):
            return float(value)
        if isinstance(value, str):  # YAML reads 1e-3 as text
            try:
                return float(value)
            except ValueError:
                pass
    if kind is str and isinstance(value, (str, Path)):
        return str(value)
    expected = {bool: "true or false", int: "an integer", float: "a number", str: "text", Path: "a path"}
    raise ValueError(expected[kind])
