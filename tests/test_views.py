"""Photographs with cameras: transforms.json, COLMAP models, lenses."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import warp as wp
from PIL import Image

from nrc.fit.frame import OPENCV, OPENCV_FISHEYE, PINHOLE
from nrc.fit.views import CAMERA_DISTANCE, Camera, Views, load_views
from nrc.image import ImageError, write_image
from nrc.kernels.lens import CamerasView, camera_pixel, camera_project, camera_ray
from nrc.launch import launch
from nrc.scene import SceneError

PIXEL_TOLERANCE = 1e-3  # [px]: a few ulps of single precision at the border of a large image
DISTORTIONS = {
    "pinhole": (PINHOLE, (0.0, 0.0, 0.0, 0.0, 0.0, 0.0)),
    "fox": (OPENCV, (0.0578421, -0.0805099, 0.0, 0.0, -0.000980296, 0.00015575)),
    "barrel": (OPENCV, (-0.2, 0.05, -0.005, 0.0002, 0.003, -0.002)),
    "fisheye": (OPENCV_FISHEYE, (-0.01, 0.004, -0.001, 0.0001, 0.0, 0.0)),
}
LOOK_DOWN_Z = [[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 3.0], [0.0, 0.0, 0.0, 1.0]]


@wp.kernel
def trace_pixels(
    first: int,
    cameras: CamerasView,
    px: wp.array[wp.vec2],
    out_o: wp.array[wp.vec3],
    out_d: wp.array[wp.vec3],
    out_back: wp.array[wp.vec3],
):
    """Rays of camera 0 through image points, and where a point on each projects to."""
    i = first + wp.tid()
    o, d = camera_ray(cameras, 0, px[i])
    out_o[i] = o
    out_d[i] = d
    out_back[i] = camera_project(cameras, 0, o + 2.5 * d)


@wp.kernel
def read_pixels(first: int, cameras: CamerasView, i_image: int, out: wp.array2d[wp.vec4]):
    """Pixels of one image."""
    x = first + wp.tid()
    for y in range(cameras.size[i_image][1]):
        out[y, x] = camera_pixel(cameras, i_image, x, y)


def trace(camera: Camera, px: np.ndarray, device: wp.Device) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Origins, directions, and projections back of points along the rays."""
    n = len(px)
    outputs = [wp.full(n, wp.vec3(math.nan), dtype=wp.vec3, device=device) for _ in range(3)]
    points = wp.array(px.astype(np.float32), dtype=wp.vec2, device=device)
    launch(trace_pixels, n, inputs=[camera.upload(device), points], outputs=outputs, device=device)
    return tuple(output.numpy() for output in outputs)  # type: ignore[return-value]


def project_opencv(p: np.ndarray, model: int, k: tuple[float, ...], focal: Any, center: Any) -> np.ndarray:
    """OpenCV's projectPoints and fisheye::projectPoints in double precision; p in a camera along +z, y down."""
    k1, k2, k3, k4, p1, p2 = k
    if model == OPENCV_FISHEYE:
        r = np.hypot(p[:, 0], p[:, 1])
        theta = np.arctan2(r, p[:, 2])
        theta_d = theta * (1 + k1 * theta**2 + k2 * theta**4 + k3 * theta**6 + k4 * theta**8)
        xy = p[:, :2] * (theta_d / np.maximum(r, 1e-12))[:, None]
    else:
        x, y = p[:, 0] / p[:, 2], p[:, 1] / p[:, 2]
        r2 = x**2 + y**2
        radial = 1 + k1 * r2 + k2 * r2**2 + k3 * r2**3 + k4 * r2**4
        xy = np.stack(
            [
                x * radial + 2 * p1 * x * y + p2 * (r2 + 2 * x**2),
                y * radial + p1 * (r2 + 2 * y**2) + 2 * p2 * x * y,
            ],
            axis=1,
        )
    return xy * np.asarray(focal) + np.asarray(center)


def some_pose(rng: np.random.Generator) -> np.ndarray:
    """A random rotation and position (3, 4)."""
    q, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    q *= np.linalg.det(q)
    return np.concatenate([q, rng.normal(size=(3, 1))], axis=1)


@pytest.mark.parametrize("name", DISTORTIONS)
def test_camera_ray_projects_back_to_its_pixel(name: str, device: wp.Device) -> None:
    """OpenCV's formulas bring a point on the ray back to the pixel, as does `camera_project`; directions are unit."""
    rng = np.random.default_rng(1)
    model, k = DISTORTIONS[name]
    c2w = some_pose(rng)
    camera = Camera(c2w, (1375.52, 1374.49), (554.558, 965.268), (1080, 1920), model, k)  # type: ignore[arg-type]
    corners = np.array([[0.5, 0.5], [1079.5, 0.5], [0.5, 1919.5], [1079.5, 1919.5], [554.558, 965.268]])
    px = np.concatenate([corners, rng.random((1000, 2)) * (1080, 1920)]).astype(np.float32)
    o, d, back = trace(camera, px, device)
    np.testing.assert_allclose(o, np.broadcast_to(c2w[:, 3], o.shape), rtol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(d, axis=1), 1.0, atol=1e-6)
    local = d.astype(np.float64) @ c2w[:, :3] * (1.0, -1.0, -1.0)
    np.testing.assert_allclose(project_opencv(local, model, k, camera.focal, camera.center), px, atol=PIXEL_TOLERANCE)
    np.testing.assert_allclose(back[:, :2], px, atol=PIXEL_TOLERANCE)
    assert (back[:, 2] > 0.0).all()


