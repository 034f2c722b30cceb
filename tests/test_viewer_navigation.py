"""Motions of the viewer's camera, camera paths, and the choice of the picture's size."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from nrc.fit.camera_path import CameraPath as FitPath
from nrc.fit.camera_path import read_camera_path
from nrc.fit.frame import Placement
from nrc.scene import Camera, SceneError
from nrc.viewer.camera_path import CameraPath, Keyframe
from nrc.viewer.navigation import Navigation, same_camera
from nrc.viewer.resolution import Resolution
from nrc.viewer.session import Request

SIZE = (1280, 720)  # viewport [px]
BOUNDS = (np.array([-1.0, -0.5, -2.0]), np.array([1.0, 1.5, 2.0]))
ROUNDING = 1e-9  # relative, of the few double-precision operations of a motion, in coordinates up to 100 scene sizes


def navigation(scale: float = 1.0, **options: float | str) -> Navigation:
    """A level camera that looks at the box from outside."""
    eye, target = scale * np.array([3.0, 2.0, 4.0]), scale * np.array([0.2, 0.3, -0.1])
    camera = Camera.look_at(tuple(eye), tuple(target), focus_distance=scale, **options)
    return Navigation(camera, (scale * BOUNDS[0], scale * BOUNDS[1]))


def mirrored(camera: Camera) -> Camera:
    """The camera of the mirrored picture."""
    return replace(camera, to_world=camera.to_world @ np.diag([-1.0, 1.0, 1.0, 1.0]))


def rolled(camera: Camera, angle: float) -> Camera:
    """The camera turned about its view [rad]."""
    turn = np.eye(4)
    turn[:3, :3] = Rotation.from_rotvec([0.0, 0.0, angle]).as_matrix()
    return replace(camera, to_world=camera.to_world @ turn)


def project(camera: Camera, point: np.ndarray) -> np.ndarray:
    """Position [px] of a point in the viewport, right and down from the upper left corner."""
    matrix = camera.to_world
    axes = matrix[:3, :3] / np.linalg.norm(matrix[:3, :3], axis=0)
    x, y, z = (point - matrix[:3, 3]) @ axes
    half = camera.half_extents(*SIZE)
    return np.array([SIZE[0] * (0.5 + 0.5 * x / -z / half[0]), SIZE[1] * (0.5 - 0.5 * y / -z / half[1])])


def eye(camera: Camera) -> np.ndarray:
    """Position of a camera."""
    return camera.to_world[:3, 3]


def assert_rigid(camera: Camera, determinant: float = 1.0) -> None:
    """Orthonormal axes, and the expected hand."""
    axes = camera.to_world[:3, :3]
    assert np.isfinite(camera.to_world).all()
    np.testing.assert_allclose(axes.T @ axes, np.eye(3), atol=1e-9)
    assert np.linalg.det(axes) == pytest.approx(determinant, abs=1e-9)


# --- motions ----------------------------------------------------------------------------------------------------------


def test_navigation_starts_with_the_cameras_own_object() -> None:
    """Nothing is rebuilt, and no version counted, before something moves."""
    camera = Camera.look_at((3.0, 2.0, 4.0), (0.0, 0.0, 0.0))
    moving = Navigation(camera, BOUNDS)
    assert moving.camera is camera
    moving.orbit(0.0, 0.0, 720.0)
    moving.pan(0.0, 0.0, 720.0)
    moving.look(0.0, 0.0, 720.0)
    moving.dolly(0.0)
    moving.fly(0.0, 0.0, 0.0, 1.0)
    moving.reset()
    assert moving.camera is camera and moving.version == 0


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e6])
def test_orbit_turns_about_the_pivot(scale: float) -> None:
    """Half the viewport's height to the right is a quarter turn to the left about the vertical through the pivot."""
    moving = navigation(scale)
    before, pivot = moving.camera, moving.pivot
    moving.orbit(360.0, 0.0, 720.0)
    turn = Rotation.from_rotvec([0.0, -0.5 * math.pi, 0.0]).as_matrix()
    np.testing.assert_allclose(eye(moving.camera), pivot + turn @ (eye(before) - pivot), atol=ROUNDING * 10.0 * scale)
    np.testing.assert_allclose(moving.camera.to_world[:3, :3], turn @ before.to_world[:3, :3], atol=ROUNDING)
    np.testing.assert_allclose(project(moving.camera, pivot), [640.0, 360.0], atol=1e-5)


def test_orbit_down_lifts_the_camera() -> None:
    """A drag down by a twentieth of the height is nine degrees of elevation, at the same distance; up stays up."""
    moving = navigation()
    pivot, distance = moving.pivot, moving.distance
    before = math.asin((eye(moving.camera) - pivot)[1] / distance)
    moving.orbit(0.0, 36.0, 720.0)
    after = eye(moving.camera) - pivot
    assert math.asin(after[1] / np.linalg.norm(after)) == pytest.approx(before + math.radians(9.0), abs=1e-12)
    assert np.linalg.norm(after) == pytest.approx(distance, rel=1e-12)
    assert abs(moving.camera.to_world[1, 0]) < 1e-12 and moving.camera.to_world[1, 1] > 0.0


