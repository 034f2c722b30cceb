"""Image files against Mitsuba's readers and Pillow, transfer functions against IEC 61966-2-1's values."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import OpenEXR
import pytest
from PIL import Image

from nrc.image import (
    ImageError,
    read_image,
    read_layers,
    read_linear,
    srgb_decode,
    srgb_encode,
    to_srgb8,
    write_exr,
    write_image,
)

# An 8-bit mantissa of at least 128 for the largest channel, rounded to nearest.
RGBE_RELATIVE_ERROR = 0.5 / 128.0 + 1e-6


def radiance(height: int = 20, width: int = 31, n_channels: int = 3) -> np.ndarray:
    """Radiance over twelve orders of magnitude, some pixels black."""
    rng = np.random.default_rng(7)
    image = rng.random((height, width, n_channels)) * 10.0 ** rng.uniform(-6.0, 6.0, (height, width, 1))
    image[rng.random((height, width)) < 0.1] = 0.0
    return image.astype(np.float32)


def exr_bytes(path: Path, channels: dict, **header: object) -> Path:
    """Write an EXR with exactly these channels and header entries."""
    kind = {"compression": OpenEXR.ZIP_COMPRESSION, "type": OpenEXR.scanlineimage}
    OpenEXR.File({**kind, **header}, channels).write(str(path))
    return path


@pytest.fixture(scope="module")
def mi():
    """Mitsuba, whose image readers are the oracle."""
    mitsuba = pytest.importorskip("mitsuba")
    mitsuba.set_variant("scalar_rgb")
    return mitsuba


def test_exr_keeps_every_bit(tmp_path: Path) -> None:
    """float32 radiance comes back from an EXR unchanged, infinities included."""
    image = radiance()
    image[3, 4] = (np.inf, 1e-40, 3e38)
    write_image(tmp_path / "a.exr", image)
    np.testing.assert_array_equal(read_image(tmp_path / "a.exr"), image)


def test_exr_layers_have_the_names_compositors_expect(tmp_path: Path) -> None:
    """Each layer is written under its channel names and read back whole."""
    rgb, depth = radiance(), radiance(n_channels=1)
    ids = np.arange(20 * 31).reshape(20, 31)
    layers = {"color": rgb, "albedo": rgb, "normal": -rgb, "depth": depth, "material_id": ids}
    write_exr(tmp_path / "a.exr", layers, {"spp": 16, "seconds": 1.5, "scene": "cornell_box"})
    with OpenEXR.File(str(tmp_path / "a.exr"), separate_channels=True) as file:
        names, header = set(file.channels()), dict(file.header())
    albedo, normal = {"albedo.R", "albedo.G", "albedo.B"}, {"normal.X", "normal.Y", "normal.Z"}
    assert names == {"R", "G", "B", "depth.Z", "material_id.ID"} | albedo | normal
    assert (header["spp"], header["seconds"], header["scene"]) == (16, 1.5, "cornell_box")
    read = read_layers(tmp_path / "a.exr")
    assert set(read) == set(layers)
    np.testing.assert_array_equal(read["normal"], -rgb)
    np.testing.assert_array_equal(read["depth"], depth)
    np.testing.assert_array_equal(read["material_id"][:, :, 0], ids)


def test_exr_reads_in_mitsuba(tmp_path: Path, mi) -> None:
    """Mitsuba reads what we write, and we read what it writes in half precision."""
    image = radiance()
    write_image(tmp_path / "a.exr", image)
    np.testing.assert_array_equal(np.array(mi.Bitmap(str(tmp_path / "a.exr"))), image)
    half = np.minimum(image, 6e4).astype(np.float16)
    mi.Bitmap(half).write(str(tmp_path / "half.exr"))
    read = read_image(tmp_path / "half.exr")
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, half.astype(np.float32))


def test_exr_data_window_is_placed_in_the_display_window(tmp_path: Path) -> None:
    """Pixels outside the display window are cropped, pixels without data are 0."""
    pixels = radiance(20, 10, 1)[:, :, 0]
    window = (np.array([-2, 3], "i"), np.array([7, 22], "i"))
    display = (np.array([0, 0], "i"), np.array([11, 17], "i"))
    path = exr_bytes(tmp_path / "a.exr", {"Y": pixels}, dataWindow=window, displayWindow=display)
    expected = np.zeros((18, 12), np.float32)
    expected[3:, :8] = pixels[:15, 2:]
    np.testing.assert_array_equal(read_image(path)[:, :, 0], expected)


def test_exr_parts_carry_their_name(tmp_path: Path) -> None:
    """Layers of later parts are named after the part, whether or not their channels already are."""
    image = radiance()
    kind = {"compression": OpenEXR.ZIP_COMPRESSION, "type": OpenEXR.scanlineimage}
    planes = [np.ascontiguousarray(image[:, :, i]) for i in range(3)]
    parts = [
        OpenEXR.Part(dict(kind), dict(zip("RGB", planes, strict=True)), "beauty"),
        OpenEXR.Part(dict(kind), {"Z": planes[0]}, "depth"),
        OpenEXR.Part(dict(kind), dict(zip(("albedo.R", "albedo.G", "albedo.B"), planes, strict=True)), "albedo"),
    ]
    OpenEXR.File(parts).write(str(tmp_path / "a.exr"))
    layers = read_layers(tmp_path / "a.exr")
    assert set(layers) == {"color", "depth", "albedo"}
    np.testing.assert_array_equal(layers["albedo"], image)
    np.testing.assert_array_equal(layers["depth"], image[:, :, :1])


def test_grey_and_alpha_become_rgb(tmp_path: Path) -> None:
    """`read_linear` repeats luminance and drops alpha."""
    image = radiance(n_channels=4)
    write_image(tmp_path / "rgba.exr", image)
    write_image(tmp_path / "grey.exr", image[:, :, 0])
    np.testing.assert_array_equal(read_linear(tmp_path / "rgba.exr"), image[:, :, :3])
    np.testing.assert_array_equal(read_linear(tmp_path / "grey.exr"), np.repeat(image[:, :, :1], 3, axis=2))


@pytest.mark.parametrize("width", [5, 31, 1000])
def test_hdr_round_trip_is_within_a_mantissa_step(tmp_path: Path, mi, width: int) -> None:
    """What we write as RGBE comes back within half a step of the largest channel, here and in Mitsuba."""
    image = radiance(width=width)
    write_image(tmp_path / "a.hdr", image)
    read = read_image(tmp_path / "a.hdr")
    assert np.all(np.abs(read - image) <= RGBE_RELATIVE_ERROR * image.max(axis=2, keepdims=True))
    np.testing.assert_array_equal(np.array(mi.Bitmap(str(tmp_path / "a.hdr")))[:, :, :3], read)


def test_hdr_extremes_stay_finite(tmp_path: Path) -> None:
    """Values that round up to the next exponent, overflow, are negative or not a number have a defined encoding."""
    image = np.array([[[1.999, 0.0, 0.0], [3.4e38, 1.0, 0.0], [-1.0, np.nan, 0.5], [1e-39, 0.0, 0.0]]], np.float32)
    write_image(tmp_path / "a.hdr", image)
    expected = [[[2.0, 0.0, 0.0], [255.0 * 2.0**119, 0.0, 0.0], [0.0, 0.0, 0.5], [0.0, 0.0, 0.0]]]
    np.testing.assert_array_equal(read_image(tmp_path / "a.hdr"), np.array(expected, np.float32))


def test_hdr_run_length_encoding_reads_as_mitsuba_wrote_it(tmp_path: Path, mi) -> None:
    """Long runs, short runs and literals of Mitsuba's encoder decode to the pixels Mitsuba itself decodes."""
    image = radiance(16, 700)
    image[:, 100:500] = 0.25
    image[5:, 600:603] = 4.0
    mi.Bitmap(image).write(str(tmp_path / "a.hdr"))
    assert (tmp_path / "a.hdr").stat().st_size < 4 * image.shape[0] * image.shape[1]  # it did use runs
    np.testing.assert_array_equal(
        read_image(tmp_path / "a.hdr"), np.array(mi.Bitmap(str(tmp_path / "a.hdr")))[:, :, :3]
    )


