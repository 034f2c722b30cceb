"""Animations on the host: tracks, nodes, skins and morphs against SciPy and loops; what a pose shares; bounds."""

from __future__ import annotations

import re
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.interpolate import CubicHermiteSpline
from scipy.spatial.transform import Rotation, Slerp
from small_scenes import floor, moved, rectangle

import nrc
from nrc.animation import (
    Animation,
    Deformation,
    Fixed,
    Gap,
    LookAt,
    Morph,
    Placement,
    Skin,
    Track,
    Trs,
    Turn,
    Value,
)
from nrc.assets.model import flatten, transform_mesh
from nrc.scene import (
    Camera,
    DirectionalLight,
    Environment,
    Instance,
    Material,
    Mesh,
    PointLight,
    Scene,
    SceneError,
    SpotLight,
)
from nrc.transforms import decompose, is_singular, look_at, rigid, trs, turn

EXACT = 1e-12  # rounding of a few operations in double precision
FLOAT32 = 1e-6  # rounding of values of order one in single precision
WHITE = Material(name="white", base_color=(1.0, 1.0, 1.0))
LAMP = Material(name="lamp", emission=(1.0, 1.0, 1.0))
CAMERA = Camera.look_at((0, 1, 5), (0, 0, 0))


def track(*keys: tuple[float, Any], **options: Any) -> Track:
    """Track from (time, value) pairs."""
    times, values = zip(*keys, strict=True)
    return Track(np.array(times, float), np.array(values, float), **options)


def random_quaternions(n: int, seed: int) -> np.ndarray:
    """Unit quaternions (n, 4)."""
    return Rotation.random(n, random_state=seed).as_quat()


# --- tracks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("interpolation", "expected"),
    [
        ("linear", [1, 1, 2, 3, 3.5, 5, 5]),
        ("step", [1, 1, 1, 3, 3, 5, 5]),
    ],
)
def test_track_holds_its_ends(interpolation, expected):
    """Values at, between and outside of keys 1, 3, 5 at 1, 2, 6 s."""
    values = track((1, 1), (2, 3), (6, 5), interpolation=interpolation)
    assert [float(values.at(t)) for t in (-1, 1, 1.5, 2, 3, 6, 9)] == expected
    assert values.end == 6.0 and Track.constant(3.0).end == 0.0 and float(Track.constant(3.0).at(7.0)) == 3.0


def test_cubic_track_is_a_hermite_spline():
    """Values with different slopes before and after a key follow SciPy's spline on each interval."""
    rng = np.random.default_rng(1)
    times, values, before, after = np.array([0.0, 0.5, 2.0]), *rng.standard_normal((3, 3, 4))
    cubic = Track(times, values, "cubic", (before, after))
    for i in range(2):
        spline = CubicHermiteSpline(times[i : i + 2], values[i : i + 2], np.stack([after[i], before[i + 1]]))
        for t in np.linspace(times[i], times[i + 1], 7):
            np.testing.assert_allclose(cubic.at(t), spline(t), atol=EXACT)
    np.testing.assert_array_equal(cubic.at(-3.0), values[0])
    np.testing.assert_array_equal(cubic.at(3.0), values[-1])


def test_smooth_track_passes_its_keys_and_keeps_parabolas():
    """Catmull-Rom through samples of a parabola at uneven times is that parabola; two keys are a line."""
    times = np.array([0.0, 0.3, 1.0, 1.2])
    smooth = Track.smooth(times, times**2 - times)
    for t in np.linspace(0.0, 1.2, 25):
        assert float(smooth.at(t)) == pytest.approx(t * t - t, abs=EXACT)
    line = Track.smooth(np.array([1.0, 3.0]), np.array([2.0, 6.0]))
    assert float(line.at(2.5)) == pytest.approx(5.0, abs=EXACT)
    assert float(Track.smooth(np.array([1.0]), np.array([2.0])).at(0.0)) == 2.0