@pytest.mark.parametrize("dy", [1e4, -1e4])
def test_orbit_stops_short_of_the_poles(dy: float) -> None:
    """However far a drag goes, the camera is at most 89 degrees above or below, and its picture stays upright."""
    moving = navigation()
    moving.orbit(3.0, dy, 720.0)
    assert math.degrees(math.asin(moving.camera.to_world[1, 2])) == pytest.approx(math.copysign(89.0, dy), abs=1e-9)
    assert moving.camera.to_world[1, 1] > 0.0
    version = moving.version
    moving.orbit(0.0, dy, 720.0)
    assert moving.version == version


@pytest.mark.parametrize(
    "change", ["level", "rolled", "upside down", "mirrored", "scaled", "z up", "steep", "vertical"]
)
def test_first_motion_does_not_jump(change: str) -> None:
    """A drag by a thousandth of a pixel moves the camera by no more than that, from any pose."""
    camera, up = navigation().camera, (0.0, 1.0, 0.0)
    if change == "rolled":
        camera = rolled(camera, 0.7)
    elif change == "upside down":
        camera = rolled(camera, math.pi)
    elif change == "mirrored":
        camera = rolled(mirrored(camera), 0.3)
    elif change == "scaled":
        camera = replace(camera, to_world=camera.to_world @ np.diag([2.0, 3.0, 0.5, 1.0]))
    elif change == "z up":
        up = (0.0, 0.0, 2.0)
    elif change == "steep":
        camera = Camera.look_at((0.001, 5.0, 0.0), (0.0, 0.0, 0.0))
    elif change == "vertical":
        camera = Camera.look_at((0.5, 5.0, 0.3), (0.5, 0.0, 0.3), up=(0.6, 0.0, -0.8))
    axes = camera.to_world[:3, :3] / np.linalg.norm(camera.to_world[:3, :3], axis=0)
    for motion in ("orbit", "look", "pan"):
        moving = Navigation(camera, BOUNDS, up)
        getattr(moving, motion)(1e-3, 1e-3, 720.0)
        assert moving.version == 1
        # 1e-3 px is 4e-6 rad; a camera within a degree of the pole turns about itself by as much
        np.testing.assert_allclose(moving.camera.to_world[:3, :3], axes, atol=2e-5)
        np.testing.assert_allclose(eye(moving.camera), eye(camera), atol=1e-4)


@pytest.mark.parametrize("forward", [1.0, -1.0])
def test_orbit_leaves_the_pole(forward: float) -> None:
    """From straight down or up a camera can be turned away, without ever leaving its distance."""
    moving = Navigation(
        Camera.look_at((0.0, 5.0 * forward, 0.0), (0.0, 0.0, 0.0), up=(0.0, 0.0, -forward)),
        (-np.ones(3), np.ones(3)),
    )
    distance = moving.distance
    moving.orbit(0.0, -200.0 * forward, 720.0)
    offset = eye(moving.camera) - moving.pivot
    assert math.degrees(math.asin(abs(offset[1]) / distance)) == pytest.approx(40.0, abs=1e-9)
    assert offset[2] == pytest.approx(distance * math.sin(math.radians(50.0)), rel=1e-9)
    assert moving.camera.to_world[1, 1] > 0.0
    assert_rigid(moving.camera)


@pytest.mark.parametrize("roll", [0.0, 0.6, math.pi])
@pytest.mark.parametrize("mirror", [False, True])
def test_drags_move_the_picture_along(roll: float, mirror: bool) -> None:
    """A small drag takes along the near side in orbits, the middle in looks; in tilted and mirrored pictures too."""
    camera = rolled(Camera.look_at((0.0, 0.0, 5.0), (0.0, 0.0, 0.0)), roll)
    camera = mirrored(camera) if mirror else camera
    for drag in ((1.0, 0.0), (0.0, 1.0), (-0.6, 0.8)):
        for motion, point in (("orbit", np.array([0.0, 0.0, 0.5])), ("look", np.zeros(3))):
            moving = Navigation(camera, (-np.ones(3), np.ones(3)))
            before = project(moving.camera, point)
            getattr(moving, motion)(*drag, 720.0)
            moved = project(moving.camera, point) - before
            # The view is horizontal: yaw and elevation are equally fast
            assert moved @ drag / np.linalg.norm(moved) > 0.9999


