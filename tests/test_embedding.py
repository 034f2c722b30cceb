"""The cache in another renderer: arrays of any library in place, no allocation, the query inlined, the example."""

from __future__ import annotations

import runpy
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import warp as wp

from nrc import CacheConfig, RadianceCache, Records, TrainingPaths, make_query, training_tiles
from nrc.kernels.paths import TrainingTiles, has_spread, primary_footprint, spread_increment, training_slot
from nrc.kernels.query import CacheView
from nrc.kernels.records import RecordView, TrainingView, close_path, open_record, store_record
from nrc.launch import launch
from nrc.records import FIELDS
from nrc.scan import ExclusiveScan

CHECKOUT = Path(__file__).resolve().parent.parent
EXAMPLE = CHECKOUT / "examples" / "custom_renderer.py"
BOUNDS = (np.array([-1.0, -1.0, -1.0]), np.array([1.0, 1.0, 1.0]))
SMALL = CacheConfig(batch_size=64, radiance_scale=1.0)
N = 300
# The inlined query adds up the same products in another order: single precision, 64 to 5 x 64 of them.
ROUNDING = 1e-4
MAX_MARKED_LINES = 59

wp.set_module_options({"enable_backward": False})


def random_arrays(n: int = N, seed: int = 0) -> dict[str, np.ndarray]:
    """Plausible records inside `BOUNDS`."""
    rng = np.random.default_rng(seed)
    wo, normal = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in rng.normal(size=(2, n, 3)))
    normal *= np.where(np.sum(wo * normal, axis=1, keepdims=True) < 0.0, -1.0, 1.0)
    arrays = {"position": rng.uniform(*BOUNDS, (n, 3)), "wo": wo, "normal": normal, "roughness": rng.random(n)}
    arrays |= {"diffuse": rng.uniform(0.1, 0.6, (n, 3)), "specular": rng.uniform(0.0, 0.3, (n, 3))}
    return {name: values.astype(np.float32) for name, values in arrays.items()}


def radiance_of(arrays: dict[str, np.ndarray]) -> np.ndarray:
    """A smooth field to learn."""
    light = 1.0 + arrays["position"][:, :1] ** 2
    return np.ascontiguousarray(light * (arrays["diffuse"] + arrays["specular"]), np.float32)


def cache_of(config: CacheConfig = SMALL, n: int = 4096, rounds: int = 0, device: str = "cpu") -> RadianceCache:
    """A cache after some rounds of training."""
    cache = RadianceCache(BOUNDS, config, max_queries=n, max_records=n, device=device)
    for i in range(rounds):
        arrays = random_arrays(256, seed=100 + i)
        cache.train(Records.of(**{k: wp.array(v, device=device) for k, v in arrays.items()}), radiance_of(arrays))
    return cache


def count_of(n: int, device: str = "cpu") -> wp.array:
    return wp.array([n], dtype=int, device=device)


# --- arrays of other libraries ---------------------------------------------------------------------------------------


class OnlyDlpack:
    """An array of a library that speaks DLPack alone."""

    def __init__(self, values: np.ndarray) -> None:
        self.values = values

    def __dlpack__(self, **options: Any) -> Any:
        return self.values.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.values.__dlpack_device__()


def to_warp_vectors(values: np.ndarray) -> wp.array:
    return wp.array(values, dtype=wp.vec3 if values.ndim == 2 else float, device="cpu")


def to_torch(values: np.ndarray) -> Any:
    torch = pytest.importorskip("torch", reason="needs PyTorch")
    return torch.tensor(values, requires_grad=values.ndim == 2)


def to_jax(values: np.ndarray) -> Any:
    return pytest.importorskip("jax.numpy", reason="needs JAX").asarray(values)


def to_drjit(values: np.ndarray) -> Any:
    drjit = pytest.importorskip("drjit", reason="needs Dr.Jit")
    try:
        array = drjit.llvm.TensorXf(values.copy()) if values.ndim == 2 else drjit.llvm.Float(values.copy())
        drjit.eval(array)
    except Exception as error:
        pytest.skip(f"Dr.Jit's LLVM backend does not start, set DRJIT_LIBLLVM_PATH to libLLVM: {error}")
    return array


LIBRARIES = {
    "numpy": lambda values: values.copy(),
    "warp rows": lambda values: wp.array(values, device="cpu"),
    "warp vectors": to_warp_vectors,
    "dlpack": lambda values: OnlyDlpack(values.copy()),
    "torch": to_torch,
    "jax": to_jax,
    "drjit": to_drjit,
}


