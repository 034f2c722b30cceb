"""`SdfTask`: fits the signed distance of a mesh, as section 5.2 of Müller et al. 2022 describes.

The mesh is scaled into the unit cube, where the field is the distance to it, negative inside. An eighth of a batch is
uniform in the cube, a half on the surface, the rest on the surface moved by logistic noise. Distances are exact; their
sign is the generalized winding number's, so meshes with holes have an inside as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import warp as wp

from nrc.field import SNAPSHOT_KIND, Field
from nrc.fit.job import TASK_STEPS, steps_of
from nrc.fit.mesh_distance import MeshDistance
from nrc.fit.sdf_render import SdfRenderer
from nrc.fit.settings import make_config
from nrc.fit.surface import Surface, chamfer, extract_surface, mesh_iou, overlap, write_surface
from nrc.image import write_image
from nrc.kernels import sdf
from nrc.launch import heavy_range, launch, resolve_device
from nrc.optimizer import restore
from nrc.scene import Camera
from nrc.snapshot import SnapshotError, check_finite, load_tensors, save_tensors
from nrc.trainer import Trainer

FINEST = 2048  # resolution of the finest level
UNIFORM_SHARE, SURFACE_SHARE = 1 / 8, 4 / 8
POOL_BATCHES = 64  # batches whose uniform points are kept
POOL_USES = 4  # times that each is used
N_PROGRESS, N_EVALUATE = 1 << 17, 1 << 20  # points of an intersection over union
N_COMPARED = 1 << 18  # points that compare the extracted surface with the mesh
PROGRESS_SAMPLE, EVALUATE_SAMPLE = -1, -2  # of the generator; training's are its steps
RESOLUTION = 256  # cells along the longest side of the mesh's box
PICTURE_SIZE, SUPERSAMPLING = 800, 2  # pixels, rays per pixel and axis
LEAST_IOU = 0.9  # below, the zero level is mostly noise inside the box: too many triangles to measure or to keep
ROUNDING = 1e-6  # of the corners of a box
FOV = 30.0  # degrees, of pictures
VIEW = (0.55, 0.35, 1.0)  # from the mesh's centre to the camera; y is up


class SdfTask:
    """Training of a field on the signed distance of a mesh.

    Args:
        source: OBJ, STL, PLY or GLB file; the parts of a scene are one mesh.
        seed: Of initial parameters and samples.
        device: Warp device; the first GPU, else the CPU.
        encoding, config, grid, batch_size: As `nrc.fit.settings.make_config` describes them.

    Attributes:
        target: The mesh and its distances.
        field, trainer: What is trained, and its optimizer.
        warnings: What was repaired in the mesh.

    Raises:
        SurfaceError: The mesh cannot be read or encloses nothing.
        ValueError: A setting that cannot be used.
    """

    kind = "sdf"

    def __init__(
        self,
        source: str | PathLike[str],
        *,
        seed: int = 1337,
        device: Any = None,
        encoding: str = "hash",
        config: Mapping[str, Any] | None = None,
        grid: Mapping[str, int] | None = None,
        batch_size: int | None = None,
    ) -> None:
        self.device = resolve_device(device)
        self.source = Path(source)
        self.seed = seed
        self.config = make_config(
            "sdf",
            n_input_dims=3,
            finest=FINEST,
            device=self.device,
            encoding=encoding,
            config=config,
            grid=grid,
            batch_size=batch_size,
        )
        self.target = MeshDistance(source, self.device, seed)
        self.warnings = tuple(self.target.warnings)
        self.field = Field(3, 1, self.config.encoding, self.config.network, seed=seed, device=self.device)
        n_rows = self.samples_per_step = self.config.batch_size
        self.trainer = Trainer(self.field, self.config.loss, self.config.optimizer, batch_size=n_rows)
        self.n_params = self.field.n_params
        self.n_steps = 0
        self._n_uniform, self._n_surface = int(UNIFORM_SHARE * n_rows), int(SURFACE_SHARE * n_rows)
        n_pooled = POOL_BATCHES * self._n_uniform
        self._pool_x, self._x = (wp.zeros(n, dtype=wp.vec3, device=self.device) for n in (n_pooled, n_rows))
        self._pool_distance = wp.zeros(n_pooled, dtype=float, device=self.device)
        self._y = wp.zeros((n_rows, 1), dtype=float, device=self.device)
        self._progress: tuple[wp.array, np.ndarray] | None = None

    def identity(self) -> dict[str, Any]:
        """All that changes the result: digest of the mesh, settings, seed."""
        return {"kind": self.kind, "sha256": self.target.sha256, "seed": self.seed, "config": self.config.as_dict()}

    def step(self) -> wp.array:
        """Draw a batch and take one step along the gradient of its loss, which is returned."""
        self._draw()
        loss = self.trainer.step(self._x, self._y)
        self.n_steps += 1
        return loss

    def _draw(self) -> None:
        """Fill the batch with what depends on seed and step alone.

        Uniform points, whose queries take longest, are used POOL_USES times, POOL_BATCHES steps apart: the steps go
        through the pool in order, and every POOL_USES-th time they renew what they come to.
        """
        view, seed, n_rows = self.target.view, self.target.seed, self.samples_per_step
        passes, slot = divmod(self.n_steps, POOL_BATCHES)
        first = slot * self._n_uniform
        if passes % POOL_USES == 0:
            launch(
                sdf.draw_uniform,
                self._n_uniform,
                inputs=[view, seed, self.n_steps, wp.vec3(0.0), wp.vec3(1.0), first],
                outputs=[self._pool_x, self._pool_distance],
                device=self.device,
                range_size=heavy_range(self._n_uniform),
            )
        launch(
            sdf.draw_batch,
            n_rows,
            inputs=[
                view,
                seed,
                self.n_steps,
                self._n_uniform,
                self._n_surface,
                n_rows,
                self.target.noise,
                first,
                self._pool_x,
                self._pool_distance,
            ],
            outputs=[self._x, self._y],
            device=self.device,
            range_size=heavy_range(n_rows),
        )

    def progress(self) -> dict[str, float]:
        """Intersection over union on a fixed set of uniform points in the mesh's box, none of them training's."""
        if self._progress is None:
            x, distance = self.target.uniform(N_PROGRESS, PROGRESS_SAMPLE)
            self._progress = x, distance.numpy() < 0.0
        x, inside = self._progress
        found = self.field.inference(x, params=self.trainer.ema_params).numpy()[:, 0]
        return {"iou": overlap(found < 0.0, inside)}

    def evaluate(self) -> dict[str, Any]:
        """The measures that `evaluate_snapshot` describes."""
        return _measure(self.field, self.trainer.ema_params, self.target)

    def state(self) -> dict[str, np.ndarray]:
        """Optimizer, pool and number of steps."""
        arrays = {name: array.numpy() for name, array in self._arrays().items()}
        return arrays | {TASK_STEPS: np.array([self.n_steps], np.int64)}

    def load_state(self, path: Path, state: dict[str, np.ndarray]) -> None:
        """Restore what `state` gave and the file `path` held. Raises SnapshotError, and then changes nothing."""
        n_steps = steps_of(path, state)
        restore(path, state, self._arrays())
        self.n_steps = n_steps

    def _arrays(self) -> dict[str, wp.array]:
        pool = {"pool_x": self._pool_x, "pool_distance": self._pool_distance}
        return self.trainer.optimizer.state_arrays() | pool

    def save(self, path: Path, training: dict[str, Any]) -> None:
        """Write the averaged weights, which `nrc.Field.load` reads, and where the mesh is and how it was scaled."""
        params = self.trainer.ema_params.numpy()
        check_finite(path, "params", params)
        fit = {
            "kind": self.kind,
            "source": str(self.source.resolve()),
            "sha256": self.target.sha256,
            "seed": self.seed,
            "scale": self.target.scale,
            "offset": self.target.offset.tolist(),
            "lower": self.target.lower.tolist(),
            "upper": self.target.upper.tolist(),
            "settings": self.config.as_dict(),
            **training,
        }
        save_tensors(path, {"params": params}, self.field.config() | {"fit": fit}, kind=SNAPSHOT_KIND)

    def surface(self, resolution: int = RESOLUTION) -> Surface:
        """The field's zero level in the coordinates of the mesh's file.

        Args:
            resolution: Cells along the longest side of the mesh's box.
        """
        target = self.target
        return target.to_file(zero_level(self.field, self.trainer.ema_params, target.lower, target.upper, resolution))

    def pictures(self, folder: Path) -> dict[str, Path]:
        """Draw `shading.png` and `normals.png` by sphere tracing into `folder`.

        Where the field has come close enough to the mesh, its surface goes into `mesh.ply`.
        """
        files = {name: folder / f"{name}.png" for name in ("shading", "normals")}
        target = self.target
        pictures = draw(
            self.field,
            self.trainer.ema_params,
            target.lower,
            target.upper,
            frame=target.to_cube().vertices,
            size=PICTURE_SIZE,
        )
        for name, picture in zip(files, pictures, strict=True):
            write_image(files[name], picture)
        if self.progress()["iou"] >= LEAST_IOU:
            files["mesh"] = folder / "mesh.ply"
            write_surface(files["mesh"], self.surface(RESOLUTION))
        return files

    def kernels(self) -> dict[str, wp.Kernel]:
        """Kernels of training by name."""
        return {"mesh distances": sdf.draw_batch} | self.field.kernels() | self.trainer.kernels()


def evaluate_snapshot(
    path: str | PathLike[str], *, source: str | PathLike[str] | None = None, device: Any = None
) -> dict[str, Any]:
    """Measure a snapshot of `SdfTask` against its mesh.

    Args:
        source: The mesh, by default where it was when the fit began.
        device: Warp device; the first GPU, else the CPU.

    Returns:
        `iou`: intersection over union on 2^20 fresh uniform points in the mesh's box. `mae`: mean absolute error of the
        distance there. `chamfer`: between the extracted surface and the mesh, as `nrc.fit.surface.chamfer` defines it,
        `mesh_iou` their overlap; both None where `iou` is below LEAST_IOU. Lengths are in units of the cube that holds
        the mesh, whose longest side is 0.9 of it.

    Raises:
        SnapshotError: The snapshot cannot be used, or belongs to another mesh.
        SurfaceError: The mesh cannot be read.
    """
    field, fit = load_fit(path, device)
    target = MeshDistance(fit["source"] if source is None else source, field.device, fit["seed"])
    if target.sha256 != fit["sha256"]:
        raise SnapshotError(f"{path}: fit: sha256 is of another mesh than {source or fit['source']}")
    return _measure(field, field.params, target)


def load_fit(path: str | PathLike[str], device: Any = None) -> tuple[Field, dict[str, Any]]:
    """The field in a snapshot of `SdfTask`, and where its mesh is and lies. Raises SnapshotError."""
    _, config = load_tensors(path, kind=SNAPSHOT_KIND)
    fit = config.get("fit")
    if not isinstance(fit, dict) or fit.get("kind") != "sdf":
        raise SnapshotError(f"{path}: fit: not the snapshot of a signed distance")
    for name, types in (("source", str), ("sha256", str), ("seed", int), ("scale", float)):
        if not isinstance(fit.get(name), types):
            raise SnapshotError(f"{path}: fit: {name} must be of type {types.__name__}, got {fit.get(name)!r}")
    for name in ("lower", "upper", "offset"):
        value = fit.get(name)
        if not (isinstance(value, list) and len(value) == 3 and all(type(x) is float for x in value)):
            raise SnapshotError(f"{path}: fit: {name} must be three numbers, got {value!r}")
    box = zip(fit["lower"], fit["upper"], strict=True)
    if not (np.isfinite([fit["scale"], *fit["offset"]]).all() and fit["scale"] > 0.0):
        raise SnapshotError(f"{path}: fit: scale {fit['scale']} and offset {fit['offset']} place no mesh")
    if not all(-ROUNDING <= a < b <= 1.0 + ROUNDING for a, b in box):
        raise SnapshotError(f"{path}: fit: lower {fit['lower']} and upper {fit['upper']} are no box in the unit cube")
    field = Field.load(path, device)
    if (field.n_input_dims, field.n_output_dims) != (3, 1):
        raise SnapshotError(f"{path}: a distance has 3 inputs and 1 output, not those of {fit['source']}")
    return field, fit


def zero_level(
    field: Field, params: wp.array, lower: np.ndarray, upper: np.ndarray, resolution: int = RESOLUTION
) -> Surface:
    """The surface where a distance field is 0 inside a box, in coordinates of the unit cube.

    Args:
        params: Of the field.
        lower, upper: Corners of the box.
        resolution: Cells along its longest side.
    """

    def evaluate(points: np.ndarray) -> np.ndarray:
        return field.inference(points, params=params).numpy()[:, 0]

    return extract_surface(evaluate, lower=lower, upper=upper, resolution=resolution, device=field.device)


def draw(
    field: Field,
    params: wp.array,
    lower: np.ndarray,
    upper: np.ndarray,
    *,
    frame: np.ndarray | None = None,
    size: int = PICTURE_SIZE,
    direction: tuple[float, float, float] = VIEW,
) -> tuple[np.ndarray, np.ndarray]:
    """Sphere-trace the zero level of a distance field inside a box.

    Args:
        params: Of the field.
        lower, upper: Corners of the box in the unit cube.
        frame: (n, 3) points that the picture is to hold, the box's corners by default.
        size: Width and height [px].
        direction: From the box's centre to the camera, of any length; y is up.

    Returns:
        The shaded picture, linear (size, size, 3) float32, and the normals as colours (n + 1) / 2, uint8.
    """
    if frame is None:
        frame = np.stack(np.meshgrid(*zip(lower, upper, strict=True)), axis=-1).reshape(-1, 3)
    wide = SUPERSAMPLING * size
    camera = framing_camera(np.asarray(direction, float), frame)
    seen = SdfRenderer(field, lower, upper, params=params).trace(camera, wide, wide)
    hit = (seen.state.numpy() == sdf.HIT)[:, None]
    directions = np.where(hit, 127.5 * seen.normal.numpy() + 127.5, np.float32(255.0))
    blocks = (size, SUPERSAMPLING, size, SUPERSAMPLING, 3)
    shading, directions = (image.reshape(blocks).mean(axis=(1, 3)) for image in (seen.color.numpy(), directions))
    return shading, np.clip(directions + 0.5, 0.0, 255.0).astype(np.uint8)


def framing_camera(direction: np.ndarray, frame: np.ndarray) -> Camera:
    """A camera of 30 degrees that sees all points (n, 3) of `frame`, with a little room around them.

    `direction` leads from the points to the camera; y is up.
    """
    low, high = frame.min(axis=0), frame.max(axis=0)
    centre = 0.5 * (low + high).astype(float)
    back = direction / np.linalg.norm(direction)
    right = np.cross((0.0, 1.0, 0.0) if abs(back[1]) < 0.99 else (0.0, 0.0, -1.0), back)
    right /= np.linalg.norm(right)
    up = np.cross(back, right)
    from_centre = frame - centre
    aside = np.maximum(abs(from_centre @ right), abs(from_centre @ up))
    distance = (from_centre @ back + 1.05 * aside / np.tan(np.radians(0.5 * FOV))).max()
    to_world = np.eye(4)
    to_world[:3] = np.stack([right, up, back, centre + distance * back], axis=1)
    return Camera(to_world, fov=FOV, fov_axis="smaller")


def _measure(field: Field, params: wp.array, target: MeshDistance) -> dict[str, Any]:
    x, distance = target.uniform(N_EVALUATE, EVALUATE_SAMPLE)
    exact, found = distance.numpy(), field.inference(x, params=params).numpy()[:, 0]
    iou = overlap(found < 0.0, exact < 0.0)
    mae = float(np.abs(found - exact).mean(dtype=np.float64))
    measures: dict[str, Any] = {"iou": iou, "mae": mae, "chamfer": None, "mesh_iou": None}
    if iou >= LEAST_IOU:
        surface = zero_level(field, params, target.lower, target.upper, RESOLUTION)
        mesh = target.to_cube()
        measures["chamfer"] = chamfer(surface, mesh, n_points=N_COMPARED, device=field.device)
        measures["mesh_iou"] = mesh_iou(surface, mesh, n_points=N_COMPARED, device=field.device)
    return measures
