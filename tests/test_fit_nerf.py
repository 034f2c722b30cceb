"""Radiance fields: compositing and its gradients, drawn pixels, training on a small scene, resumption, snapshots."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference_nerf as reference
import warp as wp
from small_views import N_VIEWS, SIZE, look_at, write_sphere_views

from nrc.field import Field
from nrc.fit.exports import export
from nrc.fit.nerf import NerfTask, evaluate_snapshot, scale_optimizer
from nrc.fit.nerf_render import evaluate_views, extract_mesh, render_view
from nrc.fit.radiance_field import RadianceField
from nrc.fit.views import Camera
from nrc.kernels import nerf as kn
from nrc.launch import launch, set_threads
from nrc.optimizer import Optimizer
from nrc.snapshot import SnapshotError, load_tensors, save_tensors

SMALL = {
    "encoding": {"otype": "HashGrid", "n_levels": 6, "log2_hashmap_size": 13, "base_resolution": 8},
    "network": {"otype": "FullyFusedMLP", "n_neurons": 32, "n_hidden_layers": 1},
    "rgb_network": {"otype": "FullyFusedMLP", "n_neurons": 32, "n_hidden_layers": 1},
    "loss": {"otype": "L2"},
}
ROUNDING = 2e-6  # relative, of sums of up to 40 terms in single precision
N_TRAINED, MIN_PSNR = 300, 23.0  # steps, and the quality [dB] of views held out that they must reach


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Views of a sphere."""
    return write_sphere_views(tmp_path_factory.mktemp("sphere"))


def small_task(scene: Path, dir_encoding: dict[str, Any] | None = None, **options: Any) -> NerfTask:
    """A task that takes milliseconds a step."""
    config = SMALL | ({} if dir_encoding is None else {"dir_encoding": dir_encoding})
    return NerfTask(scene, device="cpu", config=config, batch_size=4096, **options)


def rays_with(counts: np.ndarray, target: np.ndarray, background: np.ndarray, image: np.ndarray) -> Any:
    """Rays whose samples were all kept."""
    rays = kn.RaysView()
    rays.n_kept = rays.n_marched = wp.array(counts, dtype=int, device="cpu")
    rays.end_kept = wp.array(np.cumsum(counts), dtype=int, device="cpu")
    rays.target, rays.image = wp.array(target, dtype=float, device="cpu"), wp.array(image, dtype=int, device="cpu")
    rays.background = wp.array(background, dtype=wp.vec3, device="cpu")
    return rays