def test_camera_ray_of_a_fisheye_lens_sees_behind_the_image_plane(device: wp.Device) -> None:
    """An ideal fisheye lens (theta_d = theta) maps radius f * 2 rad to the direction at 2 rad."""
    camera = Camera(np.eye(3, 4), (100.0, 100.0), (300.0, 300.0), (600, 600), OPENCV_FISHEYE)
    _, d, _ = trace(camera, np.array([[500.0, 300.0], [300.0, 100.0]]), device)
    expected = [[math.sin(2.0), 0.0, -math.cos(2.0)], [0.0, math.sin(2.0), -math.cos(2.0)]]
    np.testing.assert_allclose(d, expected, atol=1e-6)


def test_camera_ray_follows_the_axes_of_opengl(device: wp.Device) -> None:
    """The left edge looks left, the top looks up, the middle along -z."""
    camera = Camera.from_fov(np.eye(3, 4), 200, 100, math.radians(90.0))
    _, d, _ = trace(camera, np.array([[0.0, 50.0], [100.0, 0.0], [100.0, 50.0]]), device)
    s, h = math.sqrt(0.5), 1.0 / math.sqrt(1.25)
    np.testing.assert_allclose(d, [[-s, 0.0, -s], [0.0, 0.5 * h, -h], [0.0, 0.0, -1.0]], atol=1e-6)


def test_camera_project_refuses_what_no_ray_reaches(device: wp.Device) -> None:
    """Points behind the camera, and beyond the angle where a distortion polynomial turns back, have depth 0."""

    @wp.kernel(module="unique")
    def project(first: int, cameras: CamerasView, p: wp.array[wp.vec3], out: wp.array[wp.vec3]):
        i = first + wp.tid()
        out[i] = camera_project(cameras, 0, p[i])

    camera = Camera(np.eye(3, 4), (100.0, 100.0), (50.0, 50.0), (100, 100), OPENCV, (-0.3, 0.0, 0.0, 0.0, 0.0, 0.0))
    points = wp.array([[0.0, 0.0, 1.0], [0.0, 0.0, -2.0], [3.0, 0.0, -1.0]], dtype=wp.vec3, device=device)
    out = wp.full(3, wp.vec3(math.nan), dtype=wp.vec3, device=device)
    launch(project, 3, inputs=[camera.upload(device), points], outputs=[out], device=device)
    np.testing.assert_allclose(out.numpy()[:, 2], [0.0, 2.0, 0.0], atol=1e-6)


# transforms.json


def write_scene(folder: Path, frames: int = 9, size: tuple[int, int] = (6, 4), **top: Any) -> dict[str, Any]:
    """Cameras on a ring of radius 3 that look at the z-axis, their images, and the file; its content is returned."""
    entries = []
    for i in range(frames):
        a = 2.0 * math.pi * i / frames
        c, s = math.cos(a), math.sin(a)
        matrix = [[-s, 0.0, c, 3 * c], [c, 0.0, s, 3 * s], [0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]]
        entries.append({"file_path": f"./r_{i}", "transform_matrix": matrix})
        pixels = np.full((size[1], size[0], 3), 20 * i, np.uint8)
        write_image(folder / f"r_{i}.png", pixels)
    content = {"camera_angle_x": 0.7, **top, "frames": entries}
    (folder / "transforms.json").write_text(json.dumps(content))
    return content


def edit(folder: Path, content: dict[str, Any]) -> None:
    (folder / "transforms.json").write_text(json.dumps(content))


def test_load_views_reads_nerf_synthetic(tmp_path: Path) -> None:
    """A field of view alone: pinholes, scale 0.33 around 0.5, every 8th view held out."""
    write_scene(tmp_path)
    train, test = load_views(tmp_path), load_views(tmp_path, split="test")
    assert train.names == tuple(f"r_{i}" for i in (1, 2, 3, 4, 5, 6, 7)) and test.names == ("r_0", "r_8")
    assert train.aabb_scale == 1 and train.scale == 0.33 and not train.has_alpha and train.warnings == ()
    np.testing.assert_allclose(test.c2w[0], [[0, 0, 1, 1.49], [1, 0, 0, 0.5], [0, 1, 0, 0.5]], atol=1e-6)
    np.testing.assert_allclose(train.focal, 0.5 * 6 / math.tan(0.35), rtol=1e-6)
    np.testing.assert_allclose(train.center, [[3.0, 2.0]] * 7)
    assert train.image(2)[0, 0].tolist() == [60, 60, 60, 255] and train.first_pixel[2] == 2 * 24
    assert (train.model == PINHOLE).all()