@pytest.mark.parametrize("library", LIBRARIES)
def test_records_are_used_in_place(library: str):
    """A change to the caller's memory changes the next answer, which is that of the changed values."""
    cache, before, after = cache_of(rounds=8), random_arrays(), random_arrays(seed=1)
    theirs = {name: LIBRARIES[library](values) for name, values in before.items()}
    records = Records.of(**theirs)
    assert records.capacity == N and records.device == cache.device
    first = cache.query(records).numpy()[:N].copy()
    for name, values in after.items():  # through Warp, which is the same memory
        getattr(records, name).assign(values)
    again = cache.query(records).numpy()[:N].copy()
    for answer, arrays in ((first, before), (again, after)):
        np.testing.assert_array_equal(answer, cache.query(Records.of(**arrays)).numpy()[:N])
    for name, array in theirs.items():
        there = array.values if isinstance(array, OnlyDlpack) else array
        there = there.detach() if hasattr(there, "detach") else there
        np.testing.assert_array_equal(np.asarray(there).reshape(after[name].shape), after[name])


def test_jax_arrays_are_read_in_place_and_never_written():
    """Addresses of finished and pending arrays are the records' own; answers can be seen; writing is refused."""
    jax = pytest.importorskip("jax", reason="needs JAX (pip install jax)")
    cpu = jax.devices("cpu")[0]
    arrays = {name: jax.device_put(values, cpu) for name, values in random_arrays().items()}
    pending = jax.jit(lambda x: jax.numpy.sin(x @ jax.numpy.ones((3, 3)) @ jax.numpy.eye(3)))(arrays["position"])
    records = Records.of(**arrays | {"position": pending})
    np.testing.assert_array_equal(records.position.numpy(), pending)
    for name, array in (arrays | {"position": pending}).items():
        assert getattr(records, name).ptr == array.unsafe_buffer_pointer()
    cache = cache_of(rounds=4)
    answers = cache.query(records)
    seen = jax.numpy.from_dlpack(answers)
    assert seen.unsafe_buffer_pointer() == answers.ptr
    np.testing.assert_array_equal(seen, answers.numpy())
    out = jax.numpy.full((N, 3), -7.0)
    with pytest.raises(ValueError, match="out must be writable float32"):
        cache.query(records, out=out)
    assert (out == -7.0).all()
    with pytest.raises(ValueError, match=r"position: cannot read .*Tracer"):
        jax.jit(lambda x: Records.of(**arrays | {"position": x}).capacity)(pending)


def test_records_may_be_what_warp_sees_first():
    """DLPack arrays in a new process, before anything else has initialised Warp."""
    program = """
import numpy as np
from nrc import Records
class Array:
    def __init__(self, *shape): self.values = np.zeros(shape, np.float32)
    def __dlpack__(self, **options): return self.values.__dlpack__(**options)
    def __dlpack_device__(self): return self.values.__dlpack_device__()
fields = {name: Array(5, 3) for name in ("position", "wo", "normal", "diffuse", "specular")}
print(Records.of(roughness=Array(5), **fields).capacity)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=CHECKOUT)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "5", done.stderr


def test_records_share_addresses():
    """Pointers of NumPy arrays, torch tensors and rows that lie apart in one buffer are the records' own."""
    torch = pytest.importorskip("torch", reason="needs PyTorch")
    gbuffer = np.zeros((N, 16), np.float32)
    arrays: dict[str, Any] = random_arrays()
    arrays["position"], arrays["wo"] = gbuffer[:, :3], gbuffer[:, 4:7]
    gbuffer[:, :3] = random_arrays()["position"]
    arrays["normal"] = torch.tensor(arrays["normal"])
    records = Records.of(**arrays)
    assert records.position.ptr == gbuffer.ctypes.data
    assert records.wo.ptr == gbuffer.ctypes.data + 16 and records.wo.strides == (64,)
    assert records.normal.ptr == arrays["normal"].data_ptr()
    assert records.roughness.ptr == arrays["roughness"].ctypes.data
    np.testing.assert_array_equal(records.position.numpy(), gbuffer[:, :3])


def with_array(name: str, values: Any) -> dict[str, Any]:
    return random_arrays() | {name: values}


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (with_array("wo", np.zeros((N, 3))), r"wo: expected \(300, 3\) float32 .* got float64\[300, 3\] on cpu"),
        (with_array("wo", np.zeros((N - 1, 3), np.float32)), r"wo: expected \(300, 3\) .* got float32\[299, 3\]"),
        (with_array("wo", np.zeros((3, N), np.float32)), r"wo: expected \(300, 3\) .* got float32\[3, 300\]"),
        (with_array("wo", np.zeros((3, N), np.float32).T), r"wo: .*side by side.* strides \(4, 1200\) bytes"),
        (with_array("roughness", np.zeros((N, 1), np.float32)), r"roughness: expected \(300,\) float32 on cpu"),
        (with_array("diffuse", [[0.5, 0.5, 0.5]] * N), r"diffuse must be an array .* got list"),
        (with_array("position", np.zeros((N, 3), np.float16)), r"position: expected \(300, 3\) float32"),
        (with_array("position", 3.0), "position must be an array"),
    ],
)
def test_records_refuse_what_would_be_copied(arrays: dict[str, Any], message: str):
    """A copy would not follow the caller's array, so it is an error that names the field and what was expected."""
    with pytest.raises(ValueError, match=message):
        Records.of(**arrays)


