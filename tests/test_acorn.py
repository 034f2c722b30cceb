"""ACORN: the quadtree's invariants, gradients against a float64 twin, resuming, snapshots."""

import numpy as np
import pytest
import warp as wp
from PIL import Image
from reference_encoding import encode
from reference_network import forward

from nrc.fit.acorn import AcornModel, AcornTask, Quadtree, acorn_config, evaluate_snapshot
from nrc.image import ImageError
from nrc.kernels.acorn import N_FEATURES
from nrc.snapshot import SnapshotError

SMALL = {"max_blocks": 16, "grid_resolution": 4, "n_neurons": 16, "n_hidden_layers": 2, "n_frequencies": 3}
SETTINGS = {"encoding": SMALL | {"points_per_side": 4, "refine_every": 4}}
BETA1 = 0.9


def assert_partition(tree):
    """Each of a fine raster's points lies in exactly one block, the one that its Morton code finds."""
    n = 64
    x = (np.stack(np.meshgrid(np.arange(n), np.arange(n)), axis=-1).reshape(-1, 2) + 0.5) / n
    x = x[(x < np.array(tree.shape) * tree.root).all(axis=1)]
    corners = tree.corners()
    inside = (x[:, None] >= corners[:, :2]) & (x[:, None] < corners[:, :2] + corners[:, 2:])
    inside = inside.all(axis=2)
    assert (inside.sum(axis=1) == 1).all()
    assert (np.diff(tree.keys()) > 0).all()
    assert len(tree.blocks) <= tree.max_blocks


@pytest.mark.parametrize(("width", "height"), [(256, 256), (300, 200), (1681, 171), (64, 640)])
def test_blocks_partition_whatever_the_errors(width, height):
    """Random errors, refinement after refinement: one block everywhere, in budget, none below the smallest size."""
    tree = Quadtree(width, height, max_blocks=70, smallest=8)
    rng = np.random.default_rng(0)
    assert_partition(tree)
    for _ in range(8):
        tree.refine(rng.exponential(size=len(tree.blocks)) ** 4)
        assert_partition(tree)
        assert tree.corners()[:, 2].min() * max(width, height) >= 8
    assert (np.array(tree.shape) * tree.root * max(width, height) >= [width - 1e-9, height - 1e-9]).all()


def test_splits_go_where_the_error_is():
    """With error in one corner alone, blocks become small there, and fours elsewhere make room for them."""
    tree = Quadtree(1024, 1024, max_blocks=64, smallest=16)
    assert len(tree.blocks) == 16
    for _ in range(8):
        corners = tree.corners()
        tree.refine(np.where((corners[:, :2] < 0.125).all(axis=1), corners[:, 2] ** 2, 1e-12))
    corner = (tree.corners()[:, :2] < 0.125).all(axis=1)
    assert corner.sum() >= 40 and (tree.blocks[corner, 0] == tree.depth).mean() > 0.5
    assert tree.blocks[~corner, 0].max() <= 3 and tree.blocks[~corner, 0].min() == 1


def test_without_error_nothing_is_split():
    """No error, no change."""
    tree = Quadtree(256, 256, max_blocks=64, smallest=8)
    before = tree.blocks.copy()
    assert tree.refine(np.zeros(len(before))) == 0
    np.testing.assert_array_equal(tree.blocks, before)


def make_model(device):
    """A small model with a tree of unequal blocks."""
    config = acorn_config(device, SETTINGS | {"optimizer": {"otype": "Adam", "beta1": BETA1, "l2_reg": 0.0}}, 6 * 16)
    tree = Quadtree(60, 40, max_blocks=16, smallest=4)
    tree.refine(np.arange(len(tree.blocks), dtype=float))
    return tree, AcornModel(tree, 3, config, 5, device)


def matrices(network, params):
    """Weight matrices of a network."""
    return [params[first : first + n_in * n_out].reshape(n_in, n_out) for first, n_in, n_out in network.layers]