def test_rotations_take_the_shorter_arc():
    """Linear quaternions are SciPy's Slerp, whatever their signs; equal and opposite neighbours stay finite."""
    quaternions = random_quaternions(6, 2) * np.array([1, -1, 1, -1, -1, 1])[:, None]
    times = np.array([0.0, 1.0, 1.5, 4.0, 5.0, 6.0])
    rotations = Track(times, quaternions, rotation=True)
    slerp = Slerp(times, Rotation.from_quat(quaternions))
    for t in np.linspace(0.0, 6.0, 61):
        np.testing.assert_allclose(Rotation.from_quat(rotations.at(t)).as_matrix(), slerp(t).as_matrix(), atol=1e-9)
    q = quaternions[0]
    for other in (q, -q, turn(np.array([0.0, 1.0, 0.0]), 1e-7)):
        value = track((0, q), (1, other), rotation=True).at(0.5)
        assert np.isfinite(value).all() and np.linalg.norm(value) == pytest.approx(1.0)


def test_cubic_rotations_have_length_one():
    """Normalised Hermite (glTF appendix C); the smooth track turns signs so that neighbours are near."""
    quaternions = random_quaternions(4, 3)
    times = np.arange(4.0)
    slopes = np.random.default_rng(3).standard_normal((2, 4, 4))
    cubic = Track(times, quaternions, "cubic", (slopes[0], slopes[1]), rotation=True)
    spline = CubicHermiteSpline(times[1:3], quaternions[1:3], np.stack([slopes[1][1], slopes[0][2]]))
    np.testing.assert_allclose(cubic.at(1.3), spline(1.3) / np.linalg.norm(spline(1.3)), atol=EXACT)
    turned = [turn(np.array([0.0, 0.0, 1.0]), angle) * sign for angle, sign in ((0, 1), (40, -1), (80, 1), (120, -1))]
    smooth = Track.smooth(times, np.array(turned), rotation=True)
    for t in np.linspace(0.0, 3.0, 13):
        np.testing.assert_allclose(np.abs(smooth.at(t) @ turn(np.array([0.0, 0.0, 1.0]), 40.0 * t)), 1.0, atol=1e-4)


def skinned(joint: int) -> Deformation:
    """A floor that hangs on one joint."""
    return Deformation(0, floor(), skin=Skin((joint,), np.eye(4)[None], np.zeros((4, 1), int), np.ones((4, 1))))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: track((0, 1), (0, 2)), "must increase"),
        (lambda: track((np.nan, 1)), "must increase"),
        (lambda: Track(np.zeros(0), np.zeros(0)), "at least one"),
        (lambda: Track(np.zeros(1), np.zeros(2)), "as many times as values"),
        (lambda: track((0, 1), interpolation="quadratic"), "linear, step, cubic"),
        (lambda: track((0, 1), interpolation="cubic"), "slopes"),
        (lambda: track((0, 1), (1, np.nan)), "must be finite"),
        (lambda: Track([0, 1], [1, 2], "cubic", ([0, 0], [0, np.inf])), "must be finite"),
        (lambda: Turn((0.0, 0.0, 0.0), track((0, 0), (1, 90))), "axis of a turn must have length 1"),
        (lambda: Placement("sky", 0, 0), "placement of 'sky'; one of instance, camera"),
        (lambda: Value("sky", 0, "scale", track((0, 1))), "value of 'sky'; one of camera"),
        (lambda: Animation((Fixed(np.eye(4), 0),), ()), "node 0 has parent 0"),
        (lambda: Animation((Trs(),), (Placement("camera", 0, 5),)), "camera 0 is moved by node 5 of 1"),
        (lambda: Animation((Trs(),), (Placement("camera", 0, 0, above=1),)), "camera 0 is moved by node 1 of 1"),
        (lambda: Animation((), (skinned(3),)), "mesh 0 is moved by node 3 of 0"),
    ],
)
def test_impossible_tracks_are_refused(make, message):
    """Each fault is one ValueError."""
    with pytest.raises(ValueError, match=message):
        make()


# --- transforms and nodes --------------------------------------------------------------------------------------------