def test_hdr_header_sets_exposure_and_orientation(tmp_path: Path) -> None:
    """EXPOSURE lines are divided out and +Y / -X rows are turned upright."""
    pixels = bytes([128, 0, 0, 129, 0, 128, 0, 130])  # (1, 0, 0) and (0, 2, 0)
    for resolution, order in ((b"-Y 2 +X 1", 1), (b"+Y 2 +X 1", -1)):
        header = b"#?RADIANCE\r\n# comment\r\nEXPOSURE=2\r\nEXPOSURE= 4.0\r\n\r\n" + resolution + b"\r\n"
        (tmp_path / "a.hdr").write_bytes(header + pixels)
        expected = np.array([[[1 / 8, 0, 0]], [[0, 2 / 8, 0]]], np.float32)[::order]
        np.testing.assert_array_equal(read_image(tmp_path / "a.hdr"), expected)
    (tmp_path / "a.hdr").write_bytes(b"#?RADIANCE\n\n-Y 1 -X 2\n" + pixels)
    np.testing.assert_array_equal(read_image(tmp_path / "a.hdr"), np.array([[[0, 2, 0], [1, 0, 0]]], np.float32))


def test_pfm_reads_both_byte_orders_and_mitsuba(tmp_path: Path, mi) -> None:
    """Rows run from the bottom; a negative scale means little-endian."""
    image = radiance(3, 2, 1)
    for order, scale in (("<f4", b"-1.0"), (">f4", b"1.0")):
        (tmp_path / "a.pfm").write_bytes(b"Pf\n2 3\n" + scale + b"\n" + image[::-1].astype(order).tobytes())
        np.testing.assert_array_equal(read_image(tmp_path / "a.pfm"), image)
    mi.Bitmap(radiance()).write(str(tmp_path / "b.pfm"))
    np.testing.assert_array_equal(read_image(tmp_path / "b.pfm"), radiance())