def test_orbit_keeps_the_roll() -> None:
    """The angle between the picture's up axis and the horizon is the same after any drags."""
    moving = Navigation(rolled(navigation().camera, 0.4), BOUNDS)
    rng = np.random.default_rng(1)
    for _ in range(100):
        moving.orbit(*rng.normal(0.0, 100.0, 2), 720.0)
        axes = moving.camera.to_world[:3, :3]
        level = np.cross([0.0, 1.0, 0.0], axes[:, 2])
        level /= np.linalg.norm(level)
        assert math.atan2(-(axes[:, 1] @ level), axes[:, 0] @ level) == pytest.approx(0.4, abs=1e-9)


@pytest.mark.parametrize("axis", ["x", "y", "smaller", "larger"])
@pytest.mark.parametrize("mirror", [False, True])
def test_pan_moves_the_pivots_depth_with_the_cursor(axis: str, mirror: bool) -> None:
    """Any point as deep as the pivot is displaced by exactly the drag; axes stay."""
    camera = navigation(fov_axis=axis).camera
    moving = Navigation(mirrored(camera) if mirror else camera, BOUNDS)
    before = moving.camera
    for place in (np.zeros(2), np.array([0.7, -0.3])):
        point = moving.pivot + before.to_world[:3, :2] @ place
        start = project(moving.camera, point)
        moving.pan(123.0, -45.0, SIZE[1], SIZE[0])
        np.testing.assert_allclose(project(moving.camera, point) - start, [123.0, -45.0], atol=1e-8)
    np.testing.assert_allclose(moving.camera.to_world[:3, :3], before.to_world[:3, :3], atol=1e-12)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e6])
def test_dolly_is_exponential_and_returns(scale: float) -> None:
    """Fractions of notches multiply to whole ones, the pivot stays in the middle, and the way back is the same."""
    moving = navigation(scale)
    before, pivot, distance = moving.camera, moving.pivot, moving.distance
    for _ in range(8):
        moving.dolly(0.25)
    assert moving.distance == pytest.approx(0.81 * distance, rel=1e-12)
    np.testing.assert_allclose(moving.pivot, pivot)
    np.testing.assert_allclose(project(moving.camera, pivot), [640.0, 360.0], atol=1e-6)
    moving.dolly(-2.0)
    np.testing.assert_allclose(moving.camera.to_world, before.to_world, rtol=1e-12, atol=1e-12 * scale)
    for _ in range(100):
        moving.dolly(1e9)
    assert 0.0 < moving.distance < 1e-5 * scale * 5.0
    for _ in range(100):
        moving.dolly(-1e9)
    assert moving.distance == pytest.approx(1e3 * scale * math.sqrt(4 + 4 + 16), rel=1e-12)


def test_look_keeps_the_eye() -> None:
    """A look turns about the eye, stays level, and takes the pivot along at its distance."""
    moving = navigation()
    before, distance = moving.camera, moving.distance
    moving.look(100.0, 30.0, SIZE[1], SIZE[0])
    np.testing.assert_allclose(eye(moving.camera), eye(before), atol=1e-12)
    assert abs(moving.camera.to_world[1, 0]) < 1e-12
    assert moving.distance == distance
    np.testing.assert_allclose(project(moving.camera, moving.pivot), [640.0, 360.0], atol=1e-8)
    assert moving.camera.to_world[1, 2] < before.to_world[1, 2]  # dragged down, it looks up


def test_fly_moves_along_the_views_axes() -> None:
    """A quarter of the box's diagonal per second, with `fast` four times that; no faster along two axes at once."""
    moving = navigation()
    size, before = math.sqrt(4 + 4 + 16), moving.camera
    moving.fly(0.0, 0.0, 1.0, 0.5)
    np.testing.assert_allclose(eye(moving.camera) - eye(before), -0.125 * size * before.to_world[:3, 2], atol=1e-12)
    moving.reset()
    moving.speed = 3.0
    moving.fly(-1.0, 1.0, 0.0, 0.1, fast=True)
    way = (before.to_world[:3, 1] - before.to_world[:3, 0]) / math.sqrt(2.0)
    np.testing.assert_allclose(eye(moving.camera) - eye(before), 0.3 * size * way, atol=1e-12)
    np.testing.assert_allclose(moving.camera.to_world[:3, :3], before.to_world[:3, :3], atol=1e-12)


def test_fly_goes_right_in_mirrored_pictures() -> None:
    """Right is where the picture's right is: what was in the middle is left of it then."""
    moving = Navigation(mirrored(navigation().camera), BOUNDS)
    point = moving.pivot
    moving.fly(1.0, 0.0, 0.0, 0.1)
    assert project(moving.camera, point)[0] < 640.0