def test_decompose_undoes_trs():
    """Translation, rotation and scale come back, reflections as a negative scale; shear and nothing are refused."""
    rng = np.random.default_rng(4)
    for i, quaternion in enumerate(random_quaternions(8, 5)):
        scale = rng.uniform(0.1, 3.0, 3) * (-1.0 if i % 2 else 1.0)
        matrix = trs(rng.standard_normal(3), quaternion, scale)
        np.testing.assert_allclose(matrix[:3, :3], Rotation.from_quat(quaternion).as_matrix() * scale, atol=EXACT)
        np.testing.assert_allclose(trs(*decompose(matrix)), matrix, atol=EXACT)
    sheared = np.eye(4)
    sheared[0, 1] = 0.5
    for matrix, message in ((sheared, "shear"), (np.diag([1.0, 0.0, 1.0, 1.0]), "singular")):
        with pytest.raises(ValueError, match=message):
            decompose(matrix)
    assert is_singular(np.zeros((4, 4))) and not is_singular(np.diag([1e-9, 1e-9, 1e-9, 1.0]))


@pytest.mark.parametrize(
    "scale", [(2.0, 2.0, 2.0), (1e-9, 1e-9, 1e-9), (-1.0, 3.0, 0.5), (1, 1, 0), (1, 0, 1), (0, 0, 0)]
)
def test_rigid_is_a_rotation(scale):
    """Of every matrix, also one that a scale of 0 makes singular, so that a camera below it has axes; -z is kept."""
    quaternion = random_quaternions(1, 6)[0]
    matrix = rigid(trs(np.array([1.0, 2.0, 3.0]), quaternion, np.array(scale)))
    axes = matrix[:3, :3]
    np.testing.assert_allclose(axes.T @ axes, np.eye(3), atol=EXACT)
    assert np.linalg.det(axes) > 0.0 and matrix[:3, 3].tolist() == [1.0, 2.0, 3.0]
    if scale[2] != 0.0:
        np.testing.assert_allclose(axes[:, 2], Rotation.from_quat(quaternion).as_matrix()[:, 2], atol=EXACT)


def test_nodes_compose_from_the_root():
    """A child's matrix applies before its parent's, at each time."""
    nodes = (
        Trs(translation=track((0, (0, 0, 0)), (2, (4, 0, 0)))),
        Trs(rotation=Turn((0.0, 1.0, 0.0), track((0, 0), (2, 720))), parent=0),
        Fixed(moved((1, 0, 0)), parent=1),
    )
    animation = Animation(nodes, ())
    assert animation.duration == 2.0
    for time, expected in ((0.0, (1, 0, 0)), (0.25, (0.5, 0, -1)), (0.5, (0, 0, 0)), (2.0, (5, 0, 0))):
        np.testing.assert_allclose(animation.worlds(time)[2][:3, 3], expected, atol=EXACT)


def test_hinge_keeps_its_axis_and_the_doors_width():
    """A door that turns on its hinge stays rigid, and the hinge where it is."""
    mesh = rectangle(0, (0.5, 1, 0), (0.5, 0, 0), (0, 1, 0))
    door = (Trs(Track.constant((2, 0, 3)), Turn((0.0, 1.0, 0.0), track((0, 0), (1, 90), interpolation="linear"))),)
    scene = Scene((mesh,), (WHITE,), CAMERA, instances=(Instance(0, np.eye(4)),))
    animation = Animation(door, (Placement("instance", 0, 0),))
    for time in np.linspace(0.0, 1.0, 9):
        corners = flatten(animation.pose(scene, time)).meshes[0].positions.astype(float)
        angle = np.radians(90.0 * time)
        expected = np.array([2, 0, 3]) + np.outer(mesh.positions[:, 0], (np.cos(angle), 0, -np.sin(angle)))
        expected[:, 1] = mesh.positions[:, 1]
        np.testing.assert_allclose(corners, expected, atol=FLOAT32)