def test_records_need_every_field():
    """None is silently zero."""
    arrays = random_arrays()
    del arrays["specular"]
    with pytest.raises(TypeError, match="specular"):
        Records.of(**arrays)


@pytest.mark.parametrize("library", LIBRARIES)
def test_targets_come_from_any_library(library: str):
    """The same weights, bit for bit, whatever holds the targets, other number types included."""
    arrays = random_arrays()
    targets = radiance_of(arrays)
    ours, theirs = cache_of(), cache_of()
    for _ in range(2):
        ours.train(Records.of(**arrays), targets)
        theirs.train(Records.of(**arrays), LIBRARIES[library](targets))
    assert ours.field.params.numpy().tobytes() == theirs.field.params.numpy().tobytes()
    theirs.train(Records.of(**arrays), targets.astype(np.float64))
    ours.train(Records.of(**arrays), targets)
    assert ours.field.params.numpy().tobytes() == theirs.field.params.numpy().tobytes()
    with pytest.raises(ValueError, match="targets"):
        ours.train(Records.of(**arrays), targets[:, :2])


@pytest.mark.parametrize("library", ["numpy", "warp rows", "warp vectors", "torch"])
@pytest.mark.parametrize("method", ["query", "query_primary"])
def test_answers_go_into_the_callers_array(library: str, method: str):
    """The rows that count, bit for bit those of the cache's own array; the others keep what they held."""
    cache, records = cache_of(rounds=4), Records.of(**random_arrays())
    expected = getattr(cache, method)(records).numpy()[:N].copy()
    out = LIBRARIES[library](np.full((N + 5, 3), -7.0, np.float32))
    if hasattr(out, "detach"):
        out = out.detach()
    returned = getattr(cache, method)(records, count_of(200), out=out)
    answer = out.numpy() if hasattr(out, "numpy") else out
    np.testing.assert_array_equal(answer[:200], expected[:200])
    assert (answer[200:] == -7.0).all()
    np.testing.assert_array_equal(returned.numpy(), answer)


@pytest.mark.parametrize("shape, dtype", [((N, 3), np.float64), ((N - 1, 3), np.float32), ((N, 4), np.float32)])
def test_answers_need_room(shape: tuple[int, int], dtype: type):
    """An array that cannot take them in place is an error."""
    with pytest.raises(ValueError, match="out"):
        cache_of().query(Records.of(**random_arrays()), out=np.zeros(shape, dtype))


# --- frames without records, frames without allocations --------------------------------------------------------------


def weights(cache: RadianceCache) -> bytes:
    state = cache.state()
    return b"".join(state[name].tobytes() for name in sorted(state) if name != "trainer.counters")


@pytest.mark.parametrize("frame", ["count 0", "no room", "no paths"])
def test_frame_without_records_changes_nothing(frame: str):
    """No step, no average, no round: with a count of 0, with records of capacity 0, and with paths that leave none."""
    cache = cache_of(rounds=3)
    before, answers = weights(cache), cache.query(Records.of(**random_arrays())).numpy().copy()
    rounds = cache.stats()["rounds"]
    for _ in range(2):
        if frame == "count 0":
            cache.train(Records.of(**random_arrays()), np.ones((N, 3), np.float32), count_of(0))
            cache.query(Records.of(**random_arrays(seed=3)), count_of(0))
        elif frame == "no room":
            empty = Records.of(**random_arrays(0))
            cache.train(empty, np.ones((0, 3), np.float32))
            assert cache.query(empty).shape == (4096, 3)
        else:
            paths = TrainingPaths(8, 4, "cpu")
            paths.clear()
            cache.train_paths(paths)
    assert weights(cache) == before and cache.stats()["rounds"] == rounds and cache.stats()["records"] == 0
    np.testing.assert_array_equal(cache.query(Records.of(**random_arrays())).numpy(), answers)


class Memory:
    """Watches an allocator: how often it was asked, and for how many bytes that are still held."""

    def __init__(self, allocator: Any) -> None:
        self.n_calls, self.held = 0, 0
        self._allocate, self._deallocate = allocator.allocate, allocator.deallocate
        self.allocator = allocator

    def allocate(self, n_bytes: int) -> int:
        self.n_calls += 1
        self.held += n_bytes
        return self._allocate(n_bytes)

    def deallocate(self, pointer: int, n_bytes: int) -> None:
        self.held -= n_bytes
        self._deallocate(pointer, n_bytes)