@pytest.mark.parametrize("roll", [0.0, 0.5])
@pytest.mark.parametrize("mirror", [False, True])
def test_focus_centres_the_point(roll: float, mirror: bool) -> None:
    """The eye stays, the point is in the middle, in focus, and what orbits turn about."""
    camera = rolled(navigation().camera, roll)
    moving = Navigation(mirrored(camera) if mirror else camera, BOUNDS)
    point = np.array([0.9, -0.4, 1.7])
    depth = float(np.linalg.norm(point - eye(moving.camera)))
    moving.focus(point)
    np.testing.assert_allclose(eye(moving.camera), eye(camera), atol=1e-12)
    np.testing.assert_allclose(project(moving.camera, point), [640.0, 360.0], atol=1e-8)
    assert moving.camera.focus_distance == moving.distance == pytest.approx(depth, rel=1e-12)
    moving.orbit(77.0, -20.0, 720.0)
    np.testing.assert_allclose(project(moving.camera, point), [640.0, 360.0], atol=1e-8)
    assert_rigid(moving.camera, -1.0 if mirror else 1.0)


def test_focus_ignores_the_eye_and_nowhere() -> None:
    """Points without a direction change nothing; one straight above turns the camera there."""
    moving = navigation()
    for point in (eye(moving.camera), (math.nan, 0.0, 0.0), (math.inf, 0.0, 0.0)):
        moving.focus(point)
    assert moving.version == 0
    above = eye(moving.camera) + np.array([0.0, 2.0, 0.0])
    moving.focus(above)
    np.testing.assert_allclose(project(moving.camera, above), [640.0, 360.0], atol=1e-8)
    assert_rigid(moving.camera)


def test_lens_changes_the_lens_alone() -> None:
    """Setters hold their ranges and leave the pose as it is; what is not a number is ignored."""
    moving = navigation()
    pose = moving.camera.to_world
    moving.set_fov(55.0)
    moving.set_aperture(0.1)
    moving.set_focus_distance(2.5)
    camera = moving.camera
    assert (camera.fov, camera.aperture_radius, camera.focus_distance) == (55.0, 0.1, 2.5)
    assert camera.to_world is pose and moving.version == 3
    moving.set_fov(math.nan)
    moving.set_aperture(math.inf)
    moving.set_focus_distance(-1.0)
    moving.set_fov(55.0)
    assert moving.camera is camera and moving.version == 3
    moving.set_fov(1e9)
    moving.set_aperture(-1.0)
    assert moving.camera.fov == 179.0 and moving.camera.aperture_radius == 0.0


def test_reset_and_views_return_exactly() -> None:
    """Cameras come back as the same objects, with their pivots; deleted ones are gone."""
    moving = navigation()
    first = moving.camera
    moving.focus((0.5, 0.5, 1.5))
    saved, pivot = moving.camera, moving.pivot
    moving.save("corner")
    moving.orbit(50.0, 10.0, 720.0)
    moving.reset()
    assert moving.camera is first
    moving.recall("corner")
    assert moving.camera is saved
    np.testing.assert_allclose(moving.pivot, pivot, atol=1e-12)
    version = moving.version
    moving.recall("corner")
    assert moving.version == version
    assert list(moving.views) == ["corner"]
    moving.delete("corner")
    assert not moving.views
    with pytest.raises(KeyError):
        moving.recall("corner")


@pytest.mark.parametrize(
    "bounds",
    [
        (np.zeros(3), np.zeros(3)),
        (np.full(3, 3.0), np.full(3, 3.0)),
        (np.full(3, np.inf), np.full(3, -np.inf)),
        (np.full(3, np.nan), np.full(3, np.nan)),
        (np.full(3, -1e30), np.full(3, 1e30)),
    ],
)
@pytest.mark.parametrize("up", [(0.0, 1.0, 0.0), (0.0, 0.0, 0.0), (math.nan, 0.0, 0.0)])
def test_degenerate_scenes_can_be_moved_in(bounds: tuple[np.ndarray, np.ndarray], up: tuple[float, ...]) -> None:
    """Boxes without size or end, and no vertical, give finite rigid cameras."""
    camera = Camera.look_at((3.0, 3.0, 3.0), (0.0, 0.0, 0.0))
    moving = Navigation(camera, bounds, up)
    for _ in range(3):
        moving.orbit(30.0, 20.0, 720.0)
        moving.pan(5.0, 5.0, 720.0)
        moving.dolly(3.0)
        moving.fly(1.0, 1.0, 1.0, 0.1)
        moving.look(5.0, 5.0, 720.0)
        assert moving.distance > 0.0
        assert_rigid(moving.camera)
    assert moving.version > 10


def test_pivot_lies_half_way_through_the_box() -> None:
    """On the view's axis: in the middle of what it crosses, from within halfway to the wall, beside the box as deep."""
    box = -np.ones(3), np.ones(3)
    assert Navigation(Camera.look_at((0.5, 0.2, 5.0), (0.5, 0.2, 0.0)), box).distance == pytest.approx(5.0)
    assert Navigation(Camera.look_at((0.0, 0.0, 0.5), (0.0, 0.0, 0.0)), box).distance == pytest.approx(0.75)
    assert Navigation(Camera.look_at((4.0, 0.0, 5.0), (4.0, 0.0, 0.0)), box).distance == pytest.approx(5.0)
    behind = Navigation(Camera.look_at((0.0, 0.0, 5.0), (0.0, 0.0, 9.0)), box)
    assert behind.distance == pytest.approx(math.sqrt(12.0))