@pytest.mark.parametrize("loss_otype", ["L2", "Huber"])
@pytest.mark.parametrize("exposed", [False, True])
def test_composite_gradients_match_the_twin(loss_otype: str, exposed: bool) -> None:
    """Loss and gradients of rays with none, few, many samples, opaque or not, equal sums in double precision."""
    rng = np.random.default_rng(3)
    counts = np.array([0, 1, 5, 40, 7, 0, 3], np.int32)
    n, n_rays = int(counts.sum()), len(counts)
    log_density = rng.normal(1.0, 2.0, n).astype(np.float32)
    dt = rng.uniform(0.01, 0.1, n).astype(np.float32)
    log_density[6:46] += 1.0  # the fourth ray becomes opaque
    color = rng.random((n, 3), dtype=np.float32)
    target, background = rng.random((n_rays, 3), dtype=np.float32), rng.random((n_rays, 3), dtype=np.float32)
    image = rng.integers(0, 2, n_rays).astype(np.int32)
    log_gain = rng.normal(0.0, 0.3, (2 if exposed else 0, 3)).astype(np.float32)
    color_x = np.zeros((n, kn.N_COLOR_INPUTS), np.float32)
    color_x[:, 0] = log_density
    scale = 8.0
    outputs = [np.full(shape, np.nan, np.float32) for shape in (n_rays, (n, 3), (n, kn.N_COLOR_INPUTS))]
    outputs.append(np.full((n_rays if exposed else 0, 3), np.nan, np.float32))
    arrays = [wp.array(values, dtype=float, device="cpu") for values in outputs]
    launch(
        kn.make_composite(loss_otype),
        n_rays,
        inputs=[
            scale,
            wp.array(log_gain, dtype=float, device="cpu"),
            rays_with(counts, target, background, image),
            *(wp.array(values, dtype=float, device="cpu") for values in (color_x, dt, color)),
        ],
        outputs=arrays,
        device=wp.get_device("cpu"),
    )
    loss, dL_dcolor, dL_dcolor_x, dL_dlog_gain = (array.numpy() for array in arrays)
    assert (dL_dcolor_x[:, 1:] == 0.0).all()
    opaque = []
    for i, end in enumerate(np.cumsum(counts)):
        rows = slice(end - counts[i], end)
        gain = np.exp(log_gain[image[i]].astype(np.float64)) if exposed else 1.0
        ray = (log_density[rows], dt[rows], color[rows], background[i])
        total = reference.composite(*ray, gain)
        difference = total - target[i]
        far = np.abs(difference) > 0.1
        if loss_otype == "L2":
            value, slope = difference**2, 2.0 * difference
        else:
            value = np.where(far, 0.2 * np.abs(difference) - 0.01, difference**2)
            slope = np.where(far, 0.2 * np.sign(difference), 2.0 * difference)
        assert loss[i] == pytest.approx(value.mean(), rel=1e-5, abs=1e-7)
        expected = reference.composite_backward(*ray, scale * slope / 3.0, gain)
        # Colours in front and behind cancel: what remains has the rounding errors of its terms
        terms = np.exp(log_density[rows]) * dt[rows] * np.abs(scale * slope / 3.0 * gain).sum()
        assert (np.abs(dL_dcolor_x[rows, 0] - expected[0]) <= ROUNDING * terms).all()
        np.testing.assert_allclose(dL_dcolor[rows], expected[1], rtol=1e-4, atol=1e-6)
        if exposed:
            np.testing.assert_allclose(dL_dlog_gain[i], expected[2], rtol=1e-4, atol=1e-6)
        opaque.append(reference.transmittances(log_density[rows], dt[rows])[-1] < reference.MIN_TRANSMITTANCE)
    assert opaque == [False, False, False, True, False, False, False]


