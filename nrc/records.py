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
    """Room for `capacity` records on `device`, structure of arrays.

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
        self.capacity = capacity
        self.device = device
        self.view = RecordView()
        for name, dtype in FIELDS.items():
            array = arrays[name] if name in arrays else wp.zeros(capacity, dtype=dtype, device=device)
            setattr(self, name, array)
            setattr(self.view, name, array)