@contextmanager
def watched(device: wp.Device) -> Iterator[Memory]:
    """Count what Warp allocates on `device` inside."""
    allocator = device.get_allocator()
    memory = Memory(allocator)
    allocator.allocate, allocator.deallocate = memory.allocate, memory.deallocate
    try:
        yield memory
    finally:
        del allocator.allocate, allocator.deallocate


@wp.kernel
def leave_paths(first: int, n_vertices: int, training: TrainingView, queries: RecordView):
    """Training paths of up to n_vertices records at made-up points. One thread per slot."""
    slot = first + wp.tid()
    up = wp.vec3(0.0, 0.0, 1.0)
    grey = wp.vec3(0.5, 0.4, 0.3)
    black = wp.vec3(0.0, 0.0, 0.0)
    n_records = slot * 0  # a variable, not a constant
    for k in range(slot % (n_vertices + 1)):
        p = wp.vec3(0.01 * float(slot % 97), 0.1 * float(k), 0.0)
        place = open_record(training, slot, n_records, wp.vec3(0.1, 0.2, 0.3) * float(k), grey)
        store_record(training.records, place, p, -up, up, 0.5, grey, black)
        store_record(queries, slot, p, up, up, 0.5, grey, black)
        n_records += 1
    store_record(training.tail, slot, wp.vec3(0.3, 0.4, 0.01 * float(slot % 97)), up, up, 0.5, grey, black)
    close_path(training, slot, n_records, wp.vec3(1.0, 1.0, 1.0), grey, slot % 2)


class Frames:
    """The calls of a renderer that embeds the cache."""

    def __init__(self, config: CacheConfig = SMALL, device: str = "cpu") -> None:
        self.cache = RadianceCache(BOUNDS, config, max_queries=N, max_records=N * 8, device=device)
        self.device = self.cache.device
        self.paths, self.queries = TrainingPaths(N, 8, self.device), Records(N, self.device)
        self.out = wp.zeros((N, 3), dtype=float, device=self.device)
        self.count = count_of(N - 7, device)

    def frame(self) -> None:
        self.paths.clear()
        launch(leave_paths, N, inputs=[5, self.paths.view, self.queries.view], device=self.device)
        self.cache.train_paths(self.paths)
        self.cache.query(self.queries, self.count, out=self.out)
        self.cache.query_primary(self.queries)
        self.cache.device_view()


@pytest.mark.parametrize("replay", [0.0, 0.25])
@pytest.mark.parametrize("encoding", ["hash", "frequency"])
def test_frames_allocate_and_read_back_nothing(encoding: str, replay: float, monkeypatch: pytest.MonkeyPatch):
    """After the first frame Warp's allocator is not asked again, and nothing waits for the device or copies from it.

    Nor after a cut, and with records of past frames.
    """
    frames = Frames(CacheConfig(encoding, batch_size=64, replay=replay))
    frames.frame()

    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError("a frame reads back or synchronises")

    for name in ("numpy", "list", "to", "__int__", "__float__"):
        monkeypatch.setattr(wp.array, name, refuse, raising=False)
    for name in ("synchronize", "synchronize_device", "synchronize_stream", "synchronize_event"):
        monkeypatch.setattr(wp, name, refuse)
    with watched(frames.device) as memory:
        for keep_records in (True, True, False):
            frames.cache.cut(keep_records=keep_records)
            frames.frame()
    monkeypatch.undo()
    assert memory.n_calls == 0
    assert frames.cache.stats()["rounds"] == 4


def test_watched_allocator_notices():
    """The check above sees an array made by Warp."""
    with watched(wp.get_device("cpu")) as memory:
        wp.zeros(10, dtype=float, device="cpu")
    assert memory.n_calls == 1 and memory.held == 0


@pytest.mark.parametrize("encoding", ["hash", "frequency"])
def test_memory_is_what_was_allocated(encoding: str):
    """`memory_bytes` adds up to what Warp's allocator gave the cache, and names the parameters twice: their average."""
    config = CacheConfig(encoding, replay=0.25)
    with watched(wp.get_device("cpu")) as memory:
        cache = RadianceCache(BOUNDS, config, max_queries=1000, max_records=500, device="cpu")
        cache.train(Records.of(**random_arrays()), radiance_of(random_arrays()))
        cache.query(Records.of(**random_arrays()))
        parts = cache.memory_bytes
        assert parts["total"] == memory.held
    assert parts["parameters"] == 8 * cache.field.n_params and min(parts.values()) > 0
    assert parts["total"] == sum(parts.values()) - parts["total"]