def test_twin_gradients_match_finite_differences() -> None:
    """The twin's gradients are those of its colour."""
    rng = np.random.default_rng(5)
    n = 6
    arguments = [rng.normal(1.0, 1.0, n), rng.uniform(0.01, 0.1, n), rng.random((n, 3))]
    background, slope, gain, step = rng.random(3), rng.normal(size=3), np.exp(rng.normal(0.0, 0.3, 3)), 1e-6
    analytic = reference.composite_backward(*arguments, background, slope, gain)

    def value(log_density: np.ndarray, color: np.ndarray, log_gain: np.ndarray) -> float:
        return reference.composite(log_density, arguments[1], color, background, np.exp(log_gain)) @ slope

    point = [arguments[0], arguments[2], np.log(gain)]
    for k in range(3):
        numeric = np.empty_like(point[k])
        for j in np.ndindex(point[k].shape):
            sides = []
            for sign in (1.0, -1.0):
                moved = [values.copy() for values in point]
                moved[k][j] += sign * step
                sides.append(value(*moved))
            numeric[j] = (sides[0] - sides[1]) / (2.0 * step)
        np.testing.assert_allclose(analytic[k], numeric, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("otype", ["Adam", "SGD"])
def test_scaled_gradients_take_the_same_steps(otype: str) -> None:
    """Gradients multiplied by a power of two change nothing, with an optimizer scaled alike; the original stays."""
    adam = {"epsilon": 1e-3, "beta2": 0.99} if otype == "Adam" else {}
    config = {"otype": "Ema", "decay": 0.9, "nested": {"otype": otype, "learning_rate": 0.25, "l2_reg": 0.5, **adam}}
    before = deepcopy(config)
    rng = np.random.default_rng(2)
    x, dL_dy = rng.random((64, 3), np.float32), rng.normal(size=(64, 2)).astype(np.float32)
    params = []
    for scale in (1.0, 1024.0):
        field = Field(3, 2, {"otype": "Identity"}, SMALL["network"], device="cpu")
        optimizer = Optimizer(field, scale_optimizer(config, scale))
        for _ in range(3):
            optimizer.step(x, (scale * dL_dy).astype(np.float32))
        params.append(field.params.numpy())
    np.testing.assert_allclose(params[0], params[1], rtol=1e-5, atol=1e-7)
    assert config == before


@pytest.mark.parametrize("inner", ["Adam", {"otype": "Adam", "l2_reg": "x"}])
def test_wrong_optimizers_are_refused(inner: Any, scene: Path) -> None:
    """An optimizer that is none is a ValueError."""
    with pytest.raises(ValueError, match=r"nested|l2_reg"):
        NerfTask(scene, device="cpu", config=SMALL | {"optimizer": {"otype": "Ema", "nested": inner}})


def test_batches_smaller_than_a_ray_are_refused(scene: Path) -> None:
    """A batch that not every ray fits into would leave rays out by what they see."""
    with pytest.raises(ValueError, match="batch_size"):
        NerfTask(scene, device="cpu", config=SMALL, batch_size=kn.MAX_SAMPLES - 1)


def test_directions_of_instant_ngp_are_read(scene: Path) -> None:
    """Its Composite of directions and no latent codes is its first entry."""
    harmonics = {"otype": "SphericalHarmonics", "degree": 2}
    composite = {"otype": "Composite", "nested": [harmonics | {"n_dims_to_encode": 3}, {"otype": "Identity"}]}
    fields = [small_task(scene, dir_encoding=encoding).model.color for encoding in (harmonics, composite)]
    assert fields[0].encoding == fields[1].encoding


def test_few_rays_reach_all_images(scene: Path) -> None:
    """With fewer rays than images, steps together draw from every image alike."""
    task = small_task(scene)
    n_rays, n_steps, counts = 7, 240, np.zeros(N_VIEWS)
    march = task.model.march_view()
    for step in range(n_steps):
        inputs = [task.cameras, march, 4, step, n_rays, 0, -1.0]
        launch(kn.begin_rays, n_rays, inputs=inputs, outputs=[task.rays], device=task.device)
        counts += np.bincount(task.rays.image.numpy()[:n_rays], minlength=N_VIEWS)
    expected = n_rays * n_steps / N_VIEWS
    assert np.abs(counts - expected).max() < 5.0 * np.sqrt(expected)


@pytest.mark.parametrize("n_rays", [7, 1000])
def test_exposures_follow_the_rays_of_their_images(n_rays: int, scene: Path) -> None:
    """The first moment of an image's gain is a tenth of the gradients of those of its rays that fit."""
    task = small_task(scene, exposure=True)
    rng = np.random.default_rng(8)
    for step in range(3):
        inputs = [task.cameras, task.model.march_view(), task.seed, step, n_rays, 0, -1.0]
        launch(kn.begin_rays, n_rays, inputs=inputs, outputs=[task.rays], device=task.device)
        image, n_marched = task.rays.image.numpy(), task.rays.n_marched.numpy()
        n_marched[::3] = kn.DROPPED
        task.rays.n_marched.assign(n_marched)
        gradient = rng.normal(size=(task.max_rays, 3)).astype(np.float32)
        task._dL_dlog_gain.assign(gradient)
        task._gain_moments.zero_()
        task.n_steps, task.n_rays = step, n_rays
        task._adjust_exposure()
        expected, fits = np.zeros((N_VIEWS, 3)), np.flatnonzero(n_marched[:n_rays] >= 0)
        np.add.at(expected, image[fits], 0.1 * gradient[fits])
        np.testing.assert_allclose(task._gain_moments.numpy()[:, :3], expected, rtol=1e-4, atol=1e-6)


def test_boxes_out_of_sight_are_missed(scene: Path) -> None:
    """From where single precision cannot take a step, rays meet nothing; a box that space does not hold is refused."""
    task = small_task(scene)
    for distance, meets in ((10.0, True), (1e6, False)):
        c2w = look_at(np.array([0.0, -distance, 0.0]))[:3]
        c2w[:, 3] += 0.5
        alpha = render_view(task.model, Camera.from_fov(c2w, 4, 4, 0.5 / distance)).alpha
        assert (alpha.max() > 0.0) == meets
    with pytest.raises(ValueError, match="crop must overlap"):
        small_task(scene, crop=((3.0, 3.0, 3.0), (4.0, 4.0, 4.0)))
    with pytest.raises(ValueError, match="crop must overlap"):
        extract_mesh(task.model, crop=((3.0, 3.0, 3.0), (4.0, 4.0, 4.0)))


def test_drawn_pixels_are_uniform_and_composited(scene: Path) -> None:
    """Rays are spread evenly over images and pixels; targets are photographs over the random background."""
    task = small_task(scene)
    n_rays, counts = 1200, np.zeros((N_VIEWS, SIZE * SIZE), int)
    march = task.model.march_view()
    for sample in range(60):
        inputs = [task.cameras, march, 9, sample, n_rays, 0, -1.0]
        launch(kn.begin_rays, n_rays, inputs=inputs, outputs=[task.rays], device=task.device)
        image = task.rays.image.numpy()[:n_rays]
        assert (np.bincount(image) == n_rays // N_VIEWS).all()
        d, origin = (getattr(task.rays, name).numpy()[:n_rays] for name in ("direction", "origin"))
        c2w = task.views.c2w[image]
        local = np.einsum("nij,ni->nj", c2w[:, :, :3], d)
        pixel = np.stack([local[:, 0], -local[:, 1]], axis=1) / -local[:, 2:] * task.views.focal[image] + SIZE / 2
        np.testing.assert_allclose(pixel % 1.0, 0.5, atol=1e-3)
        np.testing.assert_allclose(origin, c2w[:, :, 3])
        column, row = pixel.astype(int).T
        np.add.at(counts, (image, row * SIZE + column), 1)
        photographs = np.stack([task.views.image(i) for i in range(N_VIEWS)]) / 255.0
        rgba = photographs[image, row, column]
        background = task.rays.background.numpy()[:n_rays]
        expected = rgba[:, :3] * rgba[:, 3:] + background * (1.0 - rgba[:, 3:])
        np.testing.assert_allclose(task.rays.target.numpy()[:n_rays], expected, atol=1e-6)
    # Stratified, so more even than independent draws: below the chi-squared of those, 5 standard deviations wide
    expected_count = counts.sum() / counts.size
    chi2 = ((counts - expected_count) ** 2 / expected_count).sum()
    assert chi2 < counts.size + 5.0 * np.sqrt(2.0 * counts.size)
    assert np.abs(background.mean(axis=0) - 0.5).max() < 0.05


def test_small_scene_is_learned(scene: Path, tmp_path: Path) -> None:
    """Views of a sphere predict two others; the snapshot evaluates to the same numbers."""
    task = small_task(scene)
    first = task.progress()["psnr"]
    losses = [float(task.step().numpy()[0]) for _ in range(N_TRAINED)]
    assert task.n_steps == N_TRAINED
    assert np.mean(losses[-20:]) < 0.2 * losses[0]
    assert 0.0 < task.model.occupancy.fraction() < 0.3  # the sphere's shell in the unit cube
    assert 0.5 * 4096 < int(task._n_kept.numpy()[0]) <= 4096
    result = task.evaluate()
    assert result["psnr"] > MIN_PSNR and result["psnr_black"] > MIN_PSNR
    assert abs(task.progress()["psnr"] - result["psnr"]) < 1.5 and first < 15.0
    task.save(tmp_path / "sphere.safetensors", {"seconds": 1.0, "steps": N_TRAINED})
    again = evaluate_snapshot(tmp_path / "sphere.safetensors", device="cpu")
    assert again == result
    loaded = RadianceField.load(tmp_path / "sphere.safetensors", "cpu")
    assert (loaded.density.params.numpy() == task.density_optimizer.ema_params.numpy()).all()
    assert (loaded.occupancy.bits.numpy() == task.model.occupancy.bits.numpy()).all()
    assert evaluate_views(loaded, task.test_views) == result


def test_resumed_run_equals_an_uninterrupted_one(scene: Path) -> None:
    """State and step numbers decide everything: bit for bit, whatever the threads and however often it is measured."""

    def trained(task: NerfTask, n_steps: int, threads: int) -> NerfTask:
        set_threads(threads)
        for _ in range(n_steps):
            task.step()
        return task

    try:
        whole = trained(small_task(scene, exposure=True), 40, 2)
        half = trained(small_task(scene, exposure=True), 19, 1)
        half.progress()
        state = {name: array.copy() for name, array in half.state().items()}
        resumed = small_task(scene, exposure=True)
        resumed.load_state(Path("run"), state)
        resumed.progress()
        trained(resumed, 21, 3)
    finally:
        set_threads(0)
    expected, found = whole.state(), resumed.state()
    assert expected.keys() == found.keys()
    for name in expected:
        assert (expected[name] == found[name]).all(), name
    assert whole.identity() == resumed.identity()
    assert not (expected["log_gain"] == 0.0).all()
    assert np.abs(expected["log_gain"].mean(axis=0)).max() < 1e-6


def test_state_that_does_not_fit_is_refused(scene: Path) -> None:
    """A missing array, a wrong shape and an impossible count are errors that name them, and change nothing."""
    task = small_task(scene)
    task.step()
    state = task.state()
    before = {name: array.copy() for name, array in state.items()}
    late = np.full_like(state["density.stamps"], 2**30)
    for name, value in (
        ("density.params", None),
        ("color.weights", np.zeros(3)),
        ("n_rays", np.array([0])),
        ("density.stamps", late),
    ):
        broken = {key: array for key, array in state.items() if key != name}
        if value is not None:
            broken[name] = value
        with pytest.raises(SnapshotError, match=name):
            task.load_state(Path("run"), broken)
    assert all((task.state()[name] == before[name]).all() for name in before)


def test_rays_that_meet_nothing_teach_nothing(scene: Path) -> None:
    """With every cell empty a step changes no parameter, no moment and no count of the optimizers."""
    task = small_task(scene)
    for _ in range(3):
        task.step()
    before = {name: array.copy() for name, array in task.state().items()}
    task.model.occupancy.bits.zero_()
    loss = float(task.step().numpy()[0])
    after = task.state()
    for name in before:
        first = 2 if name.endswith("counters") else 0  # the first two say what the last call was given
        if name != "n_steps":
            assert (after[name][first:] == before[name][first:]).all(), name
    # What is seen is the background: the loss is the photographs' mean distance from it
    n = task.n_rays
    target, background = task.rays.target.numpy()[:n], task.rays.background.numpy()[:n]
    assert loss == pytest.approx(((target - background) ** 2).mean(), rel=1e-5)


def test_rays_that_do_not_fit_are_dropped(scene: Path) -> None:
    """More rays than the batch holds: whole rays are left out, and neither samples nor loss count them."""
    task = small_task(scene)
    task.n_rays = task.max_rays
    task._march(task.cameras, 0, task.n_rays, 0, task.n_rays, -1.0, task.model.density.params)
    n_marched, end = task.rays.n_marched.numpy(), task.rays.end_marched.numpy()
    dropped = n_marched == kn.DROPPED
    fits = np.flatnonzero(~dropped)
    assert 0 < len(fits) < task.n_rays and (fits == np.arange(len(fits))).all()
    assert int(task._n_marched.numpy()[0]) == n_marched[fits].sum() == end[fits[-1]] <= task.max_marched
    assert end[fits[-1] + 1] > task.max_marched
    task._shade(task.n_rays, task.model.color.params)
    kept = task.rays.n_kept.numpy()
    assert int(task._n_kept.numpy()[0]) == kept.sum() <= task.samples_per_step
    task._composite(task.n_rays, "L2", task._no_gain)
    assert (task._ray_loss.numpy()[task.rays.n_marched.numpy() == kn.DROPPED] == 0.0).all()


def test_kept_samples_end_where_rays_are_opaque(scene: Path) -> None:
    """A ray keeps its samples up to the one behind which less than 1e-4 is transmitted."""
    task = small_task(scene)
    task.n_rays = 8
    task._march(task.cameras, 0, 8, 0, 8, -1.0, task.model.density.params)
    rng = np.random.default_rng(6)
    code = rng.normal(3.0, 1.5, task._code.shape).astype(np.float32)
    task._code.assign(code)
    task._shade(8, task.model.color.params)
    ends, n, kept = (getattr(task.rays, name).numpy()[:8] for name in ("end_marched", "n_marched", "n_kept"))
    dt, x = task._dt.numpy(), task._x.numpy()
    to = 0
    for i in range(8):
        rows = slice(ends[i] - n[i], ends[i])
        t = reference.transmittances(code[rows, 0], dt[rows])
        below = np.flatnonzero(t[1:] < reference.MIN_TRANSMITTANCE)
        assert kept[i] == (below[0] + 1 if len(below) else n[i])
        rows = slice(rows.start, rows.start + kept[i])
        assert (task._color_x.numpy()[to : to + kept[i], : kn.N_CODE] == code[rows]).all()
        assert (task._kept_x.numpy()[to : to + kept[i]] == x[rows]).all()
        to += kept[i]
    assert (kept < n).any()


def test_snapshots_that_do_not_fit_are_refused(scene: Path, tmp_path: Path) -> None:
    """Missing settings, a network of another size, a box that is none: one SnapshotError each."""
    task, path = small_task(scene), tmp_path / "field.safetensors"
    task.save(path, {})
    tensors, config = load_tensors(path, kind="nrc.nerf")
    settings = config["settings"]
    wide = settings | {"network": settings["network"] | {"n_neurons": 64}}
    huge = settings | {"encoding": settings["encoding"] | {"log2_hashmap_size": 30}}
    for name, value in (("settings", wide), ("settings", huge), ("settings", 3), ("aabb_scale", 3), ("crop", [0])):
        save_tensors(path, tensors, config | {name: value}, kind="nrc.nerf")
        with pytest.raises(SnapshotError, match=r"field\.safetensors"):
            RadianceField.load(path, "cpu")
    save_tensors(path, tensors, {name: config[name] for name in config if name != "near"}, kind="nrc.nerf")
    with pytest.raises(SnapshotError, match="near is missing"):
        RadianceField.load(path, "cpu")


WRONG_ENTRIES = {
    "kind": "image",
    "source": 3,
    "holdout": "8",
    "downscale": 0,
    "scale": [1],
    "offset": [0.0, 1.0],
    "rotation": [[1, 0], [0, "x"]],
}


@pytest.mark.parametrize(("name", "wrong"), WRONG_ENTRIES.items())
def test_snapshots_with_wrong_entries_are_refused(name: str, wrong: Any, scene: Path, tmp_path: Path) -> None:
    """What says where the views are, missing or of another type: one SnapshotError, to measure and to export."""
    path = tmp_path / "field.safetensors"
    small_task(scene).save(path, {})
    tensors, config = load_tensors(path, kind="nrc.nerf")
    missing = {key: value for key, value in config["fit"].items() if key != name}
    for fit in (missing, config["fit"] | {name: wrong}):
        save_tensors(path, tensors, config | {"fit": fit}, kind="nrc.nerf")
        with pytest.raises(SnapshotError, match=f"fit: .*{name if name != 'kind' else 'not'}"):
            evaluate_snapshot(path, device="cpu")
        if name != "kind":
            with pytest.raises(SnapshotError, match=f"fit: .*{name}"):
                export(path, tmp_path / "mesh.ply", device="cpu")


@pytest.mark.parametrize("n_steps", [0, 1.5, 10**9, None])
def test_impossible_steps_are_refused(n_steps: Any, scene: Path, tmp_path: Path) -> None:
    """Steps too short to get anywhere would march for ever."""
    path = tmp_path / "field.safetensors"
    small_task(scene).save(path, {})
    tensors, config = load_tensors(path, kind="nrc.nerf")
    save_tensors(path, tensors, config | {"n_steps": n_steps}, kind="nrc.nerf")
    with pytest.raises(SnapshotError, match="n_steps"):
        RadianceField.load(path, "cpu")
