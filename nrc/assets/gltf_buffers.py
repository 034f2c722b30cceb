"""glTF 2.0 container, buffers and accessors (Khronos specification, sections 3.6 and 4.4)."""

from __future__ import annotations

import base64
import binascii
import struct
from pathlib import Path
from urllib.parse import unquote, unquote_to_bytes

import numpy as np

from nrc.assets.fields import Field
from nrc.scene import SceneError

COMPONENTS = {5120: np.int8, 5121: np.uint8, 5122: np.int16, 5123: np.uint16, 5125: np.uint32, 5126: np.float32}
WIDTHS = {"SCALAR": 1, "VEC2": 2, "VEC3": 3, "VEC4": 4, "MAT4": 16}


class GltfFile:
    """An open .gltf or .glb file: its JSON (`root`) and the binary data it refers to. Raises SceneError throughout."""

    def __init__(self, path: Path) -> None:
        self.path = path
        data = path.read_bytes()
        self._chunk: bytes | None = None
        if data[:4] == b"glTF":
            text, self._chunk = _split_glb(data, path.name)
        else:
            text = data
        self.root = Field.parse(text, path.name)
        version = self.root.need("asset").need("version").string()
        if version.split(".")[0] != "2":
            raise self.root.error(f"asset.version: glTF {version} is not supported, only 2.x")
        self._buffers: dict[int, bytes] = {}

    def element(self, array: str, index: Field) -> Field:
        """The element of a top-level array that `index` refers to."""
        elements = self.root.list(array)
        return elements[index.index(len(elements), array)]

    def resource(self, uri: Field) -> bytes:
        """Bytes of a data URI or of a file beside this one."""
        text = uri.string()
        if text.startswith("data:"):
            head, comma, body = text.partition(",")
            try:
                if not comma:
                    raise ValueError("no comma")
                return base64.b64decode(body, validate=True) if head.endswith(";base64") else unquote_to_bytes(body)
            except (binascii.Error, ValueError) as error:
                raise uri.error(f"broken data URI: {error}") from None
        file = self.path.parent / unquote(text)
        try:
            return file.read_bytes()
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise uri.error(f"cannot read {text!r}: {reason}") from None

    def view(self, index: Field) -> tuple[memoryview, int | None]:
        """Bytes of a buffer view and its byte stride if it has one."""
        view = self.element("bufferViews", index)
        buffer = self._buffer(view.need("buffer"))
        offset_field = view.get("byteOffset")
        offset = offset_field.integer() if offset_field else 0
        length = view.need("byteLength").integer()
        if offset + length > len(buffer):
            raise view.error(f"ends at byte {offset + length} of a buffer of {len(buffer)} bytes")
        stride = view.get("byteStride")
        return memoryview(buffer)[offset : offset + length], stride.integer(4, 252) if stride else None

    def accessor(self, index: Field, types: tuple[str, ...], *, convert: bool = True) -> np.ndarray:
        """Values (count, width) of the accessor that `index` refers to.

        With `convert`, float64 with normalised integers mapped to [0, 1] or [-1, 1]; otherwise as stored.
        """
        field = self.element("accessors", index)
        kind = field.need("type").string()
        if kind not in types:
            raise index.error(f"accessors[{index.value}] has type {kind}, expected {' or '.join(types)}")
        width = WIDTHS[kind]
        count = field.need("count").integer(1, 2**31 - 1)
        component = self._component(field)
        if (view := field.get("bufferView")) is not None:
            values = self._elements(field, view, field.get("byteOffset"), component, count, width)
        else:
            values = np.zeros((count, width), component)
        if (sparse := field.get("sparse")) is not None:
            values = values.copy()
            n = sparse.need("count").integer(1, count)
            places, new = sparse.need("indices"), sparse.need("values")
            rows = self._elements(
                places, places.need("bufferView"), places.get("byteOffset"), self._component(places), n, 1
            )[:, 0].astype(np.int64)
            if rows.max() >= count or rows.min() < 0:
                raise places.error(f"index {rows.max()} of {count} elements")
            values[rows] = self._elements(new, new.need("bufferView"), new.get("byteOffset"), component, n, width)
        if not convert:
            return values
        with np.errstate(invalid="ignore"):  # values that are not numbers are found by whoever checks the result
            result = values.astype(np.float64)
        normalized = field.get("normalized")
        if normalized is not None and normalized.boolean() and np.issubdtype(component, np.integer):
            result = np.maximum(result / np.iinfo(component).max, -1.0)
        return result

    @staticmethod
    def _component(field: Field) -> np.dtype:
        code = field.need("componentType")
        if code.integer() not in COMPONENTS:
            raise code.wrong(f"one of {', '.join(map(str, COMPONENTS))}")
        return np.dtype(COMPONENTS[code.value]).newbyteorder("<")

    def _elements(
        self, field: Field, view: Field, offset_field: Field | None, component: np.dtype, count: int, width: int
    ) -> np.ndarray:
        data, stride = self.view(view)
        offset = offset_field.integer() if offset_field else 0
        size = component.itemsize * width
        step = stride or size
        end = offset + (count - 1) * step + size
        if end > len(data):
            raise field.error(f"ends at byte {end} of bufferViews[{view.value}], which has {len(data)}")
        return np.ndarray((count, width), component, data, offset, (step, component.itemsize))

    def _buffer(self, index: Field) -> bytes:
        buffer = self.element("buffers", index)
        number = index.integer()
        if number not in self._buffers:
            length = buffer.need("byteLength").integer()
            if (uri := buffer.get("uri")) is not None:
                data = self.resource(uri)
            elif number == 0 and self._chunk is not None:
                data = self._chunk
            else:
                raise buffer.error("has neither a uri nor a binary chunk")
            if len(data) < length:
                raise buffer.error(f"has {len(data)} bytes, byteLength says {length}: the file is cut short")
            self._buffers[number] = data
        return self._buffers[number]


def _split_glb(data: bytes, name: str) -> tuple[bytes, bytes | None]:
    """JSON and binary chunk of a GLB container."""
    if len(data) < 20:
        raise SceneError(f"{name}: GLB header is cut short ({len(data)} bytes)")
    _, version, length = struct.unpack_from("<4sII", data)
    if version != 2:
        raise SceneError(f"{name}: GLB version {version} is not supported, only 2")
    if length > len(data):
        raise SceneError(f"{name}: GLB is cut short: {len(data)} of {length} bytes")
    chunks: dict[int, bytes] = {}
    offset = 12
    while offset + 8 <= length:
        size, kind = struct.unpack_from("<II", data, offset)
        if offset + 8 + size > length:
            raise SceneError(f"{name}: GLB chunk at byte {offset} is cut short")
        chunks.setdefault(kind, data[offset + 8 : offset + 8 + size])
        offset += 8 + size
    if 0x4E4F534A not in chunks:
        raise SceneError(f"{name}: GLB has no JSON chunk")
    return chunks[0x4E4F534A], chunks.get(0x004E4942)
