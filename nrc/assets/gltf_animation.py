"""Animations of a glTF file: the tracks of each node (Khronos specification, section 3.11)."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from nrc.animation import Interpolation, Track
from nrc.assets.fields import Field
from nrc.assets.gltf_buffers import GltfFile
from nrc.assets.model import Model

INTERPOLATIONS: dict[str, Interpolation] = {"LINEAR": "linear", "STEP": "step", "CUBICSPLINE": "cubic"}
TYPES = {"translation": "VEC3", "rotation": "VEC4", "scale": "VEC3", "weights": "SCALAR"}
Target = tuple[int, str]


@dataclass(frozen=True)
class _Clip:
    """One animation: its name for messages, and the track of each (node, path)."""

    name: str
    tracks: dict[Target, Track]


def read_tracks(file: GltfFile, model: Model, nodes: Collection[int], n_targets: dict[int, int]) -> dict[Target, Track]:
    """Track of each animated (node, "translation" | "rotation" | "scale" | "weights").

    Of several animations all play together that move different things; of two that move the same the first plays. The
    others are named in a warning.

    Args:
        nodes: Those of the scene that is shown; what moves others is left out.
        n_targets: Morph targets of each node that has any.
    """
    taken: dict[Target, Track] = {}
    left_out = []
    for animation in file.root.list("animations"):
        clip = _read_clip(file, model, animation, nodes, n_targets)
        if taken.keys() & clip.tracks.keys():
            left_out.append(clip.name)
        else:
            taken |= clip.tracks
    if left_out:
        model.warn(f"animations that move what an earlier one moves do not play: {', '.join(left_out)}")
    return taken


def _read_clip(
    file: GltfFile, model: Model, animation: Field, nodes: Collection[int], n_targets: dict[int, int]
) -> _Clip:
    name = animation.get("name")
    samplers = animation.need("samplers").list()
    n_nodes = len(file.root.list("nodes"))
    tracks: dict[Target, Track] = {}
    for channel in animation.need("channels").list():
        sampler = samplers[channel.need("sampler").index(len(samplers), f"{animation.path}.samplers")]
        target = channel.need("target")
        path = target.need("path").string((*TYPES, "pointer"))
        if path == "pointer":
            model.warn("KHR_animation_pointer is not supported: what it animates stands still")
            continue
        node = target.get("node")
        if node is None:  # an extension's business, says the specification
            continue
        i = node.index(n_nodes, "nodes")
        if i not in nodes:
            model.warn(f"{animation.path} also moves nodes outside the scene that is shown")
            continue
        if path == "weights" and i not in n_targets:
            raise target.error(f"nodes[{i}] has no mesh with morph targets")
        if (i, path) in tracks:
            raise target.error(f"nodes[{i}].{path} is moved twice")
        tracks[i, path] = _read_track(file, sampler, path, n_targets.get(i, 1))
    return _Clip(name.string() if name else animation.path, tracks)


def _read_track(file: GltfFile, sampler: Field, path: str, n_targets: int) -> Track:
    kind = sampler.get("interpolation")
    interpolation = INTERPOLATIONS[kind.string(tuple(INTERPOLATIONS))] if kind else "linear"
    times_field, values_field = sampler.need("input"), sampler.need("output")
    times = file.accessor(times_field, ("SCALAR",))[:, 0]
    if not np.isfinite(times).all() or times[0] < 0.0 or (np.diff(times) <= 0.0).any():
        raise times_field.error(f"accessors[{times_field.value}]: times must begin at 0 or later and increase")
    values = file.accessor(values_field, (TYPES[path],))
    if not np.isfinite(values).all():
        raise values_field.error(f"accessors[{values_field.value}]: has values that are not finite")
    per_key = (n_targets if path == "weights" else 1) * (3 if interpolation == "cubic" else 1)
    if len(values) != per_key * len(times):
        raise values_field.error(
            f"accessors[{values_field.value}] has {len(values)} elements, {len(times)} keys need {per_key * len(times)}"
        )
    width = n_targets if path == "weights" else values.shape[1]
    values = values.reshape(len(times), -1, width)  # a key: value, or slope before, value, slope after
    rotation = path == "rotation"
    keys = values[:, 1] if interpolation == "cubic" else values[:, 0]
    if rotation:
        lengths = np.linalg.norm(keys, axis=1, keepdims=True)
        if lengths.min() < 1e-6:
            raise values_field.error(f"accessors[{values_field.value}]: a quaternion has no length")
        if interpolation != "cubic":
            keys = keys / lengths
    slopes = (values[:, 0], values[:, 2]) if interpolation == "cubic" else None
    return Track(times, keys, interpolation, slopes, rotation)
