"""Arrays of other libraries arrive in place, converted where they must be, and refused by name."""

import numpy as np
import pytest
import warp as wp

from nrc.arrays import as_params, as_rows, as_written_rows, check_count

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
    with pytest.raises(ValueError, match="params must be 5 contiguous float32"):
        as_params("params", random(4), 5, CPU)
    with pytest.raises(ValueError, match="count must be one int32 on cpu"):
        check_count(wp.zeros(2, dtype=int, device="cpu"), CPU)