def test_look_at_turns_z_to_the_target():
    """Also where up says nothing."""
    node = LookAt(track((0, (0, 0, 0)), (1, (0, 2, 0))), Track.constant((0, 5, 0)), up=(0.0, 1.0, 0.0))
    matrix = node.matrix(0.5)
    np.testing.assert_allclose(matrix[:3, 2], (0, 1, 0), atol=EXACT)
    np.testing.assert_allclose(matrix[:3, 3], (0, 1, 0), atol=EXACT)
    np.testing.assert_allclose(matrix[:3, :3] @ matrix[:3, :3].T, np.eye(3), atol=EXACT)
    assert np.linalg.det(look_at(np.zeros(3), np.array([1.0, 2, 3]), np.array([0.0, 1, 0]))) == pytest.approx(1.0)


# --- poses -----------------------------------------------------------------------------------------------------------


def test_pose_moves_every_kind_of_object():
    """Instances, camera, lights and environment follow nodes; colours and numbers follow tracks, kept in range."""
    node = Trs(
        track((0, (0, 0, 0)), (1, (2, 0, 0))), Turn((0.0, 1.0, 0.0), track((0, 0), (1, 90))), Track.constant((3, 3, 3))
    )
    scene = Scene(
        (floor(),),
        (WHITE, LAMP),
        CAMERA,
        (
            PointLight((9, 9, 9), (1, 1, 1)),
            SpotLight((0, 0, 0), (0, 0, -1), (1, 1, 1), 0.1, 0.2),
            DirectionalLight((0, -1, 0), (1, 1, 1)),
        ),
        Environment.constant((1, 1, 1)),
        instances=(Instance(0, np.eye(4)),),
    )
    swinging = Track.smooth(np.array([0.0, 1.0, 2.0, 3.0]), np.array([[5.0] * 3, [0.0] * 3, [0.0] * 3, [5.0] * 3]))
    parts = (
        Placement("instance", 0, 0, moved((1, 0, 0))),
        Placement("camera", 0, 0),
        *(Placement("light", i, 0) for i in range(3)),
        Placement("environment", 0, 0),
        Value("material", 1, "emission", swinging),
        Value("light", 0, "intensity", track((0, (1, 2, 3)), (1, (3, 2, 1)))),
        Value("camera", 0, "fov", track((0, 30), (1, 50))),
        Value(
            "camera", 0, "focus_distance", Gap(Track.constant((0, 0, 0)), track((0, (3, 4, 0)), (1, (6, 8, 0))), True)
        ),
        Value("environment", 0, "scale", track((0, 1), (1, 3))),
        Value("light", 2, "irradiance", track((0, (0, 0, 0)), (1, (4, 4, 4)))),
    )
    posed = Animation((node,), parts).pose(scene, 1.0)
    # scaled by 3, turned so that -z is -x and x is -z, moved by (2, 0, 0)
    np.testing.assert_allclose(posed.instances[0].to_world @ (0, 0, 0, 1), (2, 0, -3, 1), atol=EXACT)
    np.testing.assert_allclose(posed.camera.to_world[:, 2], (1, 0, 0, 0), atol=EXACT)
    np.testing.assert_allclose(np.linalg.det(posed.camera.to_world), 1.0)
    point, spot, sun = posed.lights
    assert isinstance(point, PointLight) and isinstance(spot, SpotLight) and isinstance(sun, DirectionalLight)
    assert point.position == (2.0, 0.0, 0.0) and point.intensity == (3.0, 2.0, 1.0)
    np.testing.assert_allclose(spot.direction, (-1, 0, 0), atol=EXACT)
    np.testing.assert_allclose(sun.direction, (-1, 0, 0), atol=EXACT)
    assert spot.outer_angle == 0.2 and sun.irradiance == (4.0, 4.0, 4.0)
    assert posed.camera.fov == 50.0 and posed.camera.focus_distance == 10.0
    assert posed.environment is not None and posed.environment.scale == 3.0
    np.testing.assert_allclose(posed.environment.to_world @ (0, 0, -1), (-1, 0, 0), atol=EXACT)
    below = Animation((node,), parts).pose(scene, 1.5)  # where the spline swings below 0
    assert float(swinging.at(1.5)[0]) < 0.0 and below.materials[1].emission == (0.0, 0.0, 0.0)