def test_load_views_holds_out_what_it_is_told(tmp_path: Path) -> None:
    """`holdout` n: every n-th view; 0: none. A test file's views are the test views unless `holdout` is given."""
    content = write_scene(tmp_path)
    assert load_views(tmp_path, split="test", holdout=4).names == ("r_0", "r_4", "r_8")
    assert len(load_views(tmp_path, holdout=0)) == 9
    with pytest.raises(SceneError, match="no test views"):
        load_views(tmp_path, split="test", holdout=0)
    (tmp_path / "transforms_test.json").write_text(json.dumps({**content, "frames": content["frames"][:2]}))
    assert load_views(tmp_path, split="test").names == ("r_0", "r_1")
    assert len(load_views(tmp_path)) == 9
    assert load_views(tmp_path, split="test", holdout=4).names == ("r_0", "r_4", "r_8")


def test_load_views_honours_the_split_of_nerfstudio(tmp_path: Path) -> None:
    """`test_filenames` are the test views; training keeps `train_filenames` alone."""
    names = {"train_filenames": ["./r_1.png", "r_3.png"], "test_filenames": ["r_2.png"]}
    content = write_scene(tmp_path, fl_x=9.0, camera_model="PINHOLE", **names)
    for entry in content["frames"]:
        entry["file_path"] += ".png"
    edit(tmp_path, content)
    assert load_views(tmp_path).names == ("r_1.png", "r_3.png")
    assert load_views(tmp_path, split="test").names == ("r_2.png",)


def test_load_views_reads_instant_ngp(tmp_path: Path) -> None:
    """Intrinsics at the top, overridden in a frame; scale, offset and aabb_scale as given."""
    top = {"fl_x": 5.0, "fl_y": 6.0, "cx": 2.9, "cy": 2.1, "w": 6.0, "h": 4.0, "k1": 0.1, "p2": 0.01}
    content = write_scene(tmp_path, **top, aabb_scale=4, scale=0.5, offset=[0.5, 0.25, 0.0])
    content["frames"][1] |= {"fl_x": 7.0, "k2": 0.2, "cx": 3.5}
    edit(tmp_path, content)
    views = load_views(tmp_path, holdout=0)
    assert views.aabb_scale == 4 and (views.model == OPENCV).all()
    np.testing.assert_allclose(views.focal[:2], [[5.0, 6.0], [7.0, 7.0]])
    np.testing.assert_allclose(views.center[:2], [[2.9, 2.1], [3.5, 2.1]], rtol=1e-6)
    np.testing.assert_allclose(views.distortion[1], [0.1, 0.2, 0.0, 0.0, 0.0, 0.01], rtol=1e-6)
    np.testing.assert_allclose(views.c2w[0, :, 3], [0.5 * 3 + 0.5, 0.25, 0.0], atol=1e-6)


def test_load_views_fits_a_given_box_to_the_unit_cube(tmp_path: Path) -> None:
    """instant-ngp's `aabb`: its middle comes to 0.5, its longest side to 1; a flat one has no size."""
    content = write_scene(tmp_path, aabb=[[-1.0, 0.0, 2.0], [3.0, 2.0, 4.0]])
    views = load_views(tmp_path, holdout=0)
    assert views.scale == 0.25 and views.aabb_scale == 1
    np.testing.assert_allclose(views.placement.to_world(np.array([[0.5, 0.5, 0.5]])), [[1.0, 1.0, 3.0]])
    edit(tmp_path, {**content, "aabb": [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]})
    with pytest.raises(SceneError, match="aabb: has no size"):
        load_views(tmp_path)


def test_load_views_finds_images_by_other_names(tmp_path: Path) -> None:
    """Backslashes of Windows, a dot in a name without extension, and JPEG where there is no PNG."""
    content = write_scene(tmp_path, frames=3)
    (tmp_path / "sub").mkdir()
    (tmp_path / "r_0.png").rename(tmp_path / "sub" / "r_0.png")
    (tmp_path / "r_1.png").rename(tmp_path / "r.1.png")
    Image.new("RGB", (6, 4), (9, 9, 9)).save(tmp_path / "r_2.jpg")
    (tmp_path / "r_2.png").unlink()
    for entry, name in zip(content["frames"], ("sub\\r_0", "r.1", "./r_2"), strict=True):
        entry["file_path"] = name
    edit(tmp_path, content)
    views = load_views(tmp_path, holdout=0)
    assert views.names == ("sub/r_0", "r.1", "r_2") and views.warnings == ()
    assert [int(views.image(i)[0, 0, 0]) for i in range(3)] == [0, 20, 9]