@pytest.mark.parametrize("n", [1, 2, 255, 256, 257, 511, 5000, 256 * 256, 256 * 256 + 1, 200_000])
def test_scan_matches_numpy(n: int):
    """Exclusive sums and totals, also of fewer values than there is room for."""
    scan = ExclusiveScan(max(n, 300), wp.get_device("cpu"))
    values = np.random.default_rng(n).integers(0, 5, n).astype(np.int32)
    places, total = wp.full(n, -1, dtype=int, device="cpu"), wp.full(1, -1, dtype=int, device="cpu")
    for m in {n, max(1, n // 3)}:
        scan(m, wp.array(values, device="cpu"), places, total)
        np.testing.assert_array_equal(places.numpy()[:m], np.cumsum(values[:m]) - values[:m])
        assert total.numpy()[0] == values[:m].sum()


# --- device functions ------------------------------------------------------------------------------------------------


def make_ask(config: CacheConfig) -> wp.Kernel:
    """A kernel of the caller's that asks the cache about each record itself."""
    query = make_query(config)

    @wp.kernel(module="unique", enable_backward=False)
    def ask(first: int, view: CacheView, r: RecordView, out: wp.array[wp.vec3]):
        """One thread per record."""
        i = first + wp.tid()
        out[i] = query(view, r.position[i], r.wo[i], r.normal[i], r.roughness[i], r.diffuse[i], r.specular[i])

    return ask


@pytest.mark.parametrize(
    "config",
    [
        CacheConfig(batch_size=64),
        CacheConfig("frequency", batch_size=64),
        CacheConfig(batch_size=64, n_neurons=32, n_hidden_layers=1, n_levels=4, n_features_per_level=2),
    ],
    ids=["hash", "frequency", "small"],
)
@pytest.mark.parametrize("average", [True, False])
def test_inlined_query_answers_as_the_cache(config: CacheConfig, average: bool):
    """Averaged weights as `query`, those being trained as `query_primary`, to rounding; black channels stay black."""
    cache, arrays = cache_of(config, rounds=12), random_arrays(2000)
    arrays["diffuse"][::5, 1] = arrays["specular"][::5, 1] = 0.0
    records = Records.of(**arrays)
    out = wp.full(2000, wp.vec3(np.nan), dtype=wp.vec3, device="cpu")
    inputs = [cache.device_view(average=average), records.view]
    launch(make_ask(config), 2000, inputs=inputs, outputs=[out], device=cache.device)
    expected = (cache.query if average else cache.query_primary)(records).numpy()[:2000]
    assert expected.mean() > 0.1 and not expected[::5, 1].any()
    np.testing.assert_allclose(out.numpy(), expected, rtol=ROUNDING, atol=ROUNDING * expected.mean())


def test_inlined_query_of_broken_weights_is_black():
    """Not NaN."""
    cache = cache_of(rounds=2)
    cache.field.params.fill_(np.nan)
    out = wp.full(N, wp.vec3(1.0), dtype=wp.vec3, device="cpu")
    inputs = [cache.device_view(average=False), Records.of(**random_arrays()).view]
    launch(make_ask(SMALL), N, inputs=inputs, outputs=[out], device=cache.device)
    assert not out.numpy().any()


def test_query_function_is_made_once():
    """One function, and so one compilation, for caches that differ in how they learn alone."""
    assert make_query(CacheConfig(learning_rate=1e-3)) is make_query(CacheConfig(seed=5))
    assert make_query(CacheConfig(n_levels=7)) is not make_query(CacheConfig())


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [75, 90])
@pytest.mark.parametrize("encoding", ["hash", "frequency"])
def test_inlined_query_compiles_for_cuda(encoding: str, architecture: int, tmp_path: Path):
    """Down to machine code, without a GPU."""
    module = make_ask(CacheConfig(encoding)).module
    (cubin,) = wp.compile_aot_module(module, arch=architecture, module_dir=tmp_path, use_ptx=False)
    assert cubin.read_bytes()[:4] == b"\x7fELF"


@wp.kernel
def measure_spread(
    first: int, distance: wp.array[float], pdf: wp.array[float], cosine: wp.array[float], threshold: float,
    out: wp.array2d[float],
):  # fmt: skip
    """Footprints of one bounce. One thread per path."""
    i = first + wp.tid()
    out[i, 0] = spread_increment(distance[i], pdf[i], cosine[i])
    out[i, 1] = primary_footprint(distance[i], cosine[i])
    out[i, 2] = wp.where(has_spread(out[i, 0], out[i, 1], threshold), 1.0, 0.0)


def test_spread_functions_match_the_paper():
    """Eq. 3 and 4, Müller et al. 2021: sqrt(d² / (p cos)), d² / (4 pi cos), a > c a_0."""
    rng = np.random.default_rng(0)
    distance, pdf, cosine = rng.uniform(0.1, 5.0, 100), rng.uniform(0.01, 3.0, 100), rng.uniform(0.01, 1.0, 100)
    out = wp.zeros((100, 3), dtype=float, device="cpu")
    inputs = [*(wp.array(v, dtype=float, device="cpu") for v in (distance, pdf, cosine)), 8.0]
    launch(measure_spread, 100, inputs=inputs, outputs=[out], device=out.device)
    spread, footprint = np.sqrt(distance**2 / (pdf * cosine)), distance**2 / (4.0 * np.pi * cosine)
    expected = np.stack([spread, footprint, spread**2 > 8.0 * footprint], axis=1)
    np.testing.assert_allclose(out.numpy(), expected, rtol=1e-5)
    assert 0.2 < expected[:, 2].mean() < 0.8


@wp.kernel
def number_pixels(first: int, width: int, tiles: TrainingTiles, out: wp.array[int]):
    """Slot of each pixel. One thread per pixel."""
    i = first + wp.tid()
    out[i] = training_slot(tiles, i % width, i // width)


@pytest.mark.parametrize("n_paths", [0, 1, 30, 10_000])
def test_training_tiles_give_each_slot_one_pixel(n_paths: int):
    """At most as many slots as paths, no slot twice, another choice in another frame; none for no paths."""
    width, height, seen = 37, 23, []
    for frame in range(4):
        out = wp.full(width * height, -2, dtype=int, device="cpu")
        tiles = training_tiles(width, height, n_paths, frame)
        launch(number_pixels, width * height, inputs=[width, tiles], outputs=[out], device=out.device)
        slots = out.numpy()
        chosen = slots[slots >= 0]
        assert len(np.unique(chosen)) == len(chosen) <= n_paths and slots.min() >= -1
        assert chosen.max(initial=-1) < max(n_paths, 1)
        seen.append(slots.tobytes())
    assert n_paths not in (1, 30) or len(set(seen)) > 1


def test_training_paths_become_records_and_targets():
    """T_i = A_i + B_i T_{i+1} from the tails that the primary weights give, against a loop in NumPy; then training."""
    frames, same = Frames(), Frames()
    paths, cache = frames.paths, frames.cache
    paths.clear()
    launch(leave_paths, N, inputs=[5, paths.view, frames.queries.view], device=frames.device)
    paths.compact_tails()
    tails = cache.query_primary(paths.tails, paths.n_tails)
    paths.gather_targets(tails)
    tails, expected, positions = tails.numpy(), [], []
    grey, n_seen = np.array([0.5, 0.4, 0.3]), 0
    for slot in range(N):
        n = slot % 6
        T = np.zeros(3)
        if n > 0 and slot % 2:
            T, n_seen = tails[n_seen].astype(np.float64), n_seen + 1
        path = []
        for k in reversed(range(n)):
            last = k == n - 1
            A, B = (np.ones(3), grey * (slot % 2)) if last else (np.array([0.1, 0.2, 0.3]) * (k + 1), grey)
            T = A + B * T
            path.append((T, (0.01 * (slot % 97), 0.1 * k, 0.0)))
        for T, p in reversed(path):
            expected.append(T)
            positions.append(p)
    n = int(paths.n_records.numpy()[0])
    assert n == len(expected) == sum(slot % 6 for slot in range(N)) and n_seen == int(paths.n_tails.numpy()[0])
    np.testing.assert_allclose(paths.targets.numpy()[:n], expected, rtol=1e-5)
    np.testing.assert_allclose(paths.records.position.numpy()[:n], positions, atol=1e-6)
    assert (paths.records.normal.numpy()[:n] == [0.0, 0.0, -1.0]).all()  # turned to wo's side
    cache.train(paths.records, paths.targets, paths.n_records)
    same.paths.clear()
    launch(leave_paths, N, inputs=[5, same.paths.view, same.queries.view], device=same.device)
    same.cache.train_paths(same.paths)
    assert weights(cache) == weights(same.cache)


def test_device_functions_know_no_scenes():
    """What another renderer's kernels import brings in neither this path tracer's scenes nor its materials."""
    program = (
        "import sys\nfrom nrc import RadianceCache, Records, TrainingPaths, make_query, training_tiles\n"
        "import nrc.kernels.paths, nrc.kernels.query, nrc.kernels.records\n"
        "print([m for m in sys.modules if m in ('nrc.scene', 'nrc.pathtracer', 'nrc.kernels.trace', 'nrc.kernels.bsdf',"
        " 'nrc.kernels.scene', 'nrc.assets')])"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=CHECKOUT)
    assert run.stdout.splitlines()[-1] == "[]"


# --- finding mistakes ------------------------------------------------------------------------------------------------


def test_check_finds_nothing_in_good_records():
    """No line for what the other tests use."""
    assert Records.of(**random_arrays()).check(bounds=BOUNDS) == []


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("wo", (0.0, 0.0, 2.0), "1 of 9 records have a wo that is not of length 1"),
        ("normal", (0.0, 0.0, 0.0), "1 of 9 records have a normal that is not of length 1"),
        ("normal", (0.0, 0.0, np.nan), "1 of 9 records are not finite"),
        ("roughness", 1.5, "1 of 9 records have a roughness outside [0, 1]"),
        ("diffuse", (0.1, 1.5, 0.1), "1 of 9 records have a diffuse albedo outside [0, 1]"),
        ("position", (0.0, 1.5, 0.0), "1 of 9 records lie outside the bounds"),
    ],
)
def test_check_names_each_mistake(name: str, values: Any, message: str):
    """One line, with how many; the records past the count are not looked at."""
    arrays = random_arrays(12)
    arrays["normal"][[4, 11]] = arrays["wo"][[4, 11]] = (0.0, 0.0, 1.0)
    arrays[name][[4, 11]] = values
    assert Records.of(**arrays).check(9, BOUNDS) == [message]


