"""Fitting signed distances: exact distances and sides, what batches are made of, resuming, measures and pictures."""

import numpy as np
import pytest
import trimesh
import warp as wp

import nrc.launch
from nrc.field import Field
from nrc.fit import sdf
from nrc.fit.mesh_distance import NOISE, MeshDistance
from nrc.fit.sdf import SdfTask, draw, evaluate_snapshot
from nrc.fit.sdf_render import BACKGROUND, IN_FRONT, SdfRenderer, Slice
from nrc.fit.surface import SurfaceError, read_surface
from nrc.image import read_image
from nrc.kernels import sdf as kernels
from nrc.scene import Camera
from nrc.snapshot import SnapshotError

CPU = wp.get_device("cpu")
GRID = {"n_levels": 5, "log2_hashmap_size": 13}
CONFIG = {
    "optimizer": {
        "otype": "Ema",
        "decay": 0.95,
        "nested": {
            "otype": "ExponentialDecay",
            "decay_start": 150,
            "decay_interval": 50,
            "decay_base": 0.33,
            "nested": {"otype": "Adam", "learning_rate": 2e-3, "beta2": 0.99, "epsilon": 1e-15},
        },
    },
    "encoding": {"otype": "HashGrid", "base_resolution": 8, "per_level_scale": 1.6},
}
SIDES = np.array([2.0, 1.0, 0.5])  # of the box, in its file
ROUNDING = 5e-7  # of float32 coordinates up to 7, scaled by 0.45


@pytest.fixture(scope="module")
def meshes(tmp_path_factory):
    """Folder of small meshes."""
    folder = tmp_path_factory.mktemp("meshes")
    trimesh.creation.box(SIDES).apply_translation((3.0, -1.0, 7.0)).export(folder / "box.ply")
    ball = trimesh.creation.icosphere(3)
    ball.export(folder / "ball.ply")
    trimesh.Trimesh(ball.vertices, ball.faces[:, ::-1], process=False).export(folder / "inverted.ply")
    bowl = trimesh.Trimesh(ball.vertices, ball.faces[ball.triangles_center[:, 1] < 0.7])
    bowl.export(folder / "bowl.ply")
    other = ball.copy().apply_translation((0.9, 0.3, 0.2))
    trimesh.util.concatenate([ball, other]).export(folder / "pair.ply")
    square = trimesh.Trimesh([[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]], [[0, 1, 2], [0, 2, 3]])
    square.export(folder / "square.ply")
    both = trimesh.Trimesh(square.vertices, np.concatenate([square.faces, square.faces[:, ::-1]]), process=False)
    both.export(folder / "twosided.ply")
    return folder


@pytest.fixture(scope="module")
def trained(meshes):
    """A task that has learned the ball."""
    task = make_task(meshes / "ball.ply", batch_size=4096)
    for _ in range(300):
        task.step()
    return task


def make_task(path, *, batch_size=1024, seed=5):
    """A small task on the CPU."""
    return SdfTask(path, seed=seed, device="cpu", config=CONFIG, grid=GRID, batch_size=batch_size)


def box_distance(points, target):
    """Closed form of the signed distance to the box, in the cube."""
    q = np.abs(points.astype(np.float64) - 0.5) - 0.5 * SIDES * target.scale
    return np.linalg.norm(np.maximum(q, 0.0), axis=1) + np.minimum(q.max(axis=1), 0.0)


def winding_number(points, triangles):
    """Sum of the solid angles of (m, 3, 3) triangles over 4 pi (van Oosterom and Strackee 1983)."""
    result = np.empty(len(points))
    for i, p in enumerate(points.astype(np.float64)):
        a, b, c = (triangles - p).transpose(1, 0, 2)
        la, lb, lc = (np.linalg.norm(v, axis=1) for v in (a, b, c))
        det = np.einsum("ij,ij->i", a, np.cross(b, c))
        dot = [np.einsum("ij,ij->i", u, v) for u, v in ((a, b), (b, c), (c, a))]
        below = la * lb * lc + dot[0] * lc + dot[1] * la + dot[2] * lb
        result[i] = np.sum(2.0 * np.arctan2(det, below)) / (4.0 * np.pi)
    return result