@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e6])
def test_random_motions_stay_rigid(mirror: bool, scale: float) -> None:
    """After 10,000 of all motions the axes are orthonormal, the hand is kept, and a level camera is level."""
    camera = navigation(scale).camera
    camera = mirrored(camera) if mirror else camera
    moving = Navigation(camera, (scale * BOUNDS[0], scale * BOUNDS[1]))
    rng = np.random.default_rng(7)
    kinds, drags, thirds = rng.integers(0, 6, 10_000), rng.normal(0.0, 40.0, (10_000, 2)), rng.normal(size=10_000)
    for kind, (dx, dy), third in zip(kinds, drags, thirds, strict=True):
        if kind == 0:
            moving.orbit(dx, dy, 720.0)
        elif kind == 1:
            moving.pan(dx, dy, 720.0, 1280.0)
        elif kind == 2:
            moving.dolly(third)
        elif kind == 3:
            moving.look(dx, dy, 720.0)
        elif kind == 4:
            moving.fly(dx, dy, 40.0 * third, 0.02, fast=third > 0.0)
        else:
            moving.focus(scale * np.array([dx, dy, third]) / 40.0)
        assert np.isfinite(moving.camera.to_world).all()
    assert_rigid(moving.camera, -1.0 if mirror else 1.0)
    assert abs(moving.camera.to_world[1, 0]) < 1e-9 and moving.camera.to_world[1, 1] > 0.0
    reach = moving.distance + float(np.abs(eye(moving.camera)).max())
    away = float(np.linalg.norm(eye(moving.camera) - moving.pivot))
    assert away == pytest.approx(moving.distance, abs=1e-12 * reach)


def test_version_counts_changes() -> None:
    """Once per motion; the camera stays one object in between."""
    moving = navigation()
    moving.orbit(1.0, 0.0, 720.0)
    first = moving.camera
    assert moving.camera is first and moving.version == 1
    moving.set_camera(replace(first))
    assert moving.version == 1
    moving.set_camera(replace(first, fov=33.0))
    assert moving.version == 2


# --- camera paths -----------------------------------------------------------------------------------------------------


def some_cameras(n: int = 5, *, mirror: bool = False) -> list[Camera]:
    """Cameras of different poses and lenses."""
    rng, moving, cameras = np.random.default_rng(3), navigation(), []
    for i in range(n):
        moving.orbit(*rng.normal(0.0, 60.0, 2), 720.0)
        moving.dolly(float(rng.normal()))
        lens = {"fov": 30.0 + 10.0 * i, "aperture_radius": 0.01 * i, "focus_distance": 2.0 + i % 3}
        cameras.append(replace(mirrored(moving.camera) if mirror else moving.camera, **lens))
    return cameras


def some_path(*, mirror: bool = False) -> CameraPath:
    """A path with uneven times."""
    times = (0.0, 1.0, 1.5, 4.0, 4.25)
    return CameraPath([Keyframe(*pair) for pair in zip(some_cameras(mirror=mirror), times, strict=True)])


def assert_same(a: Camera, b: Camera) -> None:
    """Equal but for rounding."""
    np.testing.assert_allclose(a.to_world, b.to_world, atol=1e-12)
    assert (a.fov, a.fov_axis) == (pytest.approx(b.fov, rel=1e-12), b.fov_axis)
    assert a.aperture_radius == pytest.approx(b.aperture_radius, rel=1e-12)
    assert a.focus_distance == pytest.approx(b.focus_distance, rel=1e-12)


@pytest.mark.parametrize("mirror", [False, True])
def test_path_passes_through_its_keyframes(mirror: bool) -> None:
    """At their times, beyond both ends, and a moment beside them; poses between are rigid and keep the hand."""
    path = some_path(mirror=mirror)
    for keyframe in path.keyframes:
        assert path.camera(keyframe.time) is keyframe.camera
        beside = path.camera(keyframe.time + 1e-9)
        np.testing.assert_allclose(beside.to_world, keyframe.camera.to_world, atol=1e-6)
        assert beside.fov == pytest.approx(keyframe.camera.fov, abs=1e-5)
    assert path.camera(-1.0) is path.keyframes[0].camera and path.camera(99.0) is path.keyframes[-1].camera
    for camera in path.cameras(37):
        assert_rigid(camera, -1.0 if mirror else 1.0)
        assert 0.0 <= camera.aperture_radius <= 0.04 and 2.0 <= camera.focus_distance <= 4.0
    assert path.camera(2.2) is path.camera(2.2)