@pytest.mark.parametrize(
    "bounds",
    [
        BOUNDS[::-1],
        (np.zeros(3), np.array([1.0, np.nan, 1.0])),
        (np.zeros(3), np.array([1.0, np.inf, 1.0])),
        (np.zeros(2), np.ones(2)),
        (0.0, 1.0),
        np.zeros(3),
        np.zeros((3, 3)),
    ],
)
def test_check_refuses_wrong_bounds(bounds: Any):
    """Corners in the wrong order, of another shape, not finite: no record could be said to lie inside."""
    with pytest.raises(ValueError, match="bounds must be two finite corners of 3 numbers, the lower one first"):
        Records.of(**random_arrays()).check(bounds=bounds)


@pytest.mark.parametrize("count", [N + 1, -1, 1.5, "all"])
def test_check_refuses_wrong_counts(count: Any):
    """More records than there are, and what is no number."""
    with pytest.raises(ValueError, match="count must be a number from 0 to 300"):
        Records.of(**random_arrays()).check(count)


def test_check_finds_turned_normals_and_black_surfaces():
    """Normals on the other side of wo, and surfaces that can only be answered with 0."""
    arrays = random_arrays(12)
    arrays["normal"] *= -1.0
    arrays["diffuse"][3] = arrays["specular"][3] = 0.0
    lines = Records.of(**arrays).check()
    assert lines[0] == "12 of 12 records have a normal on the other side of wo"
    assert lines[1].startswith("1 of 12 records reflect nothing")