@pytest.mark.parametrize(
    "model, expected",
    [("PINHOLE", PINHOLE), ("OPENCV", OPENCV), ("OPENCV_FISHEYE", OPENCV_FISHEYE)],
)
def test_load_views_places_nerfstudio_scenes(model: str, expected: int, tmp_path: Path) -> None:
    """A turned, moved and scaled world: the centre of attention comes to 0.5, up to +z, the mean distance to 1.32."""
    rng = np.random.default_rng(3)
    k = {} if model == "PINHOLE" else {"k1": 0.02, "k2": 0.01, "k3": 0.003, "k4": 0.004}
    content = write_scene(tmp_path, fl_x=9.0, camera_model=model, applied_scale=1.0, ply_file_path="a.ply", **k)
    turn = some_pose(rng)[:, :3]
    for entry in content["frames"]:
        matrix = np.array(entry["transform_matrix"])
        matrix[:3, :3] = turn @ matrix[:3, :3]
        matrix[:3, 3] = 7.0 * turn @ matrix[:3, 3] + (10.0, -20.0, 30.0)
        entry["transform_matrix"] = matrix.tolist()
        entry |= {"depth_file_path": "depth.png", "mask_path": "mask.png"}
    edit(tmp_path, content)
    views = load_views(tmp_path, holdout=0)
    assert (views.model == expected).all() and views.aabb_scale == 16
    np.testing.assert_allclose(np.linalg.norm(views.c2w[:, :, 3] - 0.5, axis=1), CAMERA_DISTANCE, rtol=1e-5)
    np.testing.assert_allclose(views.c2w[:, :, 1], np.tile([0.0, 0.0, 1.0], (9, 1)), atol=1e-6)
    np.testing.assert_allclose(views.c2w[:, :, 3] - 0.5, CAMERA_DISTANCE * views.c2w[:, :, 2], atol=1e-5)
    moved = views.scale * views.rotation @ np.array(content["frames"][4]["transform_matrix"])[:3, 3] + views.offset
    np.testing.assert_allclose(moved, views.c2w[4, :, 3], atol=1e-5)
    assert [w.partition(": ")[2].partition(":")[0] for w in views.warnings] == [
        "mask_path is ignored (of 9 frames)",
        "no scale given",
    ]


def test_load_views_counts_missing_images_once(tmp_path: Path) -> None:
    """One warning with the count; the split is drawn from what exists; none at all is an error."""
    write_scene(tmp_path)
    for i in (0, 4, 5):
        (tmp_path / f"r_{i}.png").unlink()
    views = load_views(tmp_path)
    assert views.names == tuple(f"r_{i}" for i in (2, 3, 6, 7, 8))
    assert len(views.warnings) == 1 and "3 of 9 images are missing and skipped" in views.warnings[0]
    for path in tmp_path.glob("*.png"):
        path.unlink()
    with pytest.raises(SceneError, match=r"none of its 9 images exists; the first is .*r_0\.png"):
        load_views(tmp_path)


def test_load_views_downscales_by_boxes_weighted_by_alpha(tmp_path: Path) -> None:
    """Means of 2x2 boxes, colours weighted by alpha, the odd column dropped, intrinsics divided."""
    write_scene(tmp_path, frames=1, size=(5, 4), cx=2.0, cy=1.0)
    pixels = np.zeros((4, 5, 4), np.uint8)
    pixels[0, 0], pixels[0, 1], pixels[2:, 2:4] = (200, 100, 0, 255), (50, 50, 50, 85), (10, 20, 30, 255)
    write_image(tmp_path / "r_0.png", pixels)
    views = load_views(tmp_path, holdout=0, downscale=2)
    expected = np.zeros((2, 2, 4), np.uint8)
    expected[0, 0], expected[1, 1] = (163, 88, 13, 85), (10, 20, 30, 255)
    np.testing.assert_array_equal(views.image(0), expected)
    assert views.has_alpha and views.sizes.tolist() == [[2, 2]]
    np.testing.assert_allclose(views.center, [[1.0, 0.5]])
    np.testing.assert_allclose(views.focal, 0.25 * 5 / math.tan(0.35), rtol=1e-6)


def test_load_views_scales_intrinsics_to_the_image(tmp_path: Path) -> None:
    """Images of half the stated size, up to rounding; another aspect is an error."""
    content = write_scene(tmp_path, fl_x=50.0, fl_y=50.0, cx=6.0, cy=4.0, w=12, h=8, aabb_scale=1)
    views = load_views(tmp_path, holdout=0)
    np.testing.assert_allclose(views.focal[0], 25.0)
    np.testing.assert_allclose(views.center[0], [3.0, 2.0])
    edit(tmp_path, {**content, "h": 12})
    with pytest.raises(SceneError, match=r"frames\[0\]: w and h are 12x12, r_0\.png is 6x4"):
        load_views(tmp_path, holdout=0)


def test_load_views_encodes_linear_images(tmp_path: Path) -> None:
    """EXR radiance becomes sRGB bytes, with one warning; NaN is an error."""
    content = write_scene(tmp_path, frames=2)
    for entry in content["frames"]:
        entry["file_path"] += ".exr"
        write_image(tmp_path / entry["file_path"], np.full((4, 6, 3), 0.2158605, np.float32))
    edit(tmp_path, content)
    views = load_views(tmp_path, holdout=0)
    assert views.image(1)[0, 0].tolist() == [128, 128, 128, 255]
    assert len(views.warnings) == 1 and views.warnings[0].startswith("2 images of linear radiance")
    write_image(tmp_path / "r_0.exr", np.full((4, 6, 3), np.nan, np.float32))
    with pytest.raises(ImageError, match=r"r_0\.exr: holds values that are not finite"):
        load_views(tmp_path, holdout=0)