class Twin:
    """The model in float64 NumPy: parameters as a dictionary, loss of a batch."""

    def __init__(self, model):
        self.model = model
        self.params = {
            "encoder": np.float64(model.encoder.params.numpy()),
            "expansion": np.float64(model.weights.numpy()[:, :-1]),  # (chunks, hidden, cells, features)
            "decoder": np.float64(model.decoder.params.numpy()),
        }

    def colors(self, params, positions, local, row):
        """Colours at `local` coordinates of the blocks `row` of `positions`."""
        model, n = self.model, self.model.resolution
        code = encode(positions, model.encoder.encoding_config, None)
        hidden = forward(code, matrices(model.encoder.network, params["encoder"]), "ReLU", "ReLU")[1][-1]
        grids = np.einsum("rk,ckjf->rcjf", hidden, params["expansion"]).reshape(len(positions), n, n, N_FEATURES)
        at = np.clip(np.float64(local), 0, 1) * (n - 1)
        low = np.minimum(at.astype(int), n - 2)
        (a, b), (x, y) = (at - low).T[..., None], low.T
        features = (1 - b) * ((1 - a) * grids[row, y, x] + a * grids[row, y, x + 1])
        features += b * ((1 - a) * grids[row, y + 1, x] + a * grids[row, y + 1, x + 1])
        return forward(features, matrices(model.decoder.network, params["decoder"]), "ReLU", "None")[1][-1]


def batch(tree, model, rng):
    """Positions, local coordinates and targets of a step."""
    positions = tree.positions()[rng.integers(0, len(tree.blocks), model.n_rows)]
    local = rng.random((model.n_rows * model.n_points, 2), dtype=np.float32)
    local[:4] = [[0, 0], [1, 1], [0, 1], [1.5, -1]]
    return positions, local, rng.random((len(local), 3), dtype=np.float32)


def test_gradients_match_finite_differences(device):
    """The first step's moments hold the derivatives of the twin's loss along random directions, part by part."""
    tree, model = make_model(device)
    rng = np.random.default_rng(1)
    positions, local, target = batch(tree, model, rng)
    twin, row = Twin(model), np.repeat(np.arange(model.n_rows), model.n_points)

    def loss(params):
        return np.mean(np.square(twin.colors(params, positions, local, row) - target))

    measured = model.step(*(wp.array(values, dtype=float, device=device) for values in (positions, local, target)))
    assert measured.numpy()[0] == pytest.approx(loss(twin.params), rel=1e-5)
    arrays = model.arrays()
    gradients = {
        "encoder": arrays["encoder.weights"].numpy()[0],
        "expansion": arrays["expansion.m"].numpy()[:, :-1],
        "decoder": arrays["decoder.weights"].numpy()[0],
    }
    for name, gradient in gradients.items():
        gradient = np.float64(gradient).reshape(twin.params[name].shape) / (1.0 - BETA1)
        assert np.abs(gradient).max() > 0.0
        for _ in range(6):
            direction = rng.standard_normal(gradient.shape)
            direction *= rng.random(gradient.shape) < 0.3
            h = 1e-6
            ends = [loss(twin.params | {name: twin.params[name] + s * h * direction}) for s in (1, -1)]
            expected = (ends[0] - ends[1]) / (2 * h)
            scale = np.sqrt(np.sum(np.square(gradient * direction)))
            assert np.sum(gradient * direction) == pytest.approx(expected, abs=2e-4 * scale), name


def test_colors_anywhere_match_the_twin(device):
    """Points of the image find their block and interpolate there."""
    tree, model = make_model(device)
    rng = np.random.default_rng(2)
    x = rng.random((500, 2), dtype=np.float32) * [1, 40 / 60]
    corners = tree.corners()
    inside = (x[:, None] >= corners[:, :2]) & (x[:, None] < corners[:, :2] + corners[:, 2:])
    row = inside.all(axis=2).argmax(axis=1)
    assert len(set(row)) > 8
    local = (x - corners[row, :2]) / corners[row, 2:]
    expected = Twin(model).colors(Twin(model).params, tree.positions(), local, row)
    found = model.inference(wp.array(np.float32(x), dtype=float, device=device)).numpy()
    np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.fixture