@pytest.mark.realdata
@pytest.mark.parametrize("name", ["aristea_wreck_puresky_1k.hdr", "studio_small_05_1k.hdr", "KernerEnvLatLong.exr"])
def test_environment_maps_read_as_in_mitsuba(data: Path, mi, name: str) -> None:
    """Run-length encoded RGBE and tiled, mip-mapped half EXR decode to exactly Mitsuba's pixels."""
    path = data / "hdr" / name
    bitmap = mi.Bitmap(str(path)).convert(mi.Bitmap.PixelFormat.RGB, mi.Struct.Type.Float32, False)
    np.testing.assert_array_equal(read_linear(path), np.array(bitmap))


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "P", "1"])
def test_byte_images_keep_their_channels(tmp_path: Path, mode: str) -> None:
    """PNG modes come back as uint8 with the channels they stand for; palettes and bitmaps are expanded."""
    pixels = np.random.default_rng(3).integers(0, 256, (6, 5, 4), dtype=np.uint8)
    picture = Image.fromarray(pixels if "A" in mode else pixels[:, :, :3].copy()).convert(mode)
    picture.save(tmp_path / "a.png")
    target = {"P": "RGB", "1": "L"}.get(mode, mode)
    expected = np.asarray(picture.convert(target)).reshape(6, 5, -1)
    read = read_image(tmp_path / "a.png")
    assert read.dtype == np.uint8
    np.testing.assert_array_equal(read, expected)


def test_png_of_16_bit_grey_is_rounded(tmp_path: Path) -> None:
    """16-bit grey v becomes round(v / 257)."""
    Image.fromarray(np.array([[0, 128, 129, 257, 65535]], np.uint16)).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_image(tmp_path / "a.png")[0, :, 0], [0, 0, 1, 1, 255])


def test_srgb_transfer_has_the_standard_values() -> None:
    """IEC 61966-2-1 at its ends, at the join of its two pieces and at middle grey; decode inverts encode."""
    linear = np.array([-1.0, 0.0, 0.0031308, 0.21404114, 1.0])
    np.testing.assert_allclose(srgb_encode(linear), [0.0, 0.0, 0.04045, 0.5, 1.0], atol=1e-6)
    ramp = np.linspace(0.0, 4.0, 1001)
    np.testing.assert_allclose(srgb_decode(srgb_encode(ramp)), ramp, rtol=1e-6, atol=1e-8)


def test_png_round_trip_is_the_rounded_srgb_value(tmp_path: Path) -> None:
    """Every 8-bit code survives decode, write and read; out-of-range and NaN radiance is clamped."""
    codes = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
    write_image(tmp_path / "a.png", srgb_decode(codes / 255.0))
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), codes)
    np.testing.assert_allclose(read_linear(tmp_path / "a.png"), srgb_decode(codes / 255.0), rtol=1e-6)
    wild = np.array([[[np.nan, -5.0, np.inf]]], np.float32)
    np.testing.assert_array_equal(to_srgb8(wild), [[[0, 0, 255]]])
    np.testing.assert_array_equal(to_srgb8(np.full((1, 1, 3), 0.25), exposure=2.0), np.full((1, 1, 3), 255))
    np.testing.assert_array_equal(to_srgb8(np.full((1, 1, 4), 0.5))[0, 0], [188, 188, 188, 128])