def test_views_upload_what_was_read(tmp_path: Path, device: wp.Device) -> None:
    """Pixels on the device equal the file's, of images of different sizes."""
    write_scene(tmp_path, frames=2)
    image = np.random.default_rng(5).integers(0, 256, (3, 7, 4), np.uint8)
    write_image(tmp_path / "r_1.png", image)
    views = load_views(tmp_path, holdout=0)
    out = wp.full((3, 7), wp.vec4(math.nan), dtype=wp.vec4, device=device)
    launch(read_pixels, 7, inputs=[views.upload(device), 1], outputs=[out], device=device)
    np.testing.assert_allclose(out.numpy() * 255.0, image, atol=1e-4)


def test_load_views_removes_scale_and_rounding_of_matrices(tmp_path: Path) -> None:
    """A matrix scaled by 2 with rounding errors comes out orthonormal."""
    content = write_scene(tmp_path, frames=1)
    matrix = 2.0 * np.array(content["frames"][0]["transform_matrix"]) + 1e-4 * np.ones((4, 4))
    matrix[:3, 3], matrix[3] = (1.0, 2.0, 3.0), (0.0, 0.0, 0.0, 1.0)
    content["frames"][0]["transform_matrix"] = matrix.tolist()
    edit(tmp_path, content)
    r = load_views(tmp_path, holdout=0).c2w[0, :, :3]
    np.testing.assert_allclose(r.T @ r, np.eye(3), atol=1e-6)
    np.testing.assert_allclose(r, 0.5 * matrix[:3, :3], atol=1e-3)


def break_matrix(rows: list[list[float]], **cells: float) -> list[list[float]]:
    matrix = [list(row) for row in rows]
    for key, value in cells.items():
        matrix[int(key[1])][int(key[2])] = value
    return matrix