def picture(tmp_path):
    """A small picture with detail in one corner."""
    x, y = np.meshgrid(np.arange(48), np.arange(32))
    values = 128 + 100 * np.sin(x / 9) * np.cos(y / 7)
    values[:12, :12] += 60 * ((x + y)[:12, :12] % 2) - 30
    path = tmp_path / "picture.png"
    Image.fromarray(np.stack([values, values[::-1], values], axis=2).astype(np.uint8)).save(path)
    return path


def make_task(picture, seed=3):
    return AcornTask(picture, seed=seed, device="cpu", config=SETTINGS, batch_size=8 * 16)


def test_resumed_run_is_the_same(picture, tmp_path):
    """State after 6 of 15 steps, loaded into a task of another seed's weights, leads to the same bits."""
    straight, first = make_task(picture), make_task(picture)
    for _ in range(15):
        straight.step()
    for _ in range(6):
        first.step()
    state = {name: values.copy() for name, values in first.state().items()}
    resumed = make_task(picture)
    resumed.model.weights.zero_()
    resumed.load_state(tmp_path, state)
    for _ in range(9):
        resumed.step()
    expected, found = straight.state(), resumed.state()
    assert expected.keys() == found.keys() and resumed.n_steps == 15
    assert len(expected["blocks"]) > len(make_task(picture).tree.blocks)
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)


def test_task_learns_and_snapshot_repeats_its_measures(picture, tmp_path):
    """Some hundred steps reach 21 dB from noise; the snapshot measures the same and rejects a damaged tree."""
    task = make_task(picture)
    before = task.progress()["psnr"]
    for _ in range(400):
        task.step()
    measured = task.evaluate()
    assert before < 15.0 and measured["psnr"] > 21.0
    assert task.progress()["psnr"] == pytest.approx(measured["psnr"], abs=0.3)
    path = tmp_path / "snapshot.safetensors"
    task.save(path, {"seconds": 1.0, "steps": 400})
    again = evaluate_snapshot(path, device="cpu")
    assert again["psnr"] == measured["psnr"] and again["ssim"] == measured["ssim"]
    assert set(task.pictures(tmp_path)) == {"reconstruction", "error"}
    state = task.state()
    with pytest.raises(SnapshotError, match="partition"):
        task.load_state(path, state | {"blocks": state["blocks"][:-1]})


@pytest.mark.parametrize(
    ("encoding", "message"),
    [
        ({"max_block": 3}, "max_block"),
        ({"grid_resolution": 5}, "even"),
        ({"refine_every": 0}, "refine_every"),
        ({"n_hidden_layers": 1}, "n_hidden_layers"),
    ],
)
def test_wrong_settings_are_named(device, encoding, message):
    """Unknown keys and values out of range are errors that say which."""
    with pytest.raises(ValueError, match=message):
        acorn_config(device, {"encoding": encoding})


def test_wrong_blocks_are_named(device):
    """A batch size of the wrong type, and optimizers that the last layer of the encoder has no step of."""
    with pytest.raises(ValueError, match="batch_size must be a positive whole number, got 'x'"):
        acorn_config(device, {"batch_size": "x"})
    for optimizer in ({"otype": "SGD"}, {"otype": "Ema", "decay": 0.9, "nested": {"otype": "Adam"}}):
        with pytest.raises(ValueError, match="must be Adam, without a moving average"):
            acorn_config(device, {"optimizer": optimizer})


def test_missing_file_is_an_image_error(tmp_path):
    """No file, one clear error."""
    with pytest.raises(ImageError, match=r"none\.png"):
        AcornTask(tmp_path / "none.png", device="cpu")