@pytest.mark.parametrize("n", [2, 3, 5])
def test_path_goes_as_those_of_radiance_fields(n: int) -> None:
    """Positions, rotations and fields of view are those of nrc.fit.camera_path between the same keyframes."""
    keyframes = some_path().keyframes[:n]
    path = CameraPath(keyframes)
    poses = np.stack([keyframe.camera.to_world[:3] for keyframe in keyframes])
    fit = FitPath(np.array(path.times), poses, np.radians([keyframe.camera.fov for keyframe in keyframes]))
    for time in np.linspace(0.0, path.duration, 29):
        expected, camera = fit.camera(float(time), 200, 100), path.camera(float(time))
        single = 1e-6  # the other may be in single precision
        np.testing.assert_allclose(camera.to_world[:3], expected.c2w, atol=10.0 * single)
        focal = 100.0 / math.tan(math.radians(camera.fov) / 2.0)
        assert expected.focal[0] == pytest.approx(focal, rel=single)


def test_path_is_straight_and_even_where_keyframes_are() -> None:
    """Keyframes along a line at even times give uniform motion and a uniform turn."""
    cameras = []
    for i in range(4):
        matrix = np.eye(4)
        matrix[:3, :3] = Rotation.from_rotvec([0.0, 0.3 * i, 0.0]).as_matrix()
        matrix[:3, 3] = (i, 2.0 * i, 0.0)
        cameras.append(Camera(matrix, fov=40.0 + 5.0 * i))
    path = CameraPath()
    for camera in cameras:
        path.add(camera)
    assert path.times == [0.0, 1.0, 2.0, 3.0] and path.duration == 3.0
    middle = path.camera(1.25)
    np.testing.assert_allclose(eye(middle), [1.25, 2.5, 0.0], atol=1e-12)
    turn = Rotation.from_rotvec([0.0, 0.375, 0.0]).as_matrix()
    np.testing.assert_allclose(middle.to_world[:3, :3], turn, atol=1e-12)
    assert middle.fov == pytest.approx(46.25)


def test_path_begins_at_its_first_keyframe() -> None:
    """Times count from there when keyframes come with later ones or the first is removed."""
    a, b, c = some_cameras(3)
    path = CameraPath([Keyframe(a, 10.0), Keyframe(b, 11.0), Keyframe(c, 14.0)])
    assert path.times == [0.0, 1.0, 4.0]
    path.remove(0)
    assert path.times == [0.0, 3.0] and path.camera(0.0) is b
    for time in (3.0, 1.0, math.nan):
        with pytest.raises(ValueError, match="does not come after the one at 3 s"):
            path.add(a, time)
    with pytest.raises(ValueError, match="without keyframes"):
        CameraPath().camera(0.0)
    assert CameraPath().duration == 0.0


@pytest.mark.parametrize("mirror", [False, True])
def test_path_round_trips_through_a_file(tmp_path: Path, mirror: bool) -> None:
    """Keyframes and views come back; a later file replaces an older one whole."""
    path, file = some_path(mirror=mirror), tmp_path / "path.json"
    views = {"front": replace(some_cameras(1, mirror=mirror)[0], fov_axis="smaller"), 'odd "näme"': some_cameras(2)[1]}
    CameraPath().write(file, views)
    assert CameraPath.read(file)[0].keyframes == []
    path.write(file, views)
    read, found = CameraPath.read(file)
    assert read.times == path.times and list(found) == list(views)
    for a, b in zip(read.keyframes, path.keyframes, strict=True):
        assert_same(a.camera, b.camera)
    for name, camera in views.items():
        assert_same(found[name], camera)
    assert [entry.name for entry in tmp_path.iterdir()] == ["path.json"]


def test_path_file_drops_a_cameras_scale(tmp_path: Path) -> None:
    """The pose is written with unit axes, as readers want it."""
    camera = some_cameras(1)[0]
    path = CameraPath([Keyframe(replace(camera, to_world=camera.to_world @ np.diag([2.0, 3.0, 0.5, 1.0])), 0.0)])
    path.write(tmp_path / "path.json")
    assert_same(CameraPath.read(tmp_path / "path.json")[0].keyframes[0].camera, camera)


def test_path_file_is_read_by_radiance_fields(tmp_path: Path) -> None:
    """The reader of nrc.fit takes keyframes, fields of view and times, and minds nothing else in the file."""
    path = some_path()
    path.write(tmp_path / "path.json", {"view": some_cameras(1)[0]})
    fit = read_camera_path(tmp_path / "path.json", Placement(1.0, (0.0, 0.0, 0.0)))
    np.testing.assert_allclose(fit.times, path.times)
    np.testing.assert_allclose(fit.c2w, [keyframe.camera.to_world[:3] for keyframe in path.keyframes], atol=1e-12)
    np.testing.assert_allclose(np.degrees(fit.fov), [keyframe.camera.fov for keyframe in path.keyframes])


