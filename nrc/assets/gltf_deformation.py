"""Morph targets and skins of glTF meshes (Khronos specification, sections 3.7.2.2 and 3.7.3)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from nrc.animation import Morph, Skin, Track
from nrc.assets.fields import Field
from nrc.assets.gltf_buffers import GltfFile


def read_morph(file: GltfFile, targets: list[Field], weights: Track, n: int) -> Morph:
    """The targets of a primitive of n vertices, with their animated weights."""
    if len(targets) != weights.values.shape[1]:
        raise targets[0].error(f"this primitive has {len(targets)} targets, another {weights.values.shape[1]}")
    changes: dict[str, np.ndarray | None] = {}
    for attribute in ("POSITION", "NORMAL", "TANGENT"):
        stack = np.zeros((len(targets), n, 3), np.float32)
        for i, target in enumerate(targets):
            if (field := target.get(attribute)) is not None:
                stack[i] = read_change(file, field, n)
        changes[attribute] = stack if any(attribute in target.value for target in targets) else None
    return Morph(weights, changes["POSITION"], changes["NORMAL"], changes["TANGENT"])


def read_change(file: GltfFile, field: Field, n: int) -> np.ndarray:
    """Differences (n, 3) that a morph target adds to an attribute."""
    change = file.accessor(field, ("VEC3",))
    if len(change) != n:
        raise field.error(f"has {len(change)} elements, the mesh has {n}")
    if not np.isfinite(change).all():
        raise field.error("has values that are not finite")
    return change


def read_skin(file: GltfFile, attributes: Field, index: Field, n: int, nodes: Mapping[int, np.ndarray]) -> Skin:
    """A skin for n vertices, whose joints are nodes of the file.

    Args:
        attributes: Of the primitive: any number of sets JOINTS_0, WEIGHTS_0, JOINTS_1, ...
        nodes: Those of the scene.
    """
    skin = file.element("skins", index)
    fields = skin.need("joints").list()
    n_nodes = len(file.root.list("nodes"))
    joints = tuple(field.index(n_nodes, "nodes") for field in fields)
    for field, joint in zip(fields, joints, strict=True):
        if joint not in nodes:
            raise field.error(f"node {joint} is not in the scene")
    binds = skin.get("inverseBindMatrices")
    inverse = file.accessor(binds, ("MAT4",)) if binds else np.tile(np.eye(4).ravel(), (len(joints), 1))
    if len(inverse) < len(joints):
        raise skin.error(f"{len(inverse)} inverse bind matrices for {len(joints)} joints")
    which, weights = [], []
    for i in range(sum(key.startswith("JOINTS_") for key in attributes.value)):
        joints_field, weights_field = attributes.need(f"JOINTS_{i}"), attributes.need(f"WEIGHTS_{i}")
        which.append(file.accessor(joints_field, ("VEC4",), convert=False).astype(np.int64))
        weights.append(file.accessor(weights_field, ("VEC4",)))
        if which[i].shape != (n, 4) or weights[i].shape != (n, 4):
            raise attributes.error(f"JOINTS_{i} and WEIGHTS_{i} must have one element for each vertex")
        if which[i].min() < 0 or which[i].max() >= len(joints):
            raise joints_field.error(f"joint {which[i].max()} of {len(joints)}")
        if not (np.isfinite(weights[i]).all() and weights[i].min() >= 0.0):
            raise weights_field.error("weights must be numbers >= 0")
    matrices = inverse[: len(joints)].reshape(-1, 4, 4).transpose(0, 2, 1)
    return Skin(joints, matrices, np.hstack(which), np.hstack(weights))