def test_records_of_another_device_are_refused():
    """Before anything is launched."""
    cache, records = cache_of(), Records.of(**random_arrays())
    records.device = SimpleNamespace(alias="cuda:3")
    with pytest.raises(ValueError, match="lie on"):
        cache.query(records)


# --- the example and the documentation -------------------------------------------------------------------------------


def stripped() -> str:
    """The example without the lines that the cache took."""
    return "\n".join(line for line in EXAMPLE.read_text().splitlines() if not line.endswith("# nrc")) + "\n"


def test_example_adds_the_cache_in_few_lines():
    """Fewer than 60 marked lines, no path tracer or scene of this package, and no trace of the cache without them."""
    text = EXAMPLE.read_text()
    assert 0 < sum(line.endswith("# nrc") for line in text.splitlines()) <= MAX_MARKED_LINES
    for name in ("nrc.scene", "PathTracer", "pathtracer", "kernels.bsdf", "kernels.trace"):
        assert name not in text
    assert "cache" not in stripped().split('"""', 2)[2] and "nrc.kernels" not in stripped()


def test_example_without_the_cache_is_the_renderer_before(tmp_path: Path):
    """The file without the marked lines runs, and its pictures are those of the whole file that does not use them."""
    (tmp_path / "before.py").write_text(stripped())
    films = []
    for path in (EXAMPLE, tmp_path / "before.py"):
        renderer = runpy.run_path(str(path))["Renderer"](12, 8, "cpu")
        for _ in range(3):
            renderer.frame()
        films.append(renderer.film.numpy())
    assert films[0].mean() > 0.0
    np.testing.assert_array_equal(films[1], films[0])


