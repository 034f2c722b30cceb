"""Writing a file in one step, where it is there complete or the older one still is; and what a file holds, in short."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable
from pathlib import Path


def write_atomically(path: Path, write: Callable[[Path], object], error: type[ValueError] = ValueError) -> None:
    """Let `write` fill a temporary file beside `path`, then put it in place in one step.

    A process that dies in between leaves the older file as it was, and perhaps a hidden temporary one beside it. Raises
    `error`, naming the file and the reason, where `write` fails or the file cannot be written.
    """
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.{threading.get_ident()}{path.suffix}")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # as the process asks for; some writers make private files
        write(temporary)
        temporary.chmod(mode)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())  # or a power failure could leave the new name on an empty file
        os.replace(temporary, path)
    except (OSError, RuntimeError, ValueError, TypeError) as cause:
        reason = cause.strerror if isinstance(cause, OSError) and cause.strerror else str(cause)
        if not path.parent.is_dir():
            reason = f"no folder {path.parent}"
        raise error(f"{path}: cannot be written ({reason})") from cause
    finally:
        temporary.unlink(missing_ok=True)


def digest(path: Path) -> str:
    """SHA-256 of a file's content."""
    sha256 = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            sha256.update(block)
    return sha256.hexdigest()
