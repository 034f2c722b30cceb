"""`Records`: the surface points that a radiance cache is asked about or trained with."""

from __future__ import annotations

import warp as wp

from nrc.kernels.trace import RecordView

FIELDS = {
    "position": wp.vec3,
    "wo": wp.vec3,
    "normal": wp.vec3,
    "roughness": wp.float32,
    "diffuse": wp.vec3,
    "specular": wp.vec3,
}


class Records:
    """Room for `capacity` records on `device`, structure of arrays; `arrays` are used as they are, the others are made.

    Raises TypeError for an unknown field, ValueError for an array of another shape, type or device.

    Attributes:
        position: (capacity,) vec3, world space [scene units].
        wo: (capacity,) vec3, unit, towards the previous vertex.
        normal: (capacity,) vec3, unit shading normal on wo's side.
        roughness: (capacity,) float, perceptual, 0...1.
        diffuse, specular: (capacity,) vec3, albedos.
        view: The same arrays as the struct that kernels take.
    """

    position: wp.array
    wo: wp.array
    normal: wp.array
    roughness: wp.array
    diffuse: wp.array
    specular: wp.array

    def __init__(self, capacity: int, device: wp.Device, **arrays: wp.array) -> None:
        unknown = sorted(arrays.keys() - FIELDS.keys())
        if unknown:
            raise TypeError(f"unknown record fields {', '.join(unknown)}; a record has {', '.join(FIELDS)}")
        for name, array in arrays.items():
            if array.shape != (capacity,) or array.dtype != FIELDS[name] or array.device != device:
                expected = f"({capacity},) {FIELDS[name].__name__} on {device}"
                raise ValueError(f"{name}: expected {expected}, got {array.shape} {array.dtype} on {array.device}")
        self.capacity = capacity
        self.device = device
        self.view = RecordView()
        for name, dtype in FIELDS.items():
            array = arrays[name] if name in arrays else wp.zeros(capacity, dtype=dtype, device=device)
            setattr(self, name, array)
            setattr(self.view, name, array)
