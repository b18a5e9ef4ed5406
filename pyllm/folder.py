"""Finding a model's folder, locally or through the hub, and reading the JSON files in it."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from pyllm.errors import ConfigError, ModelNotFoundError, PyllmError, shown

MAX_CONFIG_BYTES = 10_000_000
WANTED_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
UNWANTED_FILES = ["*/*", "consolidated*.safetensors"]  # other formats and second copies of the weights
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)


def resolve(model: str | os.PathLike[str], revision: str | None = None, offline: bool = False) -> Path:
    """The folder of `model`: itself when it is a local folder, else a hub repository, fetched if it is not cached.

    `revision` is a branch, tag or commit of the repository. With `offline`, or HF_HUB_OFFLINE set, only the cache is
    looked at. Raises `ModelNotFoundError`.
    """
    name = os.fspath(model)
    path = Path(name).expanduser() if name.startswith("~") else Path(name)
    try:
        if path.is_dir() and name:
            if revision is not None:
                raise ModelNotFoundError(f"{name} is a local folder, which has no revisions: leave revision out")
            return path
        is_file = path.is_file()
    except (OSError, ValueError) as error:  # too long, or a NUL in it
        raise ModelNotFoundError(f"{shown(name)} is neither a folder nor a hub name: {error}") from error
    if is_file:
        raise ModelNotFoundError(f"{name} is a file; give the folder that holds config.json and the weights")
    if not HUB_ID.fullmatch(name):
        raise ModelNotFoundError(f"no folder {shown(name)}, and it is not a hub name (expected owner/name)")
    return _fetch(name, revision, offline)


def read_config(folder: Path) -> dict[str, Any]:
    """The object in `folder`/config.json; raises `ConfigError`."""
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder; expected one with config.json and the weights")
    return read_json(folder / "config.json", MAX_CONFIG_BYTES, ConfigError)


def read_json(path: Path, max_bytes: int, error_type: type[PyllmError]) -> dict[str, Any]:
    """The JSON object in a file of at most `max_bytes`; everything that can be wrong with it raises `error_type`."""
    content = _read_content(path, max_bytes, error_type)
    if not isinstance(content, dict):
        raise error_type(f"{path}: expected a JSON object, found {shown(content)}")
    return content


def read_json_list(path: Path, max_bytes: int, error_type: type[PyllmError]) -> list[Any]:
    """The same of a JSON list."""
    content = _read_content(path, max_bytes, error_type)
    if not isinstance(content, list):
        raise error_type(f"{path}: expected a JSON list, found {shown(content)}")
    return content


def _read_content(path: Path, max_bytes: int, error_type: type[PyllmError]) -> Any:
    try:
        if not path.exists():
            raise error_type(f"{path}: no such file")
        if not path.is_file():  # opening a pipe would wait for ever
            raise error_type(f"{path}: expected a regular file, found something else")
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
    except OSError as error:
        raise error_type(f"{path}: cannot be read: {error.strerror or error}") from error
    if len(data) > max_bytes:
        raise error_type(f"{path}: expected at most {max_bytes} bytes, found more")
    try:
        return json.loads(data.decode("utf-8-sig"), object_pairs_hook=unique_names, parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise error_type(f"{path}: not UTF-8 text: {error.reason} at byte {error.start}") from error
    except RecursionError:
        raise error_type(f"{path}: not valid JSON: nested too deeply") from None
    except ValueError as error:
        raise error_type(f"{path}: not valid JSON: {error}") from error


def unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """`object_pairs_hook` that refuses an object in which a name occurs twice."""
    result: dict[str, Any] = {}
    for name, value in pairs:
        if name in result:
            raise ValueError(f"the name {shown(name)} occurs twice")
        result[name] = value
    return result


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is not a JSON number")


def _fetch(name: str, revision: str | None, offline: bool) -> Path:
    import huggingface_hub  # imported late: it is slow to import, and a local folder needs no hub
    from huggingface_hub import errors

    at = f"{name} (revision {revision})" if revision else name
    hint = f"no local folder {name} either"
    try:
        folder = huggingface_hub.snapshot_download(
            name,
            revision=revision,
            local_files_only=offline,
            allow_patterns=WANTED_FILES,
            ignore_patterns=UNWANTED_FILES,
        )
    except errors.GatedRepoError as error:
        raise ModelNotFoundError(
            f"{at}: the owner grants access on request; ask for it on the repository's page, then set HF_TOKEN"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ModelNotFoundError(f"{name} has no revision {shown(revision)}") from error
    except errors.RepositoryNotFoundError as error:
        raise ModelNotFoundError(
            f"{at}: no such repository, or it is private and HF_TOKEN is not set; {hint}"
        ) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        why = "working offline" if offline or huggingface_hub.constants.HF_HUB_OFFLINE else "the hub cannot be reached"
        raise ModelNotFoundError(f"{at}: not in the local cache, and {why}; {hint}") from error
    except Exception as error:  # of the hub, of its HTTP library, of the disk: all mean that there is no model
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelNotFoundError(f"{at}: could not be fetched: {reason}; {hint}") from error
    return Path(folder)