def test_pose_shares_what_stands_still():
    """Objects with the values of the scene or of the last pose are these objects; equal times are one scene."""
    meshes = (floor(), floor(1))
    scene = Scene(
        meshes,
        (WHITE, LAMP),
        CAMERA,
        (PointLight((0, 1, 0), (1, 1, 1)),),
        Environment.constant((1, 1, 1)),
        instances=(Instance(0, np.eye(4)), Instance(0, moved((3, 0, 0)))),
    )
    morph = Morph(track((0, [0.0]), (1, [1.0])), np.ones((1, 4, 3), np.float32))
    animation = Animation(
        (Trs(track((0, (0, 0, 0)), (1, (1, 0, 0)))),),
        (
            Placement("instance", 1, 0, moved((3, 0, 0))),
            Deformation(1, meshes[1], morph),
            Value("material", 1, "emission", track((0, (1, 1, 1)), (4, (1, 1, 1)), (5, (2, 2, 2)))),
        ),
    )
    scene = replace(scene, animation=animation)
    assert scene.at(0.0) is scene
    half, again = scene.at(0.5), scene.at(0.5)
    assert half is again and half.animation is animation
    assert half.instances[0] is scene.instances[0] and half.instances[1] is not scene.instances[1]
    assert half.meshes[0] is meshes[0] and half.meshes[1].indices is meshes[1].indices
    np.testing.assert_allclose(half.meshes[1].positions, meshes[1].positions + 0.5)
    assert half.materials is scene.materials and half.camera is scene.camera and half.lights is scene.lights
    assert half.environment is scene.environment
    one, two = scene.at(1.0), scene.at(2.0)  # past the end of all but the emission
    assert one is two
    late = scene.at(5.0)
    assert late.meshes is one.meshes and late.instances is one.instances and late.materials[0] is scene.materials[0]
    # pure functions of the time, also of a pose and after other times
    for other in (scene.at(0.5), late.at(0.5), replace(scene, animation=replace(animation)).at(0.5)):
        np.testing.assert_array_equal(other.meshes[1].positions, half.meshes[1].positions)
        np.testing.assert_array_equal(other.instances[1].to_world, half.instances[1].to_world)


def test_pose_of_a_changed_scene_keeps_the_change():
    """Another colour of a material whose emission moves stays."""
    animation = Animation((), (Value("material", 0, "emission", track((0, (1, 1, 1)), (1, (2, 2, 2)))),))
    scene = Scene((floor(),), (LAMP,), CAMERA, animation=animation)
    scene.at(0.3)
    red = replace(scene, materials=(replace(LAMP, base_color=(1.0, 0.0, 0.0)),))
    assert red.at(0.3).materials[0].base_color == (1.0, 0.0, 0.0)
    assert red.at(0.3).materials[0].emission == scene.at(0.3).materials[0].emission
    assert scene.at(0.3).materials[0].emission == pytest.approx((1.3, 1.3, 1.3))


def test_pose_refuses_another_scene():
    """What is not there is named."""
    for part, message in (
        (Placement("instance", 2, 0), "instance 2, scene '' has 0"),
        (Value("environment", 0, "scale", track((0, 1), (1, 2))), "environment 0"),
        (Value("camera", 0, "fovv", track((0, 30))), r"camera 0 \(Camera\) has no number or colour 'fovv'"),
        (Value("camera", 0, "fov_axis", track((0, 30))), "no number or colour 'fov_axis'"),
        (Value("material", 0, "roughness", track((0, (0, 0)))), "no number or colour 'roughness'"),
        (Value("camera", 0, "fov", track((0, (1, 2, 3)))), "fov is a number, its curve gives three numbers"),
        (Value("material", 0, "emission", track((0, 1))), "emission is three numbers, its curve gives a number"),
    ):
        with pytest.raises(SceneError, match=message):
            Scene((floor(),), (WHITE,), CAMERA, animation=Animation((Trs(),), (part,))).at(0.0)


def test_pose_refuses_what_is_no_time():
    """NaN is no moment; infinity is the end, as every time after it."""
    parts = (Value("camera", 0, "fov", Track([0, 1], [30, 50])),)  # lists do
    scene = Scene((floor(),), (WHITE,), CAMERA, animation=Animation((), parts))
    assert scene.at(np.inf).camera.fov == 50.0 and scene.at(0.5).camera.fov == 40.0
    with pytest.raises(ValueError, match="number of seconds, got nan"):
        scene.at(np.nan)


