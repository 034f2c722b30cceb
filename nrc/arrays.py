"""Arrays from NumPy, Warp and whatever speaks DLPack or the CUDA array interface, without a copy where possible."""

from __future__ import annotations

import sys
from typing import Any, cast

import numpy as np
import warp as wp


def as_rows(name: str, array: Any, n_columns: int, device: wp.Device, n_rows: int = 0) -> wp.array:
    """(at least n_rows, n_columns) float32 on `device` with contiguous rows to read from.

    The caller's memory where device, type and layout match; a converted copy where they do not. Arrays of `n_columns`
    vectors count as rows.

    Raises:
        ValueError: Not an array, not of `n_columns` columns, or of too few rows.
    """
    view = _floats(name, array)
    if view.ndim != 2 or view.shape[1] != n_columns:
        raise ValueError(f"{name} must have shape (rows, {n_columns}), got {describe(view)}")
    _check_rows(name, view, n_rows)
    if view.shape[0] > 0 and view.strides[1] != 4 and n_columns > 1:
        view = view.contiguous()
    return view if view.device == device else view.to(device)


def as_written_rows(name: str, array: Any, n_columns: int, device: wp.Device, n_rows: int) -> wp.array:
    """The caller's own memory as (at least n_rows, n_columns) float32 on `device`, to write to.

    Raises:
        ValueError: Shape, type, device or layout do not allow that.
    """
    view = _view(name, array)
    read_only = _is_read_only(array)
    ok = view.ndim == 2 and view.dtype == wp.float32 and view.device == device and not read_only
    if not ok or view.shape[1] != n_columns or (view.shape[0] > 0 and view.strides[1] != 4 and n_columns > 1):
        kind = "writable " if read_only else ""
        raise ValueError(
            f"{name} must be {kind}float32 (rows, {n_columns}) with contiguous rows on {device}, got {describe(view)}"
        )
    _check_rows(name, view, n_rows)
    return view


def as_values(name: str, array: Any, n: int, device: wp.Device) -> wp.array:
    """(n,) contiguous float32 on `device` to read from, converted where necessary. ValueError for another shape."""
    view = _floats(name, array)
    if view.shape != (n,):
        raise ValueError(f"{name} must have shape ({n},), got {describe(view)}")
    view = view if view.is_contiguous or n == 0 else view.contiguous()
    return view if view.device == device else view.to(device)


def as_written_values(name: str, array: Any, n: int, device: wp.Device) -> wp.array:
    """The caller's own memory as (n,) contiguous float32 on `device`, to write to.

    Raises:
        ValueError: Shape, type, device or layout do not allow that.
    """
    view = _view(name, array)
    read_only = _is_read_only(array)
    ok = view.dtype == wp.float32 and view.device == device and (view.is_contiguous or n == 0) and not read_only
    if not ok or view.shape != (n,):
        kind = "writable " if read_only else ""
        raise ValueError(f"{name} must be {n} {kind}contiguous float32 on {device}, got {describe(view)}")
    return view


def as_vectors(name: str, array: Any, device: wp.Device, n_rows: int = 0) -> wp.array:
    """(at least n_rows,) vec3 on `device` to read from: the caller's memory where that is possible, else a copy.

    Raises:
        ValueError: Not an array of three columns, or of too few rows.
    """
    if isinstance(array, wp.array) and array.dtype == wp.vec3 and array.ndim == 1 and array.device == device:
        _check_rows(name, array, n_rows)
        return array
    rows = as_rows(name, array, 3, device, n_rows)
    vectors: Any = wp.array(
        ptr=rows.ptr, dtype=wp.vec3, shape=(rows.shape[0],), strides=(rows.strides[0],), device=rows.device, copy=False
    )
    vectors._ref = rows  # whose memory must outlive the view
    return vectors


def in_place(name: str, array: Any, dtype: Any, n: int, device: wp.Device) -> wp.array:
    """The caller's own memory as (n,) `dtype` (float or vec3) on `device`, to read from and never copied.

    (n, 3) float32 rows count as vec3. Raises ValueError: shape, type, device or layout do not allow that.
    """
    if isinstance(array, wp.array) and array.dtype == dtype and array.shape == (n,) and array.device == device:
        return array
    view = read_in_place(name, array)
    n_columns = 3 if dtype == wp.vec3 else 1
    shape = (n, 3) if n_columns == 3 else (n,)
    ok = view.shape == shape and view.dtype == wp.float32 and view.device == device
    if not ok or (n_columns == 3 and n > 0 and view.strides[1] != 4):
        rows = (
            f"({n}, 3) float32 with components side by side, or ({n},) vec3," if n_columns == 3 else f"({n},) float32"
        )
        strides = f", strides {view.strides} bytes" if ok else ""
        raise ValueError(f"{name}: expected {rows} on {device}, got {describe(view)}{strides}")
    return view if n_columns == 1 else as_vectors(name, view, device)