def test_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write that fails half-way keeps the previous file and leaves no temporary one."""
    path = tmp_path / "a.png"
    write_image(path, np.zeros((2, 2, 3)))
    before = path.read_bytes()

    def fail(picture: Image.Image, target: Path) -> None:
        target.write_bytes(b"half")
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(ImageError, match=r"a\.png: cannot be written \(No space left on device\)"):
        write_image(path, np.ones((2, 2, 3)))
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.png"]
    assert path.read_bytes() == before


@pytest.mark.parametrize("extension", ["exr", "hdr", "png"])
def test_truncated_file_is_named(tmp_path: Path, extension: str) -> None:
    """A file cut short, or empty, is an ImageError that names it."""
    path = tmp_path / f"a.{extension}"
    write_image(path, radiance(40, 40))
    for n in (0, path.stat().st_size // 3, path.stat().st_size * 9 // 10):
        cut = tmp_path / f"cut{n}.{extension}"
        cut.write_bytes(path.read_bytes()[:n])
        with pytest.raises(ImageError, match=rf"cut{n}\.{extension}: "):
            read_image(cut)


HDR = b"#?RADIANCE\nFORMAT=32-bit_rle_rgbe\n\n"
RLE_ROW = bytes([2, 2, 0, 8])


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.gif", b"GIF89a", r"unsupported image extension '\.gif'"),
        ("a.png", b"not a picture", "not a readable PNG"),
        ("a.exr", b"not a picture", "not a readable EXR"),
        ("a.hdr", b"not a picture", "not a Radiance"),
        ("a.pfm", b"P6\n1 1\n255\n", "not a PFM"),
        ("a.pfm", b"PF\n0 4\n-1\n", "zero size"),
        ("a.pfm", b"PF\n2 1\n-1\n" + bytes(12), "truncated, 12 of 24 bytes"),
        ("a.hdr", HDR + b"-Y 0 +X 4\n", "zero size"),
        ("a.hdr", HDR + b"+X 4 -Y 4\n" + bytes(64), "no resolution line"),
        ("a.hdr", b"#?RADIANCE\nEXPOSURE=0\n\n-Y 1 +X 1\n" + bytes(4), "EXPOSURE must be positive"),
        ("a.hdr", b"#?RADIANCE\nFORMAT=32-bit_rle_xyze\n\n-Y 1 +X 1\n" + bytes(4), "XYZE"),
        ("a.hdr", HDR + b"-Y 1 +X 2\n" + bytes([9, 9, 9, 129, 1, 1, 1, 1]), "before 1991"),
        ("a.hdr", HDR + b"-Y 2 +X 8\n" + RLE_ROW + bytes([136, 5] * 4) + RLE_ROW, "row 1 of 2 is truncated"),
        ("a.hdr", HDR + b"-Y 1 +X 8\n" + RLE_ROW + bytes([136, 5] * 3 + [138, 5]), "past the end of the row"),
        ("a.hdr", HDR + b"-Y 1 +X 8\n" + RLE_ROW + bytes([0, 5] * 8), "empty run"),
        ("a.hdr", HDR + b"-Y 1 +X 8\n" + RLE_ROW + bytes([136, 5] * 3 + [8, 5]), "row 0 of 1 is truncated"),
    ],
)
def test_bad_file_says_what_is_wrong(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    """Each kind of damage is an ImageError that names the file and the reason."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ImageError, match=rf"{name}: .*{reason}"):
        read_image(tmp_path / name)


def test_missing_file_and_channels_are_named(tmp_path: Path) -> None:
    """A file that is not there, an RGB layer without B and a file without colour say so."""
    plane = radiance()[:, :, 0].copy()
    for name in ("none.exr", "none.png", "none.hdr"):
        with pytest.raises(ImageError, match=rf"{name}: No such file"):
            read_image(tmp_path / name)
    with pytest.raises(ImageError, match=r"rg\.exr: layer 'color' has no channel B"):
        read_image(exr_bytes(tmp_path / "rg.exr", {"R": plane, "G": plane}))
    with pytest.raises(ImageError, match=r"z\.exr: no colour channels R, G, B or Y; layers are Z"):
        read_image(exr_bytes(tmp_path / "z.exr", {"Z": plane}))


@pytest.mark.parametrize(
    ("name", "image", "reason"),
    [
        ("a.jpg", np.zeros((2, 2, 3)), r"cannot write '\.jpg'"),
        ("a.png", np.zeros((0, 2, 3)), "no zero size"),
        ("a.exr", np.zeros((2, 2, 5)), "shape"),
        ("a.exr", np.zeros((2, 2, 3), complex), "real numbers"),
        ("a.exr", np.zeros((2, 2, 3), np.uint8), "8-bit"),
        ("a.hdr", np.zeros((2, 2, 4)), "holds 3 channels"),
        ("nowhere/a.exr", np.zeros((2, 2, 3)), "no folder"),
    ],
)
def test_bad_image_is_not_written(tmp_path: Path, name: str, image: np.ndarray, reason: str) -> None:
    """What cannot be written is refused before a file appears."""
    with pytest.raises(ImageError, match=rf"{name}.*{reason}"):
        write_image(tmp_path / name, image)
    assert list(tmp_path.iterdir()) == []


def test_layers_of_different_sizes_are_refused(tmp_path: Path) -> None:
    """Layers that differ in size, or in their number of channels from what their name means, are named."""
    with pytest.raises(ImageError, match=r"layer 'depth' is 3x2, the others are 2x2"):
        write_exr(tmp_path / "a.exr", {"color": np.zeros((2, 2, 3)), "depth": np.zeros((2, 3))})
    with pytest.raises(ImageError, match=r"layer 'normal' wants 3 channels, got 1"):
        write_exr(tmp_path / "a.exr", {"normal": np.zeros((2, 2))})
