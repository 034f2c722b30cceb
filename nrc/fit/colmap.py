"""COLMAP model folders, text or binary, read with `pycolmap` (the extra named `colmap`).

The folder holds `cameras`, `images` and `points3D` itself or in `sparse/0` or `sparse`; the photographs lie in a folder
`images` in it or above it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from nrc.fit.frame import NO_DISTORTION, OPENCV, OPENCV_FISHEYE, PINHOLE, Frame, FrameSet, rigid
from nrc.scene import SceneError

MODEL_FOLDERS = ("", "sparse/0", "sparse")

# Parameters behind the focal length(s) and the principal point, by their place among k1, k2, k3, k4, p1, p2.
# https://colmap.github.io/cameras.html
DISTORTION = {
    "SIMPLE_PINHOLE": (),
    "PINHOLE": (),
    "SIMPLE_RADIAL": (0,),
    "RADIAL": (0, 1),
    "OPENCV": (0, 1, 4, 5),
    "OPENCV_FISHEYE": (0, 1, 2, 3),
}
POINT_BYTES = 51  # of a point in points3D.bin: id, position, colour, error, and the length of its track of 8 bytes each
SINGLE_FOCAL = ("SIMPLE_PINHOLE", "SIMPLE_RADIAL", "RADIAL")


def find_model(folder: Path) -> Path | None:
    """The folder at or below `folder` that holds a COLMAP model, or None."""
    for name in MODEL_FOLDERS:
        model = folder / name
        if any((model / f"cameras{extension}").is_file() for extension in (".bin", ".txt")):
            return model
    return None


def read_colmap(model: Path) -> FrameSet:
    """Frames of a COLMAP model in its world, sorted by name, and its points.

    Raises:
        SceneError: pycolmap is missing, the model cannot be read or is empty, a camera model is not supported, or there
            is no folder of images.
    """
    try:
        import pycolmap
    except ImportError as error:
        raise SceneError(f"{model}: a COLMAP model needs pycolmap: pip install 'nrc[colmap]'") from error
    _check_points(model / "points3D.bin")
    try:
        reconstruction = pycolmap.Reconstruction(str(model))
    except (ValueError, RuntimeError, IndexError, OSError, MemoryError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise SceneError(f"{model}: not a readable COLMAP model ({reason[-1]})") from error
    images = sorted((image for image in reconstruction.images.values() if image.has_pose), key=lambda image: image.name)
    if not images:
        raise SceneError(f"{model}: the COLMAP model has no images with a pose")
    folder = _image_folder(model)
    points = [point.xyz for point in reconstruction.points3D.values()]
    return FrameSet(
        source=model,
        frames=tuple(_frame(model, folder, image, reconstruction.cameras[image.camera_id]) for image in images),
        points=np.array(points) if points else None,
    )


def _check_points(path: Path) -> None:
    """Raise SceneError for a truncated `points3D.bin`, of which pycolmap would read on for ever."""
    if not path.is_file():
        return
    data = path.read_bytes()
    n = int.from_bytes(data[:8], "little")
    position = 8
    for i in range(n):
        position += POINT_BYTES + 8 * int.from_bytes(
            data[position + POINT_BYTES - 8 : position + POINT_BYTES], "little"
        )
        if position > len(data):
            raise SceneError(f"{path}: truncated at point {i} of {n}")
    if len(data) < 8:
        raise SceneError(f"{path}: truncated")


def _image_folder(model: Path) -> Path:
    folders = [folder / "images" for folder in (model, model.resolve().parent, model.resolve().parent.parent)]
    for folder in folders:
        if folder.is_dir():
            return folder
    raise SceneError(f"{model}: no folder 'images' beside the COLMAP model (looked in {', '.join(map(str, folders))})")


def _frame(model: Path, folder: Path, image: Any, camera: Any) -> Frame:
    name = camera.model.name
    if name not in DISTORTION:
        supported = ", ".join(DISTORTION)
        raise SceneError(
            f"{model}: camera {camera.camera_id}: model {name} is not supported; these are: {supported} "
            "(COLMAP's image_undistorter makes pinhole images of others)"
        )
    params = [float(value) for value in camera.params]
    if name in SINGLE_FOCAL:
        params.insert(1, params[0])
    distortion = list(NO_DISTORTION)
    for place, value in zip(DISTORTION[name], params[4:], strict=True):
        distortion[place] = value
    where = f"{model}: image '{image.name}'"
    if not np.isfinite(params).all() or min(params[:2]) <= 0.0:
        raise SceneError(f"{model}: camera {camera.camera_id}: its focal length or another parameter is out of range")
    w2c = np.asarray(image.cam_from_world().matrix())
    rotation = w2c[:, :3].T
    c2w = np.concatenate([rotation, -rotation @ w2c[:, 3:]], axis=1)
    c2w[:, 1:3] *= -1.0  # COLMAP's cameras look along +z with y down
    is_fisheye, is_distorted = name == "OPENCV_FISHEYE", any(distortion)
    return Frame(
        name=image.name,
        path=folder / image.name,
        c2w=rigid(c2w, f"{where}: its pose"),
        where=where,
        focal=(params[0], params[1]),
        center=(params[2], params[3]),
        size=(int(camera.width), int(camera.height)),
        model=OPENCV_FISHEYE if is_fisheye else OPENCV if is_distorted else PINHOLE,
        distortion=(*distortion,),  # type: ignore[arg-type]
    )
