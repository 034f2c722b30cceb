"""`RadianceField`: density and colour in the box of a scene, what `nrc fit nerf` trains and renderings look at."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import warp as wp

from nrc.config import parse_encoding, parse_network
from nrc.field import Field
from nrc.fit.occupancy import Occupancy
from nrc.fit.settings import FitConfig
from nrc.kernels import nerf as kn
from nrc.kernels import occupancy as ko
from nrc.launch import resolve_device
from nrc.snapshot import SnapshotError, check_finite, load_tensors, save_tensors, take_tensor

SNAPSHOT_KIND = "nrc.nerf"
CONE = 1.0 / 256.0  # step length per distance in scenes larger than the unit cube, at 1024 steps
MAX_AABB_SCALE = 128
MAX_STEPS = 1 << 14  # along the diagonal of the unit cube

FIT_ENTRIES: dict[str, Callable[[Any], bool]] = {  # of a snapshot that are read again, and what they must be
    "source": lambda value: isinstance(value, str),
    "holdout": lambda value: value is None or (isinstance(value, int) and value >= 0),
    "downscale": lambda value: isinstance(value, int) and value >= 1,
    "scale": lambda value: 0.0 < float(value) < math.inf,
    "offset": lambda value: bool(np.isfinite(np.array(value, np.float64).reshape(3)).all()),
    "rotation": lambda value: bool(np.isfinite(np.array(value, np.float64).reshape(3, 3)).all()),
}


class RadianceField:
    """Density and colour in a cube around (0.5, 0.5, 0.5), with the cells that hold something.

    Args:
        config: Encodings and networks.
        aabb_scale: Side of the cube, a power of two.
        near: Distance from the cameras at which rays begin, in unit-cube space.
        crop: Lower and upper corner of the part to march through, (2, 3) in unit-cube space; all by default.
        n_steps: Steps along the diagonal of the unit cube.
        seed: Of the initial parameters.
        device: Warp device; the first GPU, else the CPU.

    Attributes:
        density: Field from a position in the cube, mapped to [0, 1]³, to 16 numbers; the first is the logarithm of the
            density [1 / unit of space].
        color: Field from these 16 and a direction (d + 1) / 2 to red, green, blue in the photographs' encoding.
        density_params, color_params: Parameters to look at the field with: averaged ones, where there are any.
        occupancy: Cells worth looking into.

    Raises:
        ValueError: An unknown option of a component, a box or crop that is none.
    """

    def __init__(
        self,
        config: FitConfig,
        aabb_scale: int,
        *,
        near: float = 0.0,
        crop: Any = None,
        n_steps: int = 1024,
        seed: int = 1337,
        device: Any = None,
    ) -> None:
        if aabb_scale not in [1 << k for k in range(MAX_AABB_SCALE.bit_length())]:
            raise ValueError(f"aabb_scale must be a power of two up to {MAX_AABB_SCALE}, got {aabb_scale!r}")
        if not isinstance(n_steps, int) or not 1 <= n_steps <= MAX_STEPS:
            raise ValueError(f"n_steps must be a whole number from 1 to {MAX_STEPS}, got {n_steps!r}")
        if not 0.0 <= near < math.inf:
            raise ValueError(f"near must be a distance, got {near!r}")
        self.config, self.aabb_scale, self.near, self.seed = config, aabb_scale, near, seed
        self.n_steps = n_steps
        self.device = resolve_device(device)
        self.density = Field(3, kn.N_CODE, config.encoding, config.network, seed=seed, device=self.device)
        inputs = _color_inputs(config)
        network = {**(config.rgb_network or {}), "output_activation": "Sigmoid"}
        self.color = Field(kn.N_COLOR_INPUTS, 3, inputs, network, seed=seed + 1, device=self.device)
        self.density_params, self.color_params = self.density.params, self.color.params
        self.occupancy = Occupancy(aabb_scale, self.device)
        half = 0.5 * aabb_scale
        self.crop = crop_box(np.array([[0.5 - half] * 3, [0.5 + half] * 3]), crop)

    @property
    def n_params(self) -> int:
        """Trained numbers."""
        return self.density.n_params + self.color.n_params

    def march_view(self, crop: Any = None) -> Any:
        """What the functions of `nrc.kernels.nerf` march through, as of now, within another `crop` too."""
        view = kn.MarchView()
        view.bits = self.occupancy.bits
        view.n_cascades = self.occupancy.n_cascades
        corners = crop_box(self.crop, crop)
        view.lower, view.upper = (wp.vec3(*(float(value) for value in corner)) for corner in corners)
        view.scene_lower = wp.vec3(0.5 - 0.5 * self.aabb_scale)
        view.inverse_size = 1.0 / self.aabb_scale
        view.near = self.near
        view.min_step = 3.0**0.5 / self.n_steps
        view.max_step = view.min_step * self.aabb_scale
        view.cone = CONE * 1024.0 / self.n_steps if self.aabb_scale > 1 else 0.0
        return view

    def save(self, path: str | PathLike[str], fit: Mapping[str, Any]) -> None:
        """Write the parameters to look at and the occupancy; `fit` says where they come from. Raises SnapshotError."""
        tensors = {
            "density.params": self.density_params.numpy(),
            "color.params": self.color_params.numpy(),
            "occupancy.thickness": self.occupancy.thickness.numpy(),
        }
        for name, values in tensors.items():
            check_finite(path, name, values)
        config = {
            "settings": self.config.as_dict(),
            "aabb_scale": self.aabb_scale,
            "near": self.near,
            "crop": self.crop.tolist(),
            "n_steps": self.n_steps,
            "seed": self.seed,
            "fit": dict(fit),
        }
        save_tensors(path, tensors, config, kind=SNAPSHOT_KIND)

    @staticmethod
    def load(path: str | PathLike[str], device: Any = None) -> RadianceField:
        """The field that `save` wrote.

        Raises:
            SnapshotError: A file that is missing, damaged or of another kind, or whose parts do not fit together.
        """
        path = Path(path)
        tensors, config = load_tensors(path, kind=SNAPSHOT_KIND)
        names = ("settings", "aabb_scale", "near", "crop", "n_steps", "seed")
        missing = [name for name in names if name not in config]
        if missing:
            raise SnapshotError(f"{path}: {missing[0]} is missing")
        try:
            settings = FitConfig(**config["settings"])
            # A table of another size than the one stored would be allocated before it could be found wrong
            for name, n in _n_params(settings).items():
                take_tensor(path, tensors, name, (n,), np.float32)
            others = {name: config[name] for name in names[2:]}
            field = RadianceField(settings, config["aabb_scale"], **others, device=device)
        except SnapshotError:
            raise
        except (ValueError, TypeError, AttributeError, KeyError, ArithmeticError, MemoryError) as error:
            raise SnapshotError(f"{path}: settings: {error}") from error
        values = {}
        for name, array in field.arrays().items():
            values[name] = take_tensor(path, tensors, name, array.shape, np.float32)
            check_finite(path, name, values[name])
        for name, array in field.arrays().items():
            array.assign(values[name])
        field.occupancy.set_bits()
        return field

    @staticmethod
    def load_fit(path: str | PathLike[str]) -> dict[str, Any]:
        """The entry `fit` that `NerfTask.save` wrote: where the views are, and how the field lies in their world.

        Raises:
            SnapshotError: As `load`, or an entry is missing or of the wrong type.
        """
        _, config = load_tensors(path, kind=SNAPSHOT_KIND)
        fit = config.get("fit")
        if not isinstance(fit, dict) or fit.get("kind") != "nerf":
            raise SnapshotError(f"{path}: fit: not the snapshot of a radiance field with its views")
        for name, is_right in FIT_ENTRIES.items():
            try:
                right = is_right(fit[name])
            except (KeyError, TypeError, ValueError):
                right = False
            if not right:
                raise SnapshotError(f"{path}: fit: {name} is {fit.get(name)!r}")
        return fit

    def arrays(self) -> dict[str, wp.array]:
        """Trained parameters and occupancy by their names in a snapshot."""
        return {
            "density.params": self.density.params,
            "color.params": self.color.params,
            "occupancy.thickness": self.occupancy.thickness,
        }

    def kernels(self) -> dict[str, wp.Kernel]:
        """Kernels of looking at the field by name, for `nrc.launch.prepare`."""
        kernels = {f"density {name}": kernel for name, kernel in self.density.kernels().items()}
        kernels |= {f"colour {name}": kernel for name, kernel in self.color.kernels().items()}
        return kernels | {"marching": kn.begin_rays, "occupancy": ko.set_bits}


def crop_box(box: np.ndarray, crop: Any) -> np.ndarray:
    """Corners of what a box and a crop have in common; of the box for None.

    Raises ValueError unless the crop is two finite corners (2, 3) of a box that overlaps the other.
    """
    if crop is None:
        return box
    corners = np.asarray(crop, np.float64)
    if corners.shape != (2, 3) or not np.isfinite(corners).all() or (corners[0] >= corners[1]).any():
        raise ValueError(f"crop must be a lower and a higher corner, (2, 3), got {crop!r}")
    corners = np.clip(corners, *box)
    if (corners[0] >= corners[1]).any():
        raise ValueError(f"crop must overlap the box {box.tolist()}, got {crop!r}")
    return corners


def _color_inputs(config: FitConfig) -> dict[str, Any]:
    """Encoding of the colour network's inputs.

    Instant-NGP's directions are a Composite whose first entry encodes them, and whose second, latent codes that there
    are none of.
    """
    if config.dir_encoding is None or config.rgb_network is None:
        raise ValueError("a radiance field needs dir_encoding and rgb_network")
    direction: Mapping[Any, Any] = config.dir_encoding
    match direction:
        case {"otype": "Composite", "nested": [{"n_dims_to_encode": 3, **first}, *_]}:
            direction = first
    code = {"otype": "Identity", "n_dims_to_encode": kn.N_CODE}
    return {"otype": "Composite", "nested": [code, {**direction, "n_dims_to_encode": 3}]}


def _n_params(config: FitConfig) -> dict[str, int]:
    """Parameters of both fields, without allocating any."""
    parts = {
        "density.params": (3, kn.N_CODE, config.encoding, config.network),
        "color.params": (kn.N_COLOR_INPUTS, 3, _color_inputs(config), config.rgb_network or {}),
    }
    counts = {}
    for name, (n_inputs, n_outputs, encoding, network) in parts.items():
        parsed = parse_encoding(encoding, n_inputs, 0)
        counts[name] = parsed.n_params + parse_network(network, parsed.n_padded, n_outputs).n_params
    return counts
