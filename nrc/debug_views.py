"""Pictures of what the cache does, for the eye and for bug reports: the views that users of other caches rely on."""

from __future__ import annotations

import numpy as np

from nrc.renderer import Renderer


def debug_views(renderer: Renderer) -> dict[str, np.ndarray]:
    """Trace one more frame, which neither trains nor reaches the film, and return its views.

    Returns:
        Arrays of the picture's size, by name:

        - query_vertex: (h, w) at which vertex (from 1) the path ended in the cache, 0 where it did not.
        - spread: (h, w) area spread of the path there over its primary footprint; it ends above the threshold.
        - cache: (h, w, 3) the cache asked directly at the first vertex that is not a mirror [W m^-2 sr^-1].
        - training_radiance_1, training_radiance_2: (h, w, 3) target of the first and second record of each training
          path, filling its tile [W m^-2 sr^-1].
        - training_bounces: (h, w) records of the training path of each tile.
        - loss: (h, w) training loss (relative squared error, normalised) at the first record, per tile.

    Raises:
        ValueError: The renderer has no cache.
    """
    tracer, cache = renderer.tracer, renderer.cache
    if cache is None:
        raise ValueError("debug views show the cache; the path integrator has none")
    h, w = tracer.height, tracer.width
    views: dict[str, np.ndarray] = {}
    frame = renderer.frame_index
    tracer.trace(frame, n_training_paths=renderer.n_training_paths())
    vertex = tracer.query_vertex.numpy().reshape(h, w)
    views["query_vertex"] = vertex.astype(np.float32)
    views["spread"] = np.where(vertex > 0, tracer.query_spread.numpy().reshape(h, w), 0.0).astype(np.float32)
    tracer.gather_targets(cache.query_primary(tracer.tails, tracer.n_tails))

    n_records = int(tracer.n_records.numpy()[0])
    slot = tracer.record_slot.numpy()[:n_records]
    index = tracer.vertex_index.numpy()[:n_records]
    target = tracer.targets.numpy()[:n_records]
    bounces = np.bincount(slot, minlength=tracer.n_training_paths).astype(np.float32)
    views["training_bounces"] = _paint(bounces, tracer.tile, (h, w))
    for vertex_index in (0, 1):
        chosen = index == vertex_index
        radiance = np.zeros((tracer.n_training_paths, 3), np.float32)
        radiance[slot[chosen]] = target[chosen]
        views[f"training_radiance_{vertex_index + 1}"] = _paint(radiance, tracer.tile, (h, w))
    albedo = (tracer.records.diffuse.numpy() + tracer.records.specular.numpy())[:n_records]
    unit = np.maximum(albedo * cache.stats()["radiance_scale"], 1e-6)
    predicted = cache.query_primary(tracer.records, tracer.n_records).numpy()[:n_records] / unit
    luminance = predicted @ np.array([0.299, 0.587, 0.114])
    error = np.mean((predicted - target / unit) ** 2, axis=1) / (luminance**2 + 0.01)
    loss = np.zeros(tracer.n_training_paths, np.float32)
    loss[slot[index == 0]] = error[index == 0]
    views["loss"] = _paint(loss, tracer.tile, (h, w))

    tracer.trace(frame, integrator="cache")
    answer = cache.query(tracer.queries, tracer.n_queries).numpy()
    asked = tracer.query_vertex.numpy() > 0
    direct = tracer.radiance.numpy().copy()
    direct[asked] += tracer.query_weight.numpy()[asked] * answer[tracer.query_place.numpy()[asked]]
    views["cache"] = direct.reshape(h, w, 3)
    return views


def _paint(per_tile: np.ndarray, tile: tuple[int, int], shape: tuple[int, int]) -> np.ndarray:
    """Fill each tile of the picture with its value."""
    tile_width, tile_height = tile
    columns = -(-shape[1] // tile_width)
    row = np.arange(shape[0]) // tile_height
    column = np.arange(shape[1]) // tile_width
    return per_tile[row[:, None] * columns + column[None, :]]