def test_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Tiny: four pictures, two lines, and a cache that was trained."""
    sizes = ["--size", "16", "12", "--seconds", "0.5", "--reference-seconds", "0.5", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["custom_renderer.py", str(tmp_path), *sizes])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    assert [path.name for path in sorted(tmp_path.iterdir())] == [
        "reference.png", "reference_16x12.exr", "with_cache.png", "without.png",
    ]  # fmt: skip
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("without: ") and lines[1].startswith("with_cache: ") and "relMSE" in lines[1]


def test_example_learns(tmp_path: Path):
    """The cache's records pass `check`, and after some frames its answers have the brightness of its targets."""
    renderer = runpy.run_path(str(EXAMPLE))["Renderer"](48, 32, "cpu", with_cache=True)
    for _ in range(40):
        renderer.frame()
    stats = renderer.cache.stats()
    assert stats["dropped_records"] == stats["invalid_queries"] == stats["skipped_steps"] == 0 < stats["records"]
    n = int(renderer.paths.n_records.numpy()[0])
    assert renderer.paths.records.check(n, (renderer.cache.bounds[0] - 1e-3, renderer.cache.bounds[1] + 1e-3)) == []
    target = renderer.paths.targets.numpy()[:n].mean()
    answer = renderer.cache.query(renderer.paths.records, renderer.paths.n_records).numpy()[:n].mean()
    assert 0.2 * target < answer < 3.0 * target  # few frames: of the right size, not exact


def test_documentation_runs(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """The Python of docs/embedding.md, top to bottom in one namespace, but for what needs CUDA or another package."""
    monkeypatch.chdir(tmp_path)
    text = (CHECKOUT / "docs" / "embedding.md").read_text()
    blocks = [block.split("```", 1)[0] for block in text.split("```python\n")[1:]]
    program = "\n".join(b for b in blocks if not any(word in b for word in ("cuda", "torch", "mitsuba")))
    path = tmp_path / "embedding.py"  # Warp reads kernels from files
    path.write_text(program)
    runpy.run_path(str(path), run_name="embedding")


# --- CUDA ------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("encoding", ["hash", "frequency"])
def test_captured_frame_equals_an_eager_one(encoding: str):
    """Paths, training and queries in one CUDA graph on another stream, launched five times, as five eager frames."""
    answers = []
    for captured in (False, True):
        frames = Frames(CacheConfig(encoding, batch_size=256, replay=0.25), "cuda:0")
        frames.frame()  # compiles and allocates
        if captured:
            with wp.ScopedStream(wp.Stream("cuda:0")):
                with wp.ScopedCapture("cuda:0") as capture:
                    frames.frame()
                for _ in range(5):
                    wp.capture_launch(capture.graph)
                wp.synchronize_stream(wp.get_stream("cuda:0"))
        else:
            for _ in range(5):
                frames.frame()
        assert frames.cache.stats()["rounds"] == 6
        answers.append(frames.out.numpy())
    # float atomics add the tables' gradients in another order
    np.testing.assert_allclose(answers[1], answers[0], rtol=0.02, atol=0.02 * answers[0].mean())


@pytest.mark.gpu
def test_frames_on_cuda_allocate_nothing():
    """Neither Warp's allocator is asked nor does the driver's pool grow."""
    frames = Frames(CacheConfig(batch_size=256), "cuda:0")
    frames.frame()
    wp.synchronize_device("cuda:0")
    before = wp.get_mempool_used_mem_current("cuda:0")
    with watched(frames.device) as memory:
        for _ in range(3):
            frames.frame()
    wp.synchronize_device("cuda:0")
    assert memory.n_calls == 0 and wp.get_mempool_used_mem_current("cuda:0") == before


@pytest.mark.gpu
def test_inlined_query_on_cuda_answers_as_the_cache():
    """Single precision inlined against the cache's half precision."""
    cache = cache_of(CacheConfig(batch_size=256), rounds=12, device="cuda:0")
    records = Records.of(**{k: wp.array(v, device="cuda:0") for k, v in random_arrays(2000).items()})
    out = wp.zeros(2000, dtype=wp.vec3, device="cuda:0")
    launch(make_ask(cache.config), 2000, inputs=[cache.device_view(), records.view], outputs=[out], device=cache.device)
    expected = cache.query(records).numpy()[:2000]
    assert np.linalg.norm(out.numpy() - expected) < 5e-3 * np.linalg.norm(expected)


@pytest.mark.gpu
def test_launches_follow_the_callers_stream():
    """Within `wp.ScopedStream` of torch's stream the answers are ready for torch without a synchronisation."""
    torch = pytest.importorskip("torch", reason="needs PyTorch")
    cache = cache_of(CacheConfig(batch_size=256), rounds=4, device="cuda:0")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream), wp.ScopedStream(wp.stream_from_torch(stream)):
        arrays = {name: torch.tensor(values, device="cuda:0") for name, values in random_arrays().items()}
        out = torch.zeros((N, 3), device="cuda:0")
        cache.query(Records.of(**arrays), out=out)
        total = out.sum()
    stream.synchronize()
    np.testing.assert_allclose(total.item(), out.cpu().numpy().sum(), rtol=1e-4)
    assert total.item() > 0.0 and FIELDS.keys() == arrays.keys()