def test_distances_to_a_box_are_exact(meshes):
    """Uniform points in the box's own box have the closed form's distances and signs."""
    target = MeshDistance(meshes / "box.ply", CPU)
    x, distance = (array.numpy() for array in target.uniform(4096, 0))
    np.testing.assert_allclose(distance, box_distance(x, target), atol=ROUNDING)
    np.testing.assert_allclose((target.lower, target.upper), (x.min(axis=0), x.max(axis=0)), atol=3e-3)
    np.testing.assert_allclose(target.upper - target.lower, SIDES * target.scale + 0.1, rtol=1e-6)
    assert target.warnings == []
    low = target.scale * (np.array([3.0, -1.0, 7.0]) - 0.5 * SIDES) + target.offset
    np.testing.assert_allclose(low, target.lower + 0.05, atol=1e-6)


@pytest.mark.parametrize("name", ["ball", "bowl", "pair", "inverted"])
def test_sides_are_those_of_the_exact_winding_number(name, meshes):
    """Closed, open, self-intersecting and inverted meshes: the sign is that of the sum of all solid angles."""
    target = MeshDistance(meshes / f"{name}.ply", CPU)
    x, distance = (array.numpy() for array in target.uniform(1000, 1))
    cube = target.to_cube()
    exact = winding_number(x, cube.vertices[cube.faces].astype(np.float64))
    # The fast sum treats far clusters as one; only where the exact one is close to 1/2 may that matter
    certain = np.abs(exact - 0.5) > 0.01
    assert certain.mean() > 0.97
    np.testing.assert_array_equal((distance < 0.0)[certain], (exact > 0.5)[certain])
    assert 0.1 < (distance < 0.0).mean() < 0.9


@pytest.mark.parametrize(("name", "fast"), [("ball", 1), ("box", 1), ("bowl", 0), ("pair", 0)])
def test_the_fast_sign_is_taken_only_where_it_is_right(name, fast, meshes):
    """Normals tell the side of closed simple meshes; holes and self-intersections leave it to the winding number."""
    assert MeshDistance(meshes / f"{name}.ply", CPU).view.normals_tell_sides == fast


@pytest.mark.realdata
@pytest.mark.parametrize("name", ["armadillo", "bunny_watertight"])
def test_sides_of_scanned_meshes_are_exact(name, data):
    """On scans of 70 000 to 100 000 triangles the sign is that of the exact winding number, near the surface too."""
    path = data / "sdf" / f"{name}.obj"
    if not path.is_file():
        pytest.skip(f"{path} is missing")
    target = MeshDistance(path, CPU)
    noise = NOISE * target.radius
    rng = np.random.default_rng(3)
    cube = target.to_cube()
    on_surface = centres(cube, 30, rng) + rng.normal(0.0, noise, (30, 3))
    x = np.concatenate([target.uniform(15, 2)[0].numpy(), on_surface]).astype(np.float32)
    exact = winding_number(x, cube.vertices[cube.faces].astype(np.float64))
    np.testing.assert_allclose(exact, np.round(exact), atol=1e-3)  # closed: whole numbers
    np.testing.assert_array_equal(target.distances(x) < 0.0, exact > 0.5)


def centres(surface, n, rng):
    """Centres of random triangles."""
    return surface.vertices[surface.faces[rng.integers(0, len(surface.faces), n)]].mean(axis=1)


