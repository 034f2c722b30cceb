"""Arguments that several commands share."""

from __future__ import annotations

import argparse
import math
import sys

from nrc import launch


class UsageError(ValueError):
    """Arguments that do not fit together."""


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="cpu, cuda:0, ... (default: the first CUDA device, else the CPU)")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: all cores)")


def positive_int(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text}")
    return value


def positive_float(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not value > 0.0 or not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text}")
    return value


def parse_defines(texts: list[str]) -> dict[str, str] | None:
    """Values of NAME=VALUE by name, None without any. Raises UsageError."""
    defines = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise UsageError(f"-D {text}: expected NAME=VALUE")
        defines[name] = value
    return defines or None


def use_threads(arguments: argparse.Namespace) -> None:
    import warp as wp

    wp.config.log_level = wp.LOG_WARNING
    launch.set_threads(arguments.threads)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
