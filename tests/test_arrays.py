"""Arrays of other libraries arrive in place, converted where they must be, and refused by name."""

import numpy as np
import pytest
import warp as wp

from nrc.arrays import as_count, as_rows, as_values, as_written_rows, as_written_values

CPU = wp.get_device("cpu")


class CudaLike:
    """An array of a library that speaks DLPack alone."""

    def __init__(self, values: np.ndarray) -> None:
        self.values = values

    def __dlpack__(self, **options: object) -> object:
        return self.values.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.values.__dlpack_device__()


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).random(shape, dtype=np.float32)


def test_matching_arrays_are_not_copied():
    """NumPy, DLPack and Warp arrays of the right type keep their memory, for reading and for writing."""
    x = random(6, 3)
    address = x.ctypes.data
    for array in (x, CudaLike(x), wp.array(x, copy=False, device="cpu")):
        assert as_rows("x", array, 3, CPU).ptr == address
        assert as_written_rows("out", array, 3, CPU, 6).ptr == address
    assert as_rows("x", x[::2], 3, CPU).ptr == address  # rows may lie apart
    np.testing.assert_array_equal(as_rows("x", x[::2], 3, CPU).numpy(), x[::2])


def test_torch_tensors_are_not_copied():
    """Also those that autograd follows."""
    torch = pytest.importorskip("torch", reason="needs PyTorch")
    x = torch.rand(5, 2, requires_grad=True)
    assert as_rows("x", x, 2, CPU).ptr == x.data_ptr()


def test_vectors_count_as_rows():
    """An array of vec3 is the (rows, 3) of its components, also to write to."""
    x = wp.zeros(4, dtype=wp.vec3, device="cpu")
    rows = as_written_rows("out", x, 3, CPU, 4)
    assert rows.ptr == x.ptr
    rows.fill_(2.0)
    np.testing.assert_array_equal(x.numpy(), np.full((4, 3), 2.0))


@pytest.mark.parametrize("dtype", [np.float64, np.float16, np.int32, np.uint8])
def test_other_types_are_converted(dtype: type):
    """Values of other number types arrive as float32."""
    x = (100 * random(7, 2)).astype(dtype)
    for array in (x, wp.array(x, device="cpu")):
        np.testing.assert_array_equal(as_rows("x", array, 2, CPU).numpy(), x.astype(np.float32))


def test_columns_apart_are_copied():
    """Transposed storage is gathered into rows."""
    x = random(3, 8)
    np.testing.assert_array_equal(as_rows("x", x.T, 3, CPU).numpy(), x.T)


@pytest.mark.parametrize(
    "array, message",
    [
        (random(4, 3), r"x must have shape \(rows, 2\), got float32\[4, 3\] on cpu"),
        (random(4), r"x must have shape \(rows, 2\), got float32\[4\] on cpu"),
        ([[0.0, 1.0]], r"x must be an array \(NumPy, Warp, DLPack or CUDA array interface\), got list"),
        (np.array([["a", "b"]]), "x: cannot read an array of <U1"),
        (random(2, 2).astype(np.complex64), "x: cannot read an array of complex64"),
    ],
)
def test_wrong_inputs_are_named(array: object, message: str):
    """What is no (rows, columns) array is refused with what it is."""
    with pytest.raises(ValueError, match=message):
        as_rows("x", array, 2, CPU)


def test_outputs_must_be_usable_in_place():
    """A conversion would write elsewhere, so it is an error."""
    read_only = random(4, 2)
    read_only.setflags(write=False)
    for array, message in (
        (random(4, 2).astype(np.float64), "float64"),
        (random(2, 4).T, "contiguous rows"),
        (read_only, "writable"),
        (random(3, 2), "out has 3 rows, x has 4"),
    ):
        with pytest.raises(ValueError, match=message):
            as_written_rows("out", array, 2, CPU, 4)
    with pytest.raises(ValueError, match="dL_dparams must be 5 contiguous float32"):
        as_written_values("dL_dparams", random(4), 5, CPU)
    with pytest.raises(ValueError, match="writable"):
        as_written_values("dL_dparams", np.frombuffer(bytes(20), np.float32), 5, CPU)


def test_values_are_converted():
    """A flat array of another type is copied where it is read; its length is checked."""
    np.testing.assert_array_equal(as_values("pdf", np.arange(4), 4, CPU).numpy(), np.arange(4.0))
    with pytest.raises(ValueError, match=r"pdf must have shape \(5,\), got float32\[4\]"):
        as_values("pdf", random(4), 5, CPU)


def test_brain_floats_are_converted():
    """torch's bfloat16, which NumPy does not know."""
    torch = pytest.importorskip("torch", reason="needs PyTorch")
    np.testing.assert_array_equal(
        as_values("p", torch.full((3,), 1.5, dtype=torch.bfloat16), 3, CPU).numpy(), [1.5] * 3
    )


def test_counts_come_from_any_library():
    """One int32, in place; nothing else."""
    count = np.array([7], np.int32)
    assert as_count(count, CPU).ptr == count.ctypes.data and as_count(None, CPU) is None
    for wrong in (np.array([7]), np.zeros(2, np.int32), 7):
        with pytest.raises(ValueError, match="count"):
            as_count(wrong, CPU)


def test_views_keep_their_memory():
    """A temporary array of vectors lives as long as what reads it."""
    rows = [as_rows("x", wp.array(np.full((5000, 3), i), dtype=wp.vec3, device="cpu"), 3, CPU) for i in range(50)]
    for i, row in enumerate(rows):
        assert (row.numpy() == i).all()