def test_example_of_the_documentation_dims_the_lamp():
    """The code under "From Python" in docs/animation.md runs as it stands there, and the lamp ends at a tenth."""
    text = (Path(__file__).resolve().parent.parent / "docs" / "animation.md").read_text()
    (block,) = [part for part in re.findall(r"(?:^    .*\n|^\n)+", text, re.MULTILINE) if "dim = " in part]
    names: dict[str, Any] = {"scene": nrc.load("opening_door")}
    before = names["scene"].materials
    exec(textwrap.dedent(block), names)
    after, lamp = names["scene"].at(5.0).materials, names["lamp"]
    assert after[lamp].emission == pytest.approx([0.1 * value for value in before[lamp].emission])
    assert names["scene"].animation.duration == 5.0


def test_bounds_cover_the_motion():
    """The box around all sampled poses: a rod of length 1 that turns about y, and rises in the end."""
    rod = rectangle(0, (0.5, 0, 0), (0.5, 0, 0), (0, 0.01, 0))
    node = Trs(track((3, (0, 0, 0)), (4, (0, 1, 0))), Turn((0.0, 1.0, 0.0), track((0, 0), (4, 360))))
    scene = Scene((rod,), (WHITE,), CAMERA, instances=(Instance(0, np.eye(4)),))
    lower, upper = Animation((node,), (Placement("instance", 0, 0),)).bounds(scene)
    np.testing.assert_allclose(lower, (-1, -0.01, -1), atol=FLOAT32)
    np.testing.assert_allclose(upper, (1, 1.01, 1), atol=FLOAT32)


# --- deformation -----------------------------------------------------------------------------------------------------


def random_mesh(n: int, seed: int) -> Mesh:
    """A mesh with every attribute."""
    rng = np.random.default_rng(seed)
    normals, tangents = rng.standard_normal((2, n, 3))
    normals /= np.linalg.norm(normals, axis=1, keepdims=True)
    tangents /= np.linalg.norm(tangents, axis=1, keepdims=True)
    return Mesh(
        rng.standard_normal((n, 3)).astype(np.float32),
        rng.integers(0, n, (n, 3)).astype(np.int32),
        0,
        normals=normals.astype(np.float32),
        tangents=np.column_stack([tangents, rng.choice([-1.0, 1.0], n)]).astype(np.float32),
        uv0=rng.random((n, 2)).astype(np.float32),
        colors=rng.random((n, 4)).astype(np.float32),
    )


def length_one(v: np.ndarray) -> np.ndarray:
    """The vector at length 1."""
    return v / np.linalg.norm(v)