def test_batches_are_mixed_as_the_paper_says(meshes):
    """An eighth is uniform, a half on the surface by area, the rest near it with the stated spread; all exact."""
    task = make_task(meshes / "box.ply", batch_size=1 << 15)
    task.step()
    x, y = task._x.numpy(), task._y.numpy()[:, 0]
    n = len(x)
    exact = box_distance(x, task.target)
    np.testing.assert_allclose(y, exact, atol=ROUNDING)
    uniform, on, near = np.split(np.arange(n), [n // 8, n * 5 // 8])
    assert (y[on] == 0.0).all()
    assert (np.abs(exact[uniform]) > 0.01).mean() > 0.5
    np.testing.assert_allclose(x[uniform].mean(axis=0), 0.5, atol=0.02)
    np.testing.assert_allclose(x[uniform].std(axis=0), np.sqrt(1 / 12), atol=0.01)
    # Areas of the three pairs of sides; the points are stratified, so their shares are all but exact
    areas = np.array([SIDES[1] * SIDES[2], SIDES[0] * SIDES[2], SIDES[0] * SIDES[1]])
    side = np.abs(np.abs(x[on] - 0.5) - 0.5 * SIDES * task.target.scale).argmin(axis=1)
    np.testing.assert_allclose(np.bincount(side) / len(on), areas / areas.sum(), atol=2e-3)
    deviation = task.target.radius / 1024
    np.testing.assert_allclose(y[near].std(), deviation, rtol=0.05)
    kurtosis = np.mean(y[near] ** 4) / np.mean(y[near] ** 2) ** 2
    assert 3.6 < kurtosis < 5.0  # 4.2 for the logistic distribution, 3 for the normal one
    assert (y[near] < 0.0).mean() == pytest.approx(0.5, abs=0.02)


def test_uniform_points_are_pooled(meshes, monkeypatch):
    """A pass over the pool renews it, the next ones use it again, on a schedule of steps alone."""
    monkeypatch.setattr(sdf, "POOL_BATCHES", 3)
    monkeypatch.setattr(sdf, "POOL_USES", 2)
    task = make_task(meshes / "box.ply", batch_size=256)
    seen = []
    for _ in range(9):
        task.step()
        seen.append(task._x.numpy()[:32].tobytes())
    assert seen[3:6] == seen[0:3]
    assert len(set(seen)) == 6


def test_same_seed_same_training(meshes, monkeypatch):
    """The same bits with one thread and with two, and after moving the state into a new task; another seed differs."""
    monkeypatch.setattr(sdf, "POOL_BATCHES", 3)
    monkeypatch.setattr(sdf, "POOL_USES", 2)
    path = meshes / "ball.ply"
    states = []
    for n_threads in (1, 2):
        nrc.launch.set_threads(n_threads)
        try:
            task = make_task(path)
            for _ in range(8):
                task.step()
            states.append(task.state())
        finally:
            nrc.launch.set_threads(0)
    first, resumed = make_task(path), make_task(path)
    for _ in range(5):
        first.step()
    kept = {name: array.copy() for name, array in first.state().items()}
    resumed.load_state("a.safetensors", kept)
    assert resumed.n_steps == 5
    for _ in range(3):
        resumed.step()
    states.append(resumed.state())
    for state in states[1:]:
        assert state.keys() == states[0].keys()
        for name, array in states[0].items():
            if name != "counters":  # whose first and second entries are scratch
                np.testing.assert_array_equal(state[name], array, err_msg=name)
    assert states[0]["counters"][2] == states[2]["counters"][2] == 8
    other = make_task(path, seed=6)
    for _ in range(8):
        other.step()
    assert (other.state()["pool_distance"] != states[0]["pool_distance"]).any()
    assert other.identity() != task.identity()


def test_identity_covers_triangles_in_other_files(tmp_path):
    """A glTF file names the file of its triangles: other triangles there are another mesh."""
    digests = []
    for size in (1.0, 2.0):
        files = trimesh.creation.box((size, 1.0, 1.0)).export(file_type="gltf")
        for name, content in files.items():
            if not (name == "model.gltf" and digests):
                (tmp_path / name).write_bytes(content)
        digests.append(make_task(tmp_path / "model.gltf").identity()["sha256"])
    assert digests[0] != digests[1]


def test_broken_states_are_refused(meshes):
    """A missing array, one of another size, one with NaN: the message names it, and nothing changes."""
    task = make_task(meshes / "ball.ply", batch_size=256)
    task.step()
    before = {name: array.copy() for name, array in task.state().items()}
    for name, array in (
        ("pool_x", None),
        ("pool_distance", before["pool_distance"][1:]),
        ("params", np.full_like(before["params"], np.nan)),
        ("task.n_steps", np.array([-1], np.int64)),
    ):
        broken = dict(before)
        del broken[name]
        if array is not None:
            broken[name] = array
        with pytest.raises(SnapshotError, match=rf"c\.safetensors: {name}"):
            task.load_state("c.safetensors", broken)
    for name, array in task.state().items():
        np.testing.assert_array_equal(array, before[name])


def test_training_learns_the_ball(trained, monkeypatch):
    """Overlap, distances, extracted surface agree with the mesh after a few seconds."""
    monkeypatch.setattr(sdf, "N_EVALUATE", 1 << 15)
    monkeypatch.setattr(sdf, "N_COMPARED", 1 << 12)
    monkeypatch.setattr(sdf, "RESOLUTION", 64)
    assert trained.progress()["iou"] > 0.98
    found = trained.evaluate()
    assert found["iou"] > 0.98
    assert found["mae"] < 0.01 and found["chamfer"] < 0.003
    surface = trained.surface(64)  # in the file's coordinates: a unit ball
    np.testing.assert_allclose(np.linalg.norm(surface.vertices, axis=1), 1.0, atol=0.03)


def test_noise_has_no_surface_to_measure(meshes, tmp_path, monkeypatch):
    """An untrained field, whose zero level is noise, is measured without a surface; its pictures are drawn."""
    monkeypatch.setattr(sdf, "N_EVALUATE", 1 << 12)
    monkeypatch.setattr(sdf, "PICTURE_SIZE", 64)
    task = make_task(meshes / "ball.ply", batch_size=256)
    found = task.evaluate()
    assert found["iou"] < 0.9 and found["chamfer"] is None and found["mesh_iou"] is None
    assert set(task.pictures(tmp_path)) == {"shading", "normals"}


def test_measured_points_are_not_trainings(meshes):
    """Progress, evaluation and training draw three different sets of points."""
    target = MeshDistance(meshes / "ball.ply", CPU, 5)
    sets = [target.uniform(64, sample)[0].numpy() for sample in (0, sdf.PROGRESS_SAMPLE, sdf.EVALUATE_SAMPLE)]
    for i in range(3):
        assert not np.isin(sets[i], sets[i - 1]).all(axis=1).any()


def test_snapshot_is_a_field_and_measures_the_same(trained, meshes, tmp_path, monkeypatch):
    """What is saved is the average, readable as a field, with the task's own measures; another mesh is refused."""
    monkeypatch.setattr(sdf, "N_EVALUATE", 1 << 14)
    monkeypatch.setattr(sdf, "N_COMPARED", 1 << 12)
    monkeypatch.setattr(sdf, "RESOLUTION", 32)
    path = tmp_path / "ball.safetensors"
    trained.save(path, {"seconds": 1.5, "steps": trained.n_steps})
    field = Field.load(path, "cpu")
    np.testing.assert_array_equal(field.params.numpy(), trained.trainer.ema_params.numpy())
    here, there = trained.evaluate(), evaluate_snapshot(path, device="cpu")
    assert there.keys() == here.keys() == {"iou", "mae", "chamfer", "mesh_iou"}
    assert there == here
    copy = tmp_path / "moved.ply"
    copy.write_bytes((meshes / "ball.ply").read_bytes())
    assert evaluate_snapshot(path, source=copy, device="cpu") == there
    with pytest.raises(SnapshotError, match="another mesh"):
        evaluate_snapshot(path, source=meshes / "box.ply", device="cpu")
    field.save(tmp_path / "plain.safetensors")
    with pytest.raises(SnapshotError, match="not the snapshot of a signed distance"):
        evaluate_snapshot(tmp_path / "plain.safetensors", device="cpu")


def test_pictures_show_the_ball(trained, tmp_path, monkeypatch):
    """The silhouette has the closed form's place, the normals are the sphere's, and both files are written."""
    size, target = 96, trained.target
    direction = np.array([0.3, 0.2, 1.0])
    shading, normals = draw(
        trained.field, trained.trainer.ema_params, target.lower, target.upper, size=size, direction=tuple(direction)
    )
    box = np.stack(np.meshgrid(*zip(target.lower, target.upper, strict=True)), axis=-1).reshape(-1, 3)
    back = direction / np.linalg.norm(direction)
    camera = sdf.framing_camera(direction, box)
    eye, tangent = camera.to_world[:3, 3], np.tan(np.radians(15.0))
    right, up = tangent * camera.to_world[:3, 0], tangent * camera.to_world[:3, 1]
    at = (np.arange(size) + 0.5) / size * 2.0 - 1.0
    d = -back + at[None, :, None] * right - at[:, None, None] * up
    d /= np.linalg.norm(d, axis=2, keepdims=True)
    o, radius = eye - 0.5, 0.45
    b = d @ o
    discriminant = b * b - (o @ o - radius**2)
    hit = discriminant > 0.0
    drawn = (normals != 255).any(axis=2)
    assert (drawn != hit).mean() < 0.03  # pixels along the outline
    n = (o + (-b - np.sqrt(np.maximum(discriminant, 0.0)))[:, :, None] * d) / radius
    found = (normals.astype(float) - 127.5) / 127.5
    cosine = np.sum(n * found, axis=2)[drawn & hit]
    assert np.median(cosine) > 0.95
    assert shading.shape == (size, size, 3) and np.isfinite(shading).all()
    assert shading[drawn].std() > 0.05
    monkeypatch.setattr(sdf, "RESOLUTION", 32)
    monkeypatch.setattr(sdf, "PICTURE_SIZE", 64)
    files = trained.pictures(tmp_path)
    assert set(files) == {"shading", "normals", "mesh"}
    ball = read_surface(files["mesh"])
    assert ball.volume == pytest.approx(4 / 3 * np.pi, rel=0.03)
    assert not any("not closed" in warning for warning in ball.warnings)
    assert read_image(files["shading"]).shape == read_image(files["normals"]).shape == (64, 64, 3)


class BallField:
    """Stands for a `Field`: the exact distance to a ball in the middle of the cube."""

    def __init__(self, radius):
        self.radius, self.device = radius, CPU

    def inference(self, x, out=None, *, params=None, count=None):
        """Rows of the distance; all of them, whatever the count."""
        out[: len(x)].assign((np.linalg.norm(x.numpy() - 0.5, axis=1) - self.radius)[:, None].astype(np.float32))
        return out


def slice_color(distance, blur):
    """Twin of `nrc.kernels.sdf.slice_color`, row by row."""

    def smoothstep(a, b, x):
        u = np.clip((x - a) / (b - a), 0.0, 1.0)
        return u * u * (3.0 - 2.0 * u)

    far = (1.0 - np.exp(-6.0 * np.abs(distance)))[:, None]
    warm = (1.0 - far) * [0.95, 0.85, 0.7] + far * [0.8, 0.25, 0.05]
    cold = (1.0 - far) * [0.75, 0.88, 0.95] + far * [0.02, 0.12, 0.5]
    step, width = float(kernels.ISO_STEP), float(kernels.ISO_WIDTH)
    nearest = np.abs(distance - step * np.round(distance / step))
    line = 0.6 + 0.4 * smoothstep(0.5 * width, 0.5 * width + blur, nearest)
    zero = smoothstep(width, width + blur, np.abs(distance))
    return np.where((distance < 0.0)[:, None], cold, warm) * (line * zero)[:, None]


@pytest.mark.parametrize("quick", [False, True])
def test_slice_shows_distances_through_the_surface(quick):
    """Hits have the ball's closed form, the plane the twin's colours, half hidden by the surface in front of it."""
    width, height, radius = 80, 60, 0.3
    camera = Camera.look_at((0.9, 1.6, 1.9), (0.5, 0.5, 0.5), fov=35.0)
    lower, upper = np.full(3, 0.1), np.full(3, 0.9)
    seen = SdfRenderer(BallField(radius), lower, upper).trace(
        camera, width, height, plane=Slice(2, 0.625), window=(160, 120), quick=quick
    )
    half_x, half_y = camera.half_extents(width, height)
    x = (2.0 * (np.arange(width) + 0.5) / width - 1.0) * half_x
    y = (1.0 - 2.0 * (np.arange(height) + 0.5) / height) * half_y
    d = np.stack([*np.meshgrid(x, y), np.full((height, width), -1.0)], axis=-1) @ camera.to_world[:3, :3].T
    d = (d / np.linalg.norm(d, axis=-1, keepdims=True)).reshape(-1, 3)
    o = camera.to_world[:3, 3]
    t_plane = (0.6 - o[2]) / d[:, 2]
    p = o + t_plane[:, None] * d
    on_plane = ((p > lower - 1e-5) & (p < upper + 1e-5)).all(axis=1)
    np.testing.assert_array_equal(seen.on_plane.numpy(), on_plane)
    b = d @ (o - 0.5)
    discriminant = b * b - ((o - 0.5) @ (o - 0.5) - radius**2)
    t = -b - np.sqrt(np.maximum(discriminant, 0.0))
    hit = (discriminant > 0.0) & ~(on_plane & (t > t_plane))
    found = seen.state.numpy() == kernels.HIT
    pixel = 2.0 * half_y / height * 2.0
    assert (found != hit).mean() < 0.02 and hit.mean() > 0.1  # pixels along the outline, and where the plane cuts it
    certain = found & hit & (discriminant > 0.01)
    np.testing.assert_allclose(seen.t.numpy()[certain], t[certain], atol=3.0 * pixel if quick else 2e-3)
    color = seen.color.numpy()
    np.testing.assert_array_equal(color[~found & ~on_plane], np.float32(BACKGROUND))
    plane = slice_color(np.linalg.norm(p - 0.5, axis=1) - radius, 2.0 * half_y / height * t_plane)
    np.testing.assert_allclose(color[on_plane & ~found], plane[on_plane & ~found], atol=2e-3)
    front = on_plane & found
    assert front.any()
    shaded = (color[front] - (1.0 - IN_FRONT) * plane[front]) / IN_FRONT
    assert shaded.min() > -0.01 and shaded.max() < 1.0 and shaded.std() > 0.05


def test_counts_left_on_the_device_give_the_same_picture(trained):
    """As a GPU does, looking at the number of rays after every sixth round only: the same bits."""
    target, camera = trained.target, sdf.framing_camera(np.array(sdf.VIEW), trained.target.to_cube().vertices)
    pictures = []
    for n_rounds in (1, 6):
        renderer = SdfRenderer(trained.field, target.lower, target.upper, params=trained.trainer.ema_params)
        renderer._n_rounds = n_rounds
        pictures.append([renderer.render(camera, 60, 40, show=show).numpy().copy() for show in ("shaded", "slice")])
    np.testing.assert_array_equal(pictures[0], pictures[1])
    with pytest.raises(ValueError, match="axis 0, 1 or 2"):
        Slice(3)
    with pytest.raises(ValueError, match="view of a distance"):
        renderer.render(camera, 8, 8, show="wire")


def test_repairs_and_refusals(meshes, tmp_path):
    """Open and inverted meshes are used with a warning; what encloses nothing is refused with the reason."""
    open_edges = MeshDistance(meshes / "bowl.ply", CPU).warnings
    assert len(open_edges) == 1 and "boundary edges" in open_edges[0]
    inverted = MeshDistance(meshes / "inverted.ply", CPU)
    assert inverted.warnings == ["inverted.ply: faces inwards, turned inside out"]
    assert inverted.surface.volume > 4.0
    with pytest.raises(SurfaceError, match=r"square\.ply: the mesh encloses nothing.*4 boundary edges"):
        MeshDistance(meshes / "square.ply", CPU)
    with pytest.raises(SurfaceError, match=r"twosided\.ply: the mesh encloses nothing"):
        MeshDistance(meshes / "twosided.ply", CPU)
    with pytest.raises(SurfaceError, match=r"none\.ply: No such file"):
        SdfTask(tmp_path / "none.ply", device="cpu")
    with pytest.raises(ValueError, match="batch_size"):
        SdfTask(meshes / "ball.ply", device="cpu", batch_size=0)