def test_path_file_fills_in_what_is_missing(tmp_path: Path) -> None:
    """An array of poses alone has the defaults of nrc.fit.camera_path."""
    file = tmp_path / "keys.json"
    file.write_text(json.dumps([{"transform_matrix": np.eye(4)[:3].tolist(), "note": 1}] * 2))
    path, views = CameraPath.read(file)
    camera = path.keyframes[1].camera
    assert path.times == [0.0, 1.0] and not views
    assert (camera.fov, camera.fov_axis, camera.aperture_radius, camera.focus_distance) == (50.0, "x", 0.0, 1.0)


POSE = np.eye(4).tolist()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ("{}", "holds neither keyframes nor views"),
        ({"keyframes": {}}, "keyframes: expected an array, got {}"),
        ({"keyframes": [{"fov": 40}]}, r"keyframes\[0\]: transform_matrix is missing"),
        ({"keyframes": [{"transform_matrix": POSE[:2]}]}, r"keyframes\[0\].transform_matrix: expected 4 rows"),
        ({"keyframes": [{"transform_matrix": [[0] * 4] * 4}]}, r"keyframes\[0\].transform_matrix: is not invertible"),
        ({"keyframes": [{"transform_matrix": POSE, "fov": 0}]}, r"keyframes\[0\].fov: expected a number between"),
        (
            {"keyframes": [{"transform_matrix": POSE, "fov_axis": "z"}]},
            r"keyframes\[0\].fov_axis: expected one of x, y",
        ),
        ({"keyframes": [{"transform_matrix": POSE, "aperture_radius": -1}]}, r"keyframes\[0\].aperture_radius: "),
        ({"keyframes": [{"transform_matrix": POSE, "focus_distance": 0}]}, r"keyframes\[0\].focus_distance: "),
        (
            {"keyframes": [{"transform_matrix": POSE, "time": 2}, {"transform_matrix": POSE, "time": 2}]},
            r"keyframes\[1\]: its time does not come after the one before",
        ),
        ({"views": []}, r"views: expected an object"),
        ({"views": {"a": {"transform_matrix": 1}}}, r"views.a.transform_matrix: expected an array"),
    ],
)
def test_path_names_the_file_and_the_field_of_a_fault(tmp_path: Path, content: object, message: str) -> None:
    """Files of a wrong kind are SceneErrors."""
    file = tmp_path / "path.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(SceneError, match=f"path.json: {message}"):
        CameraPath.read(file)


def test_path_names_files_that_cannot_be_used(tmp_path: Path) -> None:
    """Missing ones, and folders that are not there."""
    with pytest.raises(SceneError, match=r"path\.json: No such file"):
        CameraPath.read(tmp_path / "path.json")
    with pytest.raises(SceneError, match=r"path\.json: cannot be written"):
        some_path().write(tmp_path / "none" / "path.json")


# --- size of the picture ----------------------------------------------------------------------------------------------


def request(seconds: float = 0.05, size: tuple[int, int] | None = None, viewport: tuple[int, int] = SIZE) -> Request:
    """For a picture of some size."""
    return Request(None, None, *viewport, seconds=seconds, size=size, settings=None)


def simulate(
    resolution: Resolution,
    asked: Request,
    n: int,
    per_pixel: float,
    fixed: float = 0.0,
    noise: float = 0.0,
    seed: int = 0,
) -> list[tuple[tuple[int, int], float]]:
    """Sizes and times of `n` frames that cost so much [s], with a relative noise evenly spread."""
    rng, frames = np.random.default_rng(seed), []
    for _ in range(n):
        size = resolution.size(asked)
        seconds = (fixed + per_pixel * size[0] * size[1]) * (1.0 + noise * rng.uniform(-1.0, 1.0))
        resolution.measure(*size, seconds)
        frames.append((size, seconds))
    return frames


@pytest.mark.parametrize("exponent", np.arange(-8.0, -3.9, 0.25))
def test_resolution_reaches_the_time_asked_for(exponent: float) -> None:
    """Within 30 % after nine frames, unless the viewport or the least size is in the way."""
    size, seconds = simulate(Resolution(), request(), 10, 10.0**exponent)[-1]
    if size == SIZE:
        assert seconds < 1.3 * 0.05
    elif min(size) == 64:
        assert seconds > 0.7 * 0.05
    else:
        assert 0.7 * 0.05 < seconds < 1.3 * 0.05


@pytest.mark.parametrize("fixed", [0.01, 0.025, 0.04])
@pytest.mark.parametrize("per_pixel", [1e-8, 1e-7, 5e-7])
def test_resolution_sees_what_does_not_depend_on_size(fixed: float, per_pixel: float) -> None:
    """Frames that cost much at any size grow until the pixels use what is left, and do not shrink for nothing."""
    size, seconds = simulate(Resolution(), request(), 20, per_pixel, fixed)[-1]
    assert size == SIZE or seconds > 0.7 * 0.05
    assert seconds < 1.3 * 0.05