@pytest.mark.parametrize(
    "change, message",
    [
        ({"frames": []}, r"transforms\.json: frames: is empty"),
        ({"frames": {}}, r"transforms\.json: frames: expected an array"),
        ({"frames": None}, r"transforms\.json: frames: expected an array"),
        ({"frames": [5]}, r"frames\[0\]: expected an object, got 5"),
        ({"frames": [{}]}, r"frames\[0\]: file_path is missing"),
        ({"frames": [{"file_path": "r_0"}]}, r"frames\[0\]: transform_matrix is missing"),
        ({"frames": [{"file_path": 3, "transform_matrix": LOOK_DOWN_Z}]}, r"frames\[0\]\.file_path: expected a string"),
        ({"camera_angle_x": None}, r"camera_angle_x: expected a number, got null"),
        ({"camera_angle_x": 4.0}, r"camera_angle_x: expected a number between"),
        ({"camera_angle_x": float("nan")}, r"not valid JSON: NaN"),
        ({"fl_x": -3.0}, r"fl_x: expected a number >= "),
        ({"fl_x": "5"}, r"fl_x: expected a number, got"),
        ({"k1": [1]}, r"k1: expected a number"),
        ({"w": 6.5, "h": 4}, r"w: expected a whole number of pixels"),
        ({"aabb_scale": 3}, r"aabb_scale: expected a power of two from 1 to 128, got 3"),
        ({"scale": 0}, r"scale: expected a number >= "),
        ({"offset": [1, 2]}, r"offset: expected 3 numbers"),
        ({"camera_model": "EQUIRECTANGULAR"}, r"camera_model: expected one of .*OPENCV_FISHEYE, got"),
        ({"ftheta_p0": 1.0}, r"ftheta_p0: this lens is not supported"),
        ({"is_fisheye": 1}, r"is_fisheye: expected true or false"),
        ({"matrix": LOOK_DOWN_Z[:2]}, r"frames\[0\]\.transform_matrix: expected 4 rows of 4 numbers"),
        ({"matrix": break_matrix(LOOK_DOWN_Z, m32=1.0)}, r"transform_matrix\[3\]: expected \[0, 0, 0, 1\]"),
        ({"matrix": break_matrix(LOOK_DOWN_Z, m11=0.0)}, r"frames\[0\]\.transform_matrix: is not invertible"),
        ({"matrix": break_matrix(LOOK_DOWN_Z, m11=1.5)}, r"frames\[0\]\.transform_matrix: is not orthonormal"),
        ({"matrix": break_matrix(LOOK_DOWN_Z, m11=-1.0)}, r"frames\[0\]\.transform_matrix: mirrors"),
        ({"matrix": break_matrix(LOOK_DOWN_Z, m11=1e39)}, r"transform_matrix\[1\]\[1\]: expected a number within"),
        ({"matrix": [["1", 0, 0, 0]] * 4}, r"transform_matrix\[0\]\[0\]: expected a number"),
    ],
)
def test_load_views_names_the_wrong_field(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    """One line with the file, the frame and the field."""
    content = write_scene(tmp_path, frames=2)
    if "matrix" in change:
        content["frames"][0]["transform_matrix"] = change["matrix"]
    else:
        content |= change
    edit(tmp_path, content)
    with pytest.raises(SceneError, match=message) as caught:
        load_views(tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_load_views_refuses_wrong_files(tmp_path: Path) -> None:
    """No folder, an empty folder, no JSON, no camera at all, a truncated image: each says which."""
    with pytest.raises(SceneError, match="no such file or folder"):
        load_views(tmp_path / "absent")
    with pytest.raises(SceneError, match="no COLMAP model"):
        load_views(tmp_path)
    (tmp_path / "transforms.json").write_text("frames: []")
    with pytest.raises(SceneError, match=r"transforms\.json: not valid JSON"):
        load_views(tmp_path)
    content = write_scene(tmp_path, size=(64, 64))
    del content["camera_angle_x"]
    edit(tmp_path, content)
    with pytest.raises(SceneError, match=r"frames\[0\]: fl_x or camera_angle_x is missing"):
        load_views(tmp_path)
    write_scene(tmp_path, size=(64, 64))
    image = tmp_path / "r_3.png"
    image.write_bytes(image.read_bytes()[:-40])
    with pytest.raises(ImageError, match=r"r_3\.png: damaged or truncated"):
        load_views(tmp_path)


# COLMAP


def write_colmap(folder: Path, model: str, params: list[float], *, text: bool) -> np.ndarray:
    """Six cameras on a ring around a far-off point, as pycolmap writes them; their poses (6, 3, 4), COLMAP's axes."""
    pycolmap = pytest.importorskip("pycolmap")
    reconstruction = pycolmap.Reconstruction()
    camera = pycolmap.Camera(camera_id=1, model=model, width=6, height=4, params=params)
    reconstruction.add_camera_with_trivial_rig(camera)
    middle, poses = np.array([100.0, -50.0, 20.0]), []
    (folder / "images").mkdir(parents=True)
    for i in range(6):
        a = 2.0 * math.pi * i / 6
        forward = -np.array([math.cos(a), 0.0, math.sin(a)])
        down = np.array([0.0, 1.0, 0.0])
        pose = np.stack([np.cross(down, forward), down, forward, middle - 40.0 * forward], axis=1)
        w2c = np.concatenate([pose[:, :3].T, -pose[:, :3].T @ pose[:, 3:]], axis=1)
        image = pycolmap.Image(image_id=6 - i, camera_id=1, name=f"{i}.png")
        reconstruction.add_image_with_trivial_frame(image, pycolmap.Rigid3d(w2c))
        write_image(folder / "images" / f"{i}.png", np.full((4, 6, 3), 40 * i, np.uint8))
        poses.append(pose)
    for offset in np.random.default_rng(0).uniform(-30.0, 30.0, (50, 3)):
        reconstruction.add_point3D(middle + offset, pycolmap.Track(), np.zeros(3, np.uint8))
    sparse = folder / "sparse" / "0"
    sparse.mkdir(parents=True)
    (reconstruction.write_text if text else reconstruction.write_binary)(str(sparse))
    return np.stack(poses)


COLMAP_MODELS = [
    ("SIMPLE_PINHOLE", [8.0, 3.1, 2.1], PINHOLE, [0, 0, 0, 0, 0, 0]),
    ("PINHOLE", [8.0, 9.0, 3.1, 2.1], PINHOLE, [0, 0, 0, 0, 0, 0]),
    ("SIMPLE_RADIAL", [8.0, 3.1, 2.1, 0.1], OPENCV, [0.1, 0, 0, 0, 0, 0]),
    ("RADIAL", [8.0, 3.1, 2.1, 0.1, -0.02], OPENCV, [0.1, -0.02, 0, 0, 0, 0]),
    ("OPENCV", [8.0, 9.0, 3.1, 2.1, 0.1, -0.02, 0.003, -0.004], OPENCV, [0.1, -0.02, 0, 0, 0.003, -0.004]),
    (
        "OPENCV_FISHEYE",
        [8.0, 9.0, 3.1, 2.1, 0.1, -0.02, 0.003, -0.004],
        OPENCV_FISHEYE,
        [0.1, -0.02, 0.003, -0.004, 0, 0],
    ),
]


@pytest.mark.parametrize("text", [True, False], ids=["text", "binary"])
@pytest.mark.parametrize("model, params, expected, distortion", COLMAP_MODELS, ids=[row[0] for row in COLMAP_MODELS])
def test_load_views_reads_colmap(
    model: str,
    params: list[float],
    expected: int,
    distortion: list[float],
    text: bool,
    tmp_path: Path,
    device: wp.Device,
) -> None:
    """Both formats as pycolmap writes them; a ray's direction agrees with pycolmap's own lens; placed and boxed."""
    pycolmap = pytest.importorskip("pycolmap")
    poses = write_colmap(tmp_path, model, params, text=text)
    views = load_views(tmp_path, holdout=0)
    assert views.names == tuple(f"{i}.png" for i in range(6)) and (views.model == expected).all()
    assert views.image(3)[0, 0].tolist() == [120, 120, 120, 255]
    np.testing.assert_allclose(views.distortion, np.tile(distortion, (6, 1)), rtol=1e-6)
    np.testing.assert_allclose(views.c2w[:, :, 3] - 0.5, CAMERA_DISTANCE * views.c2w[:, :, 2], atol=1e-5)
    np.testing.assert_allclose(views.c2w[:, :, 1], np.tile([0.0, 0.0, 1.0], (6, 1)), atol=1e-6)
    np.testing.assert_allclose(views.scale * 40.0, CAMERA_DISTANCE, rtol=1e-6)
    assert views.aabb_scale == 4  # cameras reach 1.32 from the middle
    np.testing.assert_allclose(views.c2w[:, :, 0], poses[:, :, 0] @ views.rotation.T, atol=1e-6)
    camera = pycolmap.Camera(camera_id=1, model=model, width=6, height=4, params=params)
    px = np.random.default_rng(2).random((20, 2)) * (6.0, 4.0)
    _, d, _ = trace(views.camera(0), px, device)
    local = d.astype(np.float64) @ views.c2w[0, :, :3] * (1.0, -1.0, -1.0)
    plane = camera.cam_from_img(px)  # on the plane at distance 1
    np.testing.assert_allclose(local[:, :2] / local[:, 2:], plane, atol=2e-5)  # pycolmap's own iteration


def test_load_views_finds_colmap_models_in_any_of_their_folders(tmp_path: Path) -> None:
    """The folder above `sparse/0` and the model folder itself; old models without rigs and frames as well."""
    write_colmap(tmp_path, "PINHOLE", [8.0, 9.0, 3.1, 2.1], text=False)
    sparse = tmp_path / "sparse" / "0"
    whole = load_views(tmp_path, holdout=0)
    assert load_views(sparse, holdout=0).names == whole.names
    for name in ("rigs.bin", "frames.bin"):
        (sparse / name).unlink()
    np.testing.assert_array_equal(load_views(tmp_path, holdout=0).c2w, whole.c2w)


def test_load_views_refuses_what_colmap_cannot_mean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An unsupported camera model, a damaged file, no images folder, no pycolmap: one line each."""
    write_colmap(tmp_path / "full", "FULL_OPENCV", [8.0, 9.0, 3.1, 2.1, *[0.01] * 8], text=True)
    with pytest.raises(SceneError, match="camera 1: model FULL_OPENCV is not supported; these are: SIMPLE_PINHOLE"):
        load_views(tmp_path / "full")
    write_colmap(tmp_path / "cut", "PINHOLE", [8.0, 9.0, 3.1, 2.1], text=False)
    (tmp_path / "cut" / "images").rename(tmp_path / "cut" / "photos")
    with pytest.raises(SceneError, match="no folder 'images'"):
        load_views(tmp_path / "cut")
    points = tmp_path / "cut" / "sparse" / "0" / "points3D.bin"
    whole = points.read_bytes()
    for n, message in ((len(whole) - 1, "truncated at point 49 of 50"), (0, "truncated")):
        points.write_bytes(whole[:n])
        with pytest.raises(SceneError, match=rf"points3D\.bin: {message}"):
            load_views(tmp_path / "cut")
    points.write_bytes(whole)
    images = tmp_path / "cut" / "sparse" / "0" / "images.bin"
    images.write_bytes(images.read_bytes()[:100])
    with pytest.raises(SceneError, match="not a readable COLMAP model") as caught:
        load_views(tmp_path / "cut")
    assert "\n" not in str(caught.value)
    monkeypatch.setitem(__import__("sys").modules, "pycolmap", None)
    with pytest.raises(SceneError, match=r"needs pycolmap: pip install 'nrc\[colmap\]'"):
        load_views(tmp_path / "cut")


# Real data


def closest_to_axes(views: Views) -> np.ndarray:
    """Least-squares point nearest to all optical axes."""
    axes, positions = views.c2w[:, :, 2].astype(np.float64), views.c2w[:, :, 3].astype(np.float64)
    projectors = np.eye(3) - axes[:, :, None] * axes[:, None, :]
    return np.linalg.solve(projectors.sum(axis=0), np.einsum("nij,nj->i", projectors, positions))


@pytest.mark.realdata
def test_load_views_reads_lego(data: Path) -> None:
    """100 training and 50 test views with alpha around the middle of the unit cube."""
    train, test = load_views(data / "nerf" / "lego"), load_views(data / "nerf" / "lego", split="test")
    assert (len(train), len(test)) == (100, 50) and train.has_alpha and train.aabb_scale == 1
    assert train.warnings == () and len(test.warnings) == 1 and "150 of 200" in test.warnings[0]
    np.testing.assert_allclose(closest_to_axes(train), 0.5, atol=1e-4)
    np.testing.assert_allclose(train.focal, 0.5 * 400 / math.tan(0.5 * 0.6911112), rtol=1e-6)
    # The object's silhouettes meet: the middle of the cube is opaque in every view.
    assert all(train.image(i)[200, 200, 3] == 255 for i in range(100))


@pytest.mark.realdata
def test_load_views_reads_fox(data: Path) -> None:
    """43 + 7 of 67 photographs with OPENCV distortion, looking at the middle of the cube."""
    train = load_views(data / "nerf" / "fox", downscale=8)
    test = load_views(data / "nerf" / "fox", split="test", downscale=8)
    assert (len(train), len(test)) == (43, 7) and train.aabb_scale == 4 and (train.model == OPENCV).all()
    assert len(train.warnings) == 1 and "17 of 67 images are missing" in train.warnings[0]
    assert np.abs(closest_to_axes(train) - 0.5).max() < 0.05
    np.testing.assert_allclose(train.focal[0] * 8, [1375.52, 1374.49], rtol=1e-6)


def sweep(cameras: CamerasView, i: int, j: int, px: np.ndarray, t: np.ndarray, device: wp.Device) -> np.ndarray:
    """Where the points at distances t on camera i's rays through px project to in camera j: (pixels, distances, 3)."""

    @wp.kernel(module="unique")
    def project_along(
        first: int,
        cameras: CamerasView,
        i: int,
        j: int,
        px: wp.array[wp.vec2],
        t: wp.array[float],
        out: wp.array2d[wp.vec3],
    ):
        k = first + wp.tid()
        o, d = camera_ray(cameras, i, px[k])
        for m in range(t.shape[0]):
            out[k, m] = camera_project(cameras, j, o + t[m] * d)

    points = wp.array(px.astype(np.float32), dtype=wp.vec2, device=device)
    distances = wp.array(t.astype(np.float32), dtype=float, device=device)
    out = wp.full((len(px), len(t)), wp.vec3(math.nan), dtype=wp.vec3, device=device)
    launch(project_along, len(px), inputs=[cameras, i, j, points, distances], outputs=[out], device=device)
    return out.numpy()


@pytest.mark.realdata
def test_silhouettes_of_lego_agree(data: Path, device: wp.Device) -> None:
    """Opaque pixels of one view see a point that is inside the silhouette in every other view."""
    views = load_views(data / "nerf" / "lego")
    cameras = views.upload(device)
    rows, columns = np.nonzero(views.image(0)[:, :, 3] == 255)
    chosen = np.random.default_rng(0).choice(len(rows), 100, replace=False)
    px = np.stack([columns[chosen], rows[chosen]], axis=1) + 0.5
    inside = np.ones((100, 400), bool)
    for j in range(1, len(views), 3):
        at = np.floor(sweep(cameras, 0, j, px, np.linspace(0.6, 2.0, 400), device)[:, :, :2]).astype(int)
        in_image = ((at >= 0) & (at < 400)).all(axis=2)
        x, y = np.clip(at, 0, 399).transpose(2, 0, 1)
        inside &= in_image & (views.image(j)[y, x, 3] > 0)
    assert inside.any(axis=1).mean() > 0.97


def patches(image: np.ndarray, at: np.ndarray, half: int = 4) -> np.ndarray:
    """Grey patches around integer places (..., 2), zero mean and unit norm; zero where they leave the image."""
    grey = image[:, :, :3].astype(np.float64).mean(axis=2)
    height, width = grey.shape
    ok = ((at >= half) & (at < (width - half, height - half))).all(axis=-1)
    x, y = np.where(ok[..., None], at, half).astype(int).transpose(-1, *range(at.ndim - 1))
    steps = np.arange(-half, half + 1)
    patch = grey[y[..., None, None] + steps[:, None], x[..., None, None] + steps].reshape(*ok.shape, -1)
    patch -= patch.mean(axis=-1, keepdims=True)
    norm = np.linalg.norm(patch, axis=-1, keepdims=True)
    return np.where(ok[..., None], patch / np.maximum(norm, 1e-9), 0.0)


@pytest.mark.realdata
def test_photographs_of_fox_match_along_epipolar_lines(data: Path, device: wp.Device) -> None:
    """Patches of one photograph reappear in its neighbour on their epipolar lines, not on lines 12 pixels beside."""
    views = load_views(data / "nerf" / "fox", downscale=4)
    cameras, rng = views.upload(device), np.random.default_rng(0)
    at = np.floor(rng.random((2000, 2)) * (200, 400) + 35)
    spread = views.image(0)[:, :, :3].astype(np.float64).mean(axis=2)
    texture = [spread[int(y) - 4 : int(y) + 5, int(x) - 4 : int(x) + 5].std() for x, y in at]
    at = at[np.argsort(texture)[-300:]]
    lines = sweep(cameras, 0, 1, at + 0.5, np.geomspace(0.3, 8.0, 300), device)
    here = patches(views.image(0), at)[:, None]
    best = []
    for shift in ((0.0, 0.0), (12.0, 12.0)):
        there = patches(views.image(1), np.floor(lines[:, :, :2] + shift))
        best.append(np.median((here * there).sum(axis=-1).max(axis=1)))
    assert best[0] > 0.9 and best[0] > best[1] + 0.1, best