def test_morphed_and_skinned_mesh_follows_a_loop_over_vertices():
    """Morph targets first, then the blend of joint matrices; normals by its inverse transpose; the rest is shared."""
    rng = np.random.default_rng(6)
    n, n_joints = 40, 5
    mesh = random_mesh(n, 7)
    nodes = [
        Trs(
            track((0, rng.standard_normal(3)), (1, rng.standard_normal(3))),
            Track(np.array([0.0, 1.0]), random_quaternions(2, 10 + i), rotation=True),
            track((0, rng.uniform(0.5, 2.0, 3)), (1, rng.uniform(0.5, 2.0, 3))),
            parent=i - 1,
        )
        for i in range(n_joints)
    ]
    inverse = np.stack([trs(rng.standard_normal(3), q, np.ones(3)) for q in random_quaternions(n_joints, 20)])
    which = rng.integers(0, n_joints, (n, 8))
    weights = rng.random((n, 8)) * (rng.random((n, 8)) < 0.6)
    weights[0] = 0.0  # follows its first joint
    changes = rng.standard_normal((3, 2, n, 3)).astype(np.float32)
    weight_track = track((0, (0.0, 1.0)), (1, (2.0, -0.5)))
    deformation = Deformation(
        0, mesh, Morph(weight_track, *changes), Skin(tuple(range(n_joints)), inverse, which, weights)
    )
    animation = Animation(tuple(nodes), (deformation,))
    scene = Scene((mesh,), (WHITE,), CAMERA, instances=(Instance(0, np.eye(4)),), animation=animation)
    posed = scene.at(0.37).meshes[0]
    assert posed.normals is not None and posed.tangents is not None and mesh.normals is not None
    assert posed.indices is mesh.indices and posed.uv0 is mesh.uv0 and posed.colors is mesh.colors
    worlds = []
    for node in nodes:
        matrix = node.matrix(0.37)
        worlds.append(worlds[node.parent] @ matrix if worlds else matrix)
    shares = weight_track.at(0.37)
    assert mesh.tangents is not None
    for v in range(n):
        p, normal, tangent = (
            base[v, :3].astype(float) + sum(shares[k] * changes[which_one, k, v] for k in range(2))
            for which_one, base in enumerate((mesh.positions, mesh.normals, mesh.tangents))
        )
        total = weights[v].sum()
        blend = worlds[which[v, 0]] @ inverse[which[v, 0]] if total == 0.0 else np.zeros((4, 4))
        for j, weight in zip(which[v], weights[v], strict=True):
            if total > 0.0:
                blend = blend + weight / total * (worlds[j] @ inverse[j])
        linear = blend[:3, :3]
        np.testing.assert_allclose(posed.positions[v], linear @ p + blend[:3, 3], atol=1e-5)
        side = np.sign(np.linalg.det(linear))  # a blend may turn inside out; its cofactors keep the winding's side
        expected = length_one(side * np.linalg.inv(linear).T @ normal)
        np.testing.assert_allclose(posed.normals[v], expected, atol=1e-4)
        np.testing.assert_allclose(posed.tangents[v, :3], length_one(linear @ tangent), atol=1e-4)
        assert posed.tangents[v, 3] == mesh.tangents[v, 3]


def test_rigid_skin_is_a_moved_mesh():
    """All weight on one joint gives `transform_mesh`, normals and tangents included."""
    mesh = random_mesh(12, 8)
    joint = Trs(track((0, (0, 0, 0)), (1, (1, 2, 3))), Turn((0.0, 1.0, 0.0), track((0, 0), (1, 70))))
    skin = Skin((0,), np.eye(4)[None], np.zeros((12, 4), int), np.tile([1.0, 0, 0, 0], (12, 1)))
    scene = Scene((mesh,), (WHITE,), CAMERA, animation=Animation((joint,), (Deformation(0, mesh, None, skin),)))
    posed, expected = scene.at(0.6).meshes[0], transform_mesh(mesh, joint.matrix(0.6))
    for name in ("positions", "normals", "tangents"):
        np.testing.assert_allclose(getattr(posed, name), getattr(expected, name), atol=FLOAT32)


# --- flattening ------------------------------------------------------------------------------------------------------


def test_flatten_makes_meshes_of_instances():
    """Loose meshes first, then each instance; singular ones vanish; mirrored fronts stay in front."""
    scene = Scene(
        (floor(), floor(1)),
        (WHITE, LAMP),
        CAMERA,
        instances=(
            Instance(1, moved((0, 2, 0)), "up"),
            Instance(1, np.diag([1.0, 0.0, 1.0, 1.0])),
            Instance(1, np.diag([-1.0, 1.0, 1.0, 1.0])),
        ),
    )
    flat = flatten(scene)
    assert [mesh.name for mesh in flat.meshes] == ["", "up", ""] and flat.instances == () and flat.animation is None
    np.testing.assert_array_equal(flat.meshes[1].positions[:, 1], 2.0)
    a, b, c = flat.meshes[2].positions[flat.meshes[2].indices[0]]
    assert np.cross(b - a, c - a)[1] > 0.0
    assert flatten(flat) is flat
    with pytest.raises(SceneError, match="no triangles"):
        flatten(
            replace(scene, meshes=scene.meshes[:1], instances=(Instance(0, np.zeros((4, 4)) + np.diag([0, 0, 0, 1])),))
        )
