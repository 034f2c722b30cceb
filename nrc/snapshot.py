"""Snapshots: named arrays and a configuration in one safetensors file.

The metadata of the file holds `format` (the kind of snapshot, "nrc.field"), `version`, one JSON text per entry of the
configuration, and `sha256`, which covers all of these and every array: safetensors itself has no checksum, so a flipped
bit of a weight would load in silence. Reading runs no code from the file, and every fault of it is one `SnapshotError`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from .files import write_atomically

VERSION = 1


class SnapshotError(ValueError):
    """A snapshot that cannot be read, written or used here; the message names the file and the field at fault."""


def save_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, np.ndarray], config: Mapping[str, Any], *, kind: str
) -> None:
    """Write arrays and a configuration, replacing the file only once it is complete.

    Args:
        tensors: Arrays by name, of any type that safetensors holds (float32, uint32, ...).
        config: Values that JSON can hold, by names other than format, version and sha256.
        kind: What the file holds, for instance "nrc.field"; `load_tensors` must be given the same.

    Raises:
        SnapshotError: A value does not go into JSON, or the file cannot be written.
    """
    path = Path(path)
    metadata = {"format": kind, "version": str(VERSION)}
    for name, value in config.items():
        if name in ("format", "version", "sha256"):
            raise SnapshotError(f"{path}: '{name}' is the snapshot's own, not a name for a configuration's entry")
        try:
            metadata[name] = json.dumps(value, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise SnapshotError(f"{path}: {name} does not go into JSON ({error})") from error
    arrays = {name: np.asarray(array, order="C") for name, array in tensors.items()}
    metadata["sha256"] = _digest(arrays, metadata)

    def write(temporary: Path) -> None:
        try:
            save_file(arrays, temporary, metadata=metadata)
        except SafetensorError as error:
            raise ValueError(str(error)) from error

    write_atomically(path, write, SnapshotError)


def load_tensors(
    path: str | os.PathLike[str], *, kind: str | tuple[str, ...]
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays and the configuration that `save_tensors` wrote as `kind`, or one of several.

    Raises:
        SnapshotError: The file is missing, truncated, damaged, of another program, kind or version.
    """
    path = Path(path)
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = dict(file.metadata() or {})
            _check_format(path, metadata, kind)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except SnapshotError:
        raise
    except OSError as error:
        raise SnapshotError(f"{path}: {'no such file' if not path.exists() else error.strerror or error}") from error
    except (SafetensorError, ValueError, TypeError, LookupError, AttributeError, MemoryError) as error:
        raise SnapshotError(f"{path}: not a readable safetensors file ({error})") from error
    stated = metadata.pop("sha256", "")
    if stated != _digest(tensors, metadata):
        raise SnapshotError(f"{path}: sha256 does not match the content; the file is damaged")
    config = {}
    for name, text in metadata.items():
        if name not in ("format", "version"):
            try:
                config[name] = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise SnapshotError(f"{path}: {name} is not JSON ({error})") from error
    return tensors, config


def format_of(path: str | os.PathLike[str]) -> str | None:
    """What a snapshot says it holds, its `kind`; None where it cannot be read."""
    try:
        with safe_open(path, framework="numpy") as file:
            return (file.metadata() or {}).get("format")
    except (SafetensorError, OSError, ValueError, TypeError):
        return None


def take_tensor(
    path: str | os.PathLike[str],
    tensors: Mapping[str, np.ndarray],
    name: str,
    shape: tuple[int, ...] | None = None,
    dtype: Any = None,
) -> np.ndarray:
    """Array `name` of a snapshot, of the given shape and type. Raises SnapshotError."""
    if name not in tensors:
        raise SnapshotError(f"{path}: {name} is missing; the file holds {', '.join(sorted(tensors)) or 'no tensors'}")
    found = tensors[name]
    if shape is not None and (found.shape != tuple(shape) or found.dtype != np.dtype(dtype)):
        raise SnapshotError(
            f"{path}: {name} is {found.dtype}{list(found.shape)}, expected {np.dtype(dtype)}{list(shape)}"
        )
    return found


def check_finite(path: str | os.PathLike[str], name: str, values: np.ndarray) -> None:
    """Raise SnapshotError if an array has an infinity or NaN."""
    finite = np.isfinite(values)
    if not finite.all():
        raise SnapshotError(f"{path}: {name}: {values.size - np.count_nonzero(finite)} of {values.size} not finite")


def _check_format(path: Path, metadata: Mapping[str, str], kind: str | tuple[str, ...]) -> None:
    kinds = (kind,) if isinstance(kind, str) else kind
    if metadata.get("format") not in kinds:
        found, expected = metadata.get("format"), " or ".join(map(repr, kinds))
        raise SnapshotError(f"{path}: format is {found!r}, expected {expected}: written by another program")
    if metadata.get("version") != str(VERSION):
        raise SnapshotError(f"{path}: version is {metadata.get('version')!r}, this program reads {VERSION}")


def _digest(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> str:
    """SHA-256 over metadata and arrays in the order of their names, each text preceded by its length."""
    digest = hashlib.sha256()

    def add(*texts: str) -> None:
        for text in texts:
            data = text.encode()
            digest.update(len(data).to_bytes(8, "little"))
            digest.update(data)

    for name in sorted(metadata):
        add(name, metadata[name])
    for name in sorted(tensors):
        array = tensors[name]
        add(name, array.dtype.str, str(array.shape))
        digest.update(array.data)
    return digest.hexdigest()