def read_in_place(name: str, array: Any) -> wp.array:
    """`array` of any library as a Warp array of scalars over the same memory. Raises ValueError where it is none."""
    return _view(name, array)


def owned_bytes(*owners: Any, skip: tuple[Any, ...] = ()) -> int:
    """Bytes of all device arrays that objects of this package hold, at any depth; memory seen twice counts once."""
    memory: dict[int, int] = {}
    seen: set[int] = {id(owner) for owner in skip}
    todo = list(owners)
    while todo:
        value = todo.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, wp.array):
            if value.deleter is not None:  # not a view of another
                memory[value.ptr] = value.capacity
        elif isinstance(value, (list, tuple)):
            todo += value
        elif isinstance(value, dict):
            todo += value.values()
        elif type(value).__module__.startswith("nrc.") or hasattr(value, "_ctype"):
            todo += vars(value).values()
    return sum(memory.values())


def as_count(count: Any, device: wp.Device) -> wp.array | None:
    """The caller's own array of one int32 on `device`, or None. Raises ValueError for anything else."""
    if count is None:
        return None
    if isinstance(count, int):
        raise ValueError(f"count must be an array of one int32 on {device}, got the number {count}")
    view = _view("count", count)
    if view.shape != (1,) or view.dtype != wp.int32 or view.device != device:
        raise ValueError(f"count must be an array of one int32 on {device}, got {describe(view)}")
    return view


def describe(array: Any) -> str:
    """Shape, type and device of `array` for an error message."""
    if isinstance(array, wp.array):
        return f"{wp.types.type_repr(array.dtype)}{list(array.shape)} on {array.device}"
    return repr(type(array))


def _is_read_only(array: Any) -> bool:
    """Whether the caller may not find `array` changed: NumPy's flag, and all arrays of JAX, whose memory is shared."""
    if isinstance(array, np.ndarray):
        return not array.flags.writeable
    jax = sys.modules.get("jax")
    return jax is not None and isinstance(array, jax.Array)


def _check_rows(name: str, view: wp.array, n_rows: int) -> None:
    if view.shape[0] < n_rows:
        raise ValueError(f"{name} has {view.shape[0]} rows, x has {n_rows}")


def _floats(name: str, array: Any) -> wp.array:
    """`array` as float32, in place or converted."""
    if isinstance(array, np.ndarray):
        if array.dtype.kind not in "fiub":
            raise ValueError(f"{name}: cannot read an array of {array.dtype}")
        array = np.asarray(array, np.float32)
    view = _view(name, array)
    if view.dtype == wp.float32:
        return view
    converted = wp.empty(view.shape, dtype=float, device=view.device)
    try:
        wp.utils.array_cast(view.contiguous(), converted)
    except RuntimeError as error:
        raise ValueError(f"{name}: cannot convert {describe(view)} to float32") from error
    return converted


def _view(name: str, array: Any) -> wp.array:
    """`array` as a Warp array of scalars over the same memory."""
    if isinstance(array, wp.array):
        if not wp.types.type_is_vector(array.dtype):
            return array
        vector: Any = array.dtype  # viewed with one more dimension
        scalar = vector._wp_scalar_type_
        view: Any = wp.array(
            ptr=array.ptr,
            dtype=scalar,
            shape=(*array.shape, vector._length_),
            strides=(*array.strides, wp.types.type_size_in_bytes(scalar)),
            device=array.device,
            copy=False,
        )
        view._ref = array  # whose memory must outlive the view
        return view
    try:
        if isinstance(array, np.ndarray):
            return wp.array(array, dtype=wp.dtype_from_numpy(array.dtype), device="cpu", copy=False)
        if hasattr(array, "__dlpack__"):  # torch, JAX, CuPy, DrJit
            array = array.detach() if getattr(array, "requires_grad", False) else array
            return cast(wp.array, wp.from_dlpack(array))
        if hasattr(array, "__cuda_array_interface__"):
            return wp.array(array, device=wp.get_device("cuda"), copy=False)
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{name}: cannot read {type(array).__name__}: {error}") from error
    raise ValueError(
        f"{name} must be an array (NumPy, Warp, DLPack or CUDA array interface), got {type(array).__name__}"
    )