def test_resolution_does_not_shrink_for_a_fixed_cost() -> None:
    """Where a frame without pixels takes longer than asked for, pixels get a quarter of the time asked for."""
    size, seconds = simulate(Resolution(), request(), 20, 1e-8, 0.06)[-1]
    assert size == SIZE and seconds == pytest.approx(0.06 + 1e-8 * SIZE[0] * SIZE[1])


def test_resolution_is_calm_under_noise() -> None:
    """With 20 % of noise most runs do not change size in 200 frames that move, and none does more than six times."""
    counts = []
    for seed in range(60):
        cost = 10.0 ** np.random.default_rng(seed).uniform(-7.0, -5.5)
        sizes = [size for size, _ in simulate(Resolution(), request(), 210, cost, noise=0.2, seed=seed)][10:]
        counts.append(sum(a != b for a, b in pairwise(sizes)))
    assert np.median(counts) == 0 and max(counts) <= 6


@pytest.mark.parametrize("factor", [5.0, 0.2])
def test_resolution_follows_a_sudden_change(factor: float) -> None:
    """Costs that jump by five are met within four frames."""
    resolution = Resolution()
    simulate(resolution, request(), 20, 1e-6)
    _, seconds = simulate(resolution, request(), 5, 1e-6 * factor)[-1]
    assert 0.65 * 0.05 < seconds < 1.3 * 0.05


def test_resolution_passes_over_a_single_slow_frame() -> None:
    """One hiccup changes nothing, nor does a slow first frame for long."""
    resolution = Resolution()
    before = simulate(resolution, request(), 20, 1e-6)[-1][0]
    simulate(resolution, request(), 1, 2e-5)
    assert {size for size, _ in simulate(resolution, request(), 10, 1e-6)} == {before}
    resolution = Resolution()
    simulate(resolution, request(), 1, 1e-4)
    assert simulate(resolution, request(), 10, 1e-6)[-1][1] > 0.7 * 0.05


def test_resolution_rests() -> None:
    """From 16 accumulated frames the size stays, whatever they cost, until the view moves or more time is given."""
    resolution = Resolution()
    rested = simulate(resolution, request(), 20, 1e-6)[-1][0]
    for _ in range(10):
        assert resolution.size(request(), 16) == rested
        resolution.measure(*rested, 1.0)
    assert min(resolution.size(request(), 15)) < min(rested)
    resolution = Resolution()
    rested = simulate(resolution, request(), 20, 1e-6)[-1][0]
    assert resolution.size(request(seconds=0.2), 100)[0] > rested[0]


def test_resolution_keeps_its_limits() -> None:
    """The fixed size as it is; else between 64 px on the short side and the viewport, in the viewport's shape."""
    assert Resolution().size(request(size=(33, 77))) == (33, 77)
    for viewport in ((1280, 720), (720, 1280), (4096, 2160), (100, 65), (64, 64), (40, 30), (5000, 10), (1, 1), (0, 0)):
        shown = max(viewport[0], 1), max(viewport[1], 1)
        for cost in (1e-12, 1e-6, 1.0):
            resolution = Resolution()
            for size, _ in simulate(resolution, request(viewport=viewport), 12, cost):
                assert min(64, *shown) <= min(size) and size[0] <= shown[0] and size[1] <= shown[1]
                assert abs(size[0] * shown[1] - size[1] * shown[0]) <= 0.5 * (shown[0] + shown[1])
    resolution = Resolution()
    for bad in (math.nan, math.inf):
        resolution.measure(100, 100, bad)
    resolution.measure(0, 0, 1.0)
    assert resolution.predict(100, 100) == 0.0
    resolution.measure(100, 100, -1.0)
    assert resolution.size(request()) == SIZE


def test_resolution_follows_the_window() -> None:
    """A resized viewport has a picture of its shape at once, as large as its cost allows."""
    resolution = Resolution()
    simulate(resolution, request(), 10, 1e-6)
    width, height = resolution.size(request(viewport=(600, 600)), 50)
    assert width == height and 0.7 * 0.05 < 1e-6 * width * height < 1.05 * 0.05


def test_same_camera_compares_values() -> None:
    """All of them, exactly."""
    camera = some_cameras(1)[0]
    assert same_camera(camera, replace(camera, to_world=camera.to_world.copy()))
    for change in ({"fov": 41.0}, {"fov_axis": "y"}, {"aperture_radius": 0.5}, {"focus_distance": 9.0}):
        assert not same_camera(camera, replace(camera, **change))
    assert not same_camera(camera, replace(camera, to_world=np.nextafter(camera.to_world, 2.0)))
