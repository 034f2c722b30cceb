"""Images: decoding against Pillow and OpenEXR, sampling by counting, measures against `nrc.metrics`, exact resume."""

from __future__ import annotations

import math
import runpy
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import OpenEXR
import pytest
import rasterio
import warp as wp
from PIL import Image

import nrc
from nrc import metrics
from nrc.fit import fitted_image
from nrc.fit import image as fit_image
from nrc.fit import pixels as fit_pixels
from nrc.fit.fitted_image import FittedImage
from nrc.fit.image import ImageTask, evaluate_snapshot
from nrc.fit.image_window import Window, WindowRenderer
from nrc.fit.pixels import PixelSource
from nrc.image import ImageError, read_image, srgb_encode, write_image
from nrc.launch import set_threads
from nrc.snapshot import SnapshotError

CHECKOUT = Path(__file__).resolve().parent.parent
SMALL = {"n_levels": 8, "log2_hashmap_size": 12}
CHROMA_STEPS = 2  # of 255: colour conversion of JPEG in two builds of libjpeg


def photo(height: int = 61, width: int = 90, n_channels: int = 3) -> np.ndarray:
    """A smooth picture with an edge, uint8."""
    y, x = np.mgrid[:height, :width]
    waves = [0.5 + 0.4 * np.sin(0.11 * (c + 1) * x + 0.07 * y + c) for c in range(n_channels)]
    picture = np.stack(waves, axis=2) * np.where(x > 0.6 * width, 1.0, 0.6)[:, :, None]
    return (255.0 * picture + 0.5).astype(np.uint8)


def noise(shape: tuple[int, ...], dtype: type = np.uint8) -> np.ndarray:
    """Values of all bits."""
    return np.random.default_rng(5).integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)


def save(path: Path, image: np.ndarray, mode: str | None = None, **options: object) -> Path:
    """Write an 8-bit image with Pillow, converted to `mode`."""
    picture = Image.fromarray(image)
    (picture.convert(mode) if mode else picture).save(path, **options)
    return path


def save_tiff(path: Path, image: np.ndarray, **options: object) -> Path:
    """Write a TIFF with GDAL."""
    height, width, count = image.shape
    with (
        fit_pixels.quiet_raster(),
        rasterio.open(
            path, "w", driver="GTiff", width=width, height=height, count=count, dtype=image.dtype.name, **options
        ) as file,
    ):
        file.write(image.transpose(2, 0, 1))
    return path


def save_exr(path: Path, channels: dict[str, np.ndarray], **header: object) -> Path:
    """Write an EXR with exactly these channels."""
    kind = {"compression": OpenEXR.PIZ_COMPRESSION, "type": OpenEXR.scanlineimage}
    OpenEXR.File({**kind, **header}, channels).write(str(path))
    return path


def small_task(path: Path, **options: object) -> ImageTask:
    """A task that takes milliseconds per step."""
    return ImageTask(path, device="cpu", **{"batch_size": 1024, "grid": SMALL, **options})


@pytest.fixture
def png(tmp_path: Path) -> Path:
    """A small picture on disk."""
    return save(tmp_path / "photo.png", photo())


@pytest.mark.parametrize(
    ("name", "mode", "options"),
    [
        ("grey.png", "L", {}),
        ("grey_alpha.png", "LA", {}),
        ("rgb.png", None, {}),
        ("palette.png", "P", {}),
        ("bilevel.png", "1", {}),
        ("bilevel.tif", "1", {}),
        ("palette.tif", "P", {}),
        ("lzw.tif", None, {"compression": "tiff_lzw"}),
        ("jpeg.tif", None, {"compression": "jpeg"}),
        ("photo.jpg", None, {"quality": 90, "subsampling": 0}),
        ("grey.jpg", "L", {}),
    ],
)
def test_decoded_pixels_equal_pillow(tmp_path: Path, name: str, mode: str | None, options: dict) -> None:
    """Every kind of 8-bit file decodes to what Pillow makes of it; an alpha of 1 is dropped."""
    path = save(tmp_path / name, photo(), mode, **options)
    source = PixelSource(path)
    with Image.open(path) as picture:
        is_grey = picture.mode in ("L", "LA", "1")
        expected = np.asarray(picture.convert("L" if is_grey else "RGB"), int).reshape(source.height, source.width, -1)
    assert (source.n_channels, source.linear, source.warnings) == (expected.shape[2], False, [])
    found = source.pixels[:, :, : source.n_channels].astype(int)
    assert np.abs(found - expected).max() <= (CHROMA_STEPS if "jp" in name else 0)


@pytest.mark.parametrize("options", [{}, {"tiled": True, "blockxsize": 32, "blockysize": 16}, {"BIGTIFF": "YES"}])
@pytest.mark.parametrize("compress", ["none", "deflate", "lzw", "zstd"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_tiff_pixels_come_back(tmp_path: Path, options: dict, compress: str, dtype: type) -> None:
    """TIFF values survive every compression and layout at 8 and 16 bits, and are scaled to 1 for training."""
    image = noise((70, 45, 3), dtype)
    source = PixelSource(save_tiff(tmp_path / "a.tif", image, compress=compress, **options))
    np.testing.assert_array_equal(source.pixels, image)
    np.testing.assert_allclose(source.shown(source.pixels), image / np.iinfo(dtype).max, rtol=1e-6)


def test_sixteen_bit_png_keeps_its_bits(tmp_path: Path) -> None:
    """16-bit grey is not rounded to 8 bits."""
    image = noise((30, 20), np.uint16)
    Image.fromarray(image).save(tmp_path / "a.png")
    np.testing.assert_array_equal(PixelSource(tmp_path / "a.png").pixels[:, :, 0], image)


def test_alpha_is_kept_only_where_it_matters(tmp_path: Path) -> None:
    """A fourth channel counts if a pixel is not opaque."""
    image = np.concatenate([photo(), np.full((61, 90, 1), 255, np.uint8)], axis=2)
    assert PixelSource(save(tmp_path / "opaque.png", image)).n_channels == 3
    image[60, 89, 3] = 254
    source = PixelSource(save(tmp_path / "alpha.png", image))
    assert source.n_channels == 4
    np.testing.assert_array_equal(source.pixels, image)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_exr_strips_equal_the_whole_decode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: type) -> None:
    """Rows of an EXR, read in strips and placed in the display window, are what `nrc.image` reads at once."""
    monkeypatch.setattr(fit_pixels, "STRIP_BYTES", 1)
    planes = np.random.default_rng(1).random((4, 600, 20)).astype(dtype)
    path = save_exr(
        tmp_path / "a.exr",
        dict(zip("RGBA", planes, strict=True)),
        dataWindow=(np.array([5, -20], np.int32), np.array([24, 579], np.int32)),
        displayWindow=(np.array([0, 0], np.int32), np.array([29, 599], np.int32)),
    )
    source = PixelSource(path)
    assert source.linear
    assert source.n_channels == 4
    expected = read_image(path)
    expected[:, :, :3] = srgb_encode(expected[:, :, :3])
    np.testing.assert_array_equal(source.pixels, expected)


def test_linear_values_are_encoded_and_negative_ones_counted(tmp_path: Path) -> None:
    """A floating-point file trains on sRGB-encoded values, above 1 too; what is below 0 is taken for 0 and reported."""
    image = np.linspace(-0.5, 8.0, 20 * 30 * 3, dtype=np.float32).reshape(20, 30, 3)
    write_image(tmp_path / "a.exr", image)
    source = PixelSource(tmp_path / "a.exr")
    np.testing.assert_allclose(source.pixels, srgb_encode(np.maximum(image, 0.0)), rtol=1e-6)
    assert f"{np.count_nonzero(image < 0.0)} negative" in source.warnings[0]


def test_large_images_are_read_in_strips_into_an_unnamed_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No read asks for more rows than a strip has, and the pixels lie in a mapped file that no folder shows."""
    image = noise((500, 64, 3))
    path = save_tiff(tmp_path / "a.tif", image, tiled=True, blockxsize=16, blockysize=16, compress="deflate")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    rows = []
    make = fit_pixels._raster_decoder

    def tracked(*arguments: object) -> object:
        decoder = make(*arguments)

        def read(y0: int, y1: int) -> np.ndarray:
            rows.append(y1 - y0)
            return decoder.read(y0, y1)

        return fit_pixels._Decoder(decoder.shape, decoder.dtype, decoder.strip_rows, read)

    monkeypatch.setattr(fit_pixels, "_raster_decoder", tracked)
    monkeypatch.setattr(fit_pixels, "STRIP_BYTES", 64 * 3 * 40)
    monkeypatch.setattr(fit_pixels, "IN_MEMORY_BYTES", 1000)
    source = PixelSource(path, scratch=scratch)
    assert isinstance(source.pixels, np.memmap)
    assert list(scratch.iterdir()) == []
    assert (max(rows), sum(rows)) == (32, 500)  # two rows of tiles
    np.testing.assert_array_equal(source.pixels, image)


def _bad_files(folder: Path) -> dict[str, tuple[Path, str]]:
    """Files that cannot be fitted, and what their message must hold."""
    images: dict[str, tuple[Path, str]] = {"missing": (folder / "none.png", "No such file")}
    for extension in ("png", "jpg", "tif"):
        whole = save(folder / f"whole.{extension}", noise((200, 200, 3))).read_bytes()
        for share in (0.3, 0.97):
            path = folder / f"cut{share}.{extension}"
            path.write_bytes(whole[: int(share * len(whole))])
            images[f"{extension} cut at {share}"] = path, "truncated"
        empty = folder / f"empty.{extension}"
        empty.write_bytes(b"")
        images[f"empty {extension}"] = empty, "truncated"
    pixels = np.ones((300, 20, 3), np.float32)
    write_image(folder / "whole.exr", pixels + np.random.default_rng(0).random(pixels.shape, np.float32))
    cut = folder / "cut.exr"
    cut.write_bytes((folder / "whole.exr").read_bytes()[:4000])
    images["exr cut"] = cut, "cut.exr: "
    pixels[7, 3, 1], pixels[200, 5, 2] = np.nan, np.inf
    write_image(folder / "nan.exr", pixels)
    images["not finite"] = folder / "nan.exr", "2 pixels are NaN or infinite, the first at x 3, y 7"
    images["text"] = folder / "a.txt", "unsupported image extension"
    images["text"][0].write_text("no image")
    images["other content"] = folder / "text.png", "not readable as PNG"
    images["other content"][0].write_text("no image")
    save_tiff(folder / "int.tif", noise((20, 20, 1), np.int16))
    images["signed"] = folder / "int.tif", "channels of int16 are not supported"
    save_tiff(folder / "five.tif", noise((20, 20, 5)))
    images["five channels"] = folder / "five.tif", "5 channels"
    return images


@pytest.mark.parametrize("in_memory", [0, 1 << 20])
def test_bad_files_are_refused_with_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_memory: int) -> None:
    """Missing, truncated, foreign and non-finite files raise ImageError naming the file and the reason."""
    monkeypatch.setattr(fit_pixels, "IN_MEMORY_BYTES", in_memory)
    for what, (path, reason) in _bad_files(tmp_path).items():
        with pytest.raises(ImageError) as caught:
            PixelSource(path)
        message = str(caught.value)
        assert str(path) in message, what
        assert reason in message, f"{what}: {message}"
        assert "\n" not in message, what


def test_orientation_is_reported(tmp_path: Path) -> None:
    """A photograph whose metadata turns it is taken as stored, with a warning."""
    exif = Image.Exif()
    exif[0x0112] = 6
    source = PixelSource(save(tmp_path / "a.jpg", photo(), exif=exif))
    assert (source.width, source.height) == (90, 61)
    assert "orientation 6" in source.warnings[0]


@pytest.mark.realdata
def test_panorama_decodes_as_pillow_does(data: Path) -> None:
    """A 29-megapixel JPEG, decoded in strips, has Pillow's pixels."""
    path = data / "image" / "apollo17_pan_16810x1708.jpg"
    source = PixelSource(path)
    with Image.open(path) as picture:
        np.testing.assert_array_equal(source.pixels, np.asarray(picture))


@pytest.mark.parametrize(("size", "batch"), [((61, 90), 1024), ((7, 300), 64), ((33, 33), 4096)])
def test_every_pixel_is_drawn_once_per_epoch(tmp_path: Path, size: tuple[int, int], batch: int) -> None:
    """Batches hold one pixel per stratum, with its own value, and a stratum's pixels all come before one returns."""
    image = noise((*size, 3))
    task = small_task(save(tmp_path / "a.png", image), batch_size=batch)
    n_pixels, rows = size[0] * size[1], task.samples_per_step
    assert rows == min(batch, n_pixels)
    drawn = []
    for _ in range(math.ceil(n_pixels / rows)):
        task.step()
        x, y = np.rint(task._x.numpy() * max(size) - 0.5).astype(int).T
        np.testing.assert_allclose(task._y.numpy(), image[y, x] / 255.0, rtol=1e-6)
        drawn.append(y * size[1] + x)
    counts = [Counter(stratum) for stratum in np.stack(drawn, axis=1).tolist()]
    lengths = [n_pixels // rows + (i < n_pixels % rows) for i in range(rows)]
    for count, length in zip(counts, lengths, strict=True):
        assert len(count) == length
    assert set().union(*counts) == set(range(n_pixels))


def test_strata_follow_seed_and_step_alone(png: Path) -> None:
    """Batches differ between steps and between seeds, and repeat for the same of both."""
    batches = {}
    for seed in (1, 2, 1):
        task = small_task(png, seed=seed)
        for step in range(2):
            task.step()
            found = task._x.numpy().tobytes()
            assert batches.setdefault((seed, step), found) == found
    assert len(set(batches.values())) == 4


def test_default_table_grows_with_the_image() -> None:
    """At most one entry for four pixels, within the paper's range."""
    sizes = {10: 14, 1 << 20: 18, 28_711_480: 22, 10**10: 24}
    assert {n: fit_image.default_log2_table(n) for n in sizes} == sizes


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> ImageTask:
    """A task after 150 steps."""
    task = small_task(save(tmp_path_factory.mktemp("fit") / "photo.png", photo(200, 300)))
    for _ in range(150):
        task.step()
    return task


def test_fit_beats_a_smaller_copy(trained: ImageTask) -> None:
    """The fit is closer to the picture than a quarter-size copy scaled up, and its loss is its error."""
    picture = Image.fromarray(trained.source.pixels)
    copy = np.asarray(picture.resize((75, 50), Image.Resampling.BOX).resize(picture.size, Image.Resampling.BICUBIC))
    quality = trained.evaluate()["psnr"]
    assert quality > metrics.psnr(copy / 255.0, trained.source.pixels / 255.0)
    assert abs(trained.progress()["psnr"] - quality) < 0.5  # a fixed sample of the same pixels


@pytest.mark.parametrize("strip", [1, 4000, 1 << 20])
def test_measures_equal_those_of_whole_images(trained: ImageTask, monkeypatch: pytest.MonkeyPatch, strip: int) -> None:
    """PSNR and SSIM, summed strip by strip, are those of `nrc.metrics` on the whole image."""
    monkeypatch.setattr(fitted_image, "STRIP_PIXELS", strip)
    found = trained.evaluate()
    shown = np.clip(np.concatenate([values for _, values in trained.fitted.strips()]), 0.0, 1.0)
    reference = trained.source.pixels / 255.0
    assert found["psnr"] == pytest.approx(metrics.psnr(shown, reference), abs=1e-5)
    assert found["ssim"] == pytest.approx(metrics.ssim(shown, reference), abs=1e-6)
    assert "relmse" not in found


def test_measures_of_linear_images(tmp_path: Path) -> None:
    """For a floating-point file PSNR and relMSE are those of `nrc.metrics.compare` on linear images."""
    image = np.square(photo(80, 70) / 100.0).astype(np.float32)
    write_image(tmp_path / "a.exr", image)
    task = small_task(tmp_path / "a.exr")
    for _ in range(50):
        task.step()
    found = task.evaluate()
    expected = metrics.compare(task.fitted.reconstruct(), image)
    assert {name: found[name] for name in ("psnr", "ssim", "relmse")} == pytest.approx(
        {name: expected[name] for name in ("psnr", "ssim", "relmse")}, rel=1e-4
    )


@pytest.mark.parametrize("region", [(0, 0, 1, 1), (37, 11, 290, 155), (0, 0, 300, 200)])
def test_crops_are_parts_of_the_whole(trained: ImageTask, region: tuple[int, int, int, int]) -> None:
    """At zoom 1 a crop has the bits of the whole reconstruction."""
    x0, y0, x1, y1 = region
    whole = trained.fitted.reconstruct()
    assert whole.dtype == np.uint8
    np.testing.assert_array_equal(trained.fitted.reconstruct(region), whole[y0:y1, x0:x1])


def test_zoom_reads_between_and_averages(trained: ImageTask) -> None:
    """Zoom 1/2 is the mean of four samples; zoom 3 has the source's pixels at every third place."""
    fitted = trained.fitted
    whole = np.concatenate([values for _, values in fitted.strips()])
    mean = whole.reshape(100, 2, 150, 2, 3).mean(axis=(1, 3))
    half = fitted.reconstruct(zoom=0.5)
    assert np.abs(half.astype(int) - fitted.decode(mean)).max() <= 1  # rounding of sums in another order
    triple = fitted.reconstruct((10, 20, 30, 40), zoom=3.0)
    assert triple.shape == (60, 60, 3)
    assert np.abs(triple[1::3, 1::3].astype(int) - fitted.decode(whole)[20:40, 10:30]).max() <= 1
    assert fitted.reconstruct((0, 0, 3, 3), zoom=0.1).shape == (1, 1, 3)


@pytest.mark.parametrize(
    ("region", "zoom"),
    [
        ((0, 0, 301, 10), 1.0),
        ((5, 5, 5, 9), 1.0),
        ((0, 0, 1.5, 2), 1.0),
        ((0, 0, 2), 1.0),
        (None, 0.0),
        (None, math.nan),
        (None, 1e7),
    ],
)
def test_impossible_crops_are_refused(trained: ImageTask, region: tuple, zoom: float) -> None:
    """Empty, outside or fractional regions, zooms not positive, and pictures beyond memory raise ImageError."""
    with pytest.raises(ImageError, match="region must be" if region else "zoom must be|not fit into memory"):
        trained.fitted.reconstruct(region, zoom)


def drawn(renderer: WindowRenderer, window: Window, **options: Any) -> np.ndarray:
    """Picture of a window, (height, width, 3)."""
    return renderer.draw(window, **options).numpy().reshape(window.height, window.width, 3).copy()


def test_windows_show_fit_original_and_error(trained: ImageTask) -> None:
    """At zoom 1 windows are the strips, the file and their difference; the split puts them side by side."""
    renderer = WindowRenderer(trained.fitted, trained.source)
    window = Window(40.0, 30.0, 1.0, 1.0, 120, 80)
    part = np.s_[30:110, 40:160]
    whole = np.concatenate([values for _, values in trained.fitted.strips()])
    fitted, original = drawn(renderer, window), drawn(renderer, window, show="original")
    np.testing.assert_array_equal(fitted, whole[part])
    np.testing.assert_allclose(original, trained.source.pixels[part] / 255.0, atol=1e-6)
    error = drawn(renderer, window, show="error", error_gain=4.0)
    expected = np.clip(4.0 * np.abs(np.clip(fitted, 0.0, 1.0) - original), 0.0, 1.0)
    np.testing.assert_allclose(error, expected, atol=1e-6)
    split = drawn(renderer, window, split=0.25)
    np.testing.assert_array_equal(split[:, :30], original[:, :30])
    np.testing.assert_array_equal(split[:, 30], 1.0)
    np.testing.assert_array_equal(split[:, 31:], fitted[:, 31:])


def test_windows_zoom_and_reach_beyond(trained: ImageTask) -> None:
    """Enlarged, the original is its nearest pixels; reduced, both are means; around the image is the background."""
    renderer = WindowRenderer(trained.fitted, trained.source)
    pixels = trained.source.pixels.astype(np.float32) / 255.0
    large = drawn(renderer, Window.around(100.0, 50.0, 4.0, (80, 40), (80, 40)), show="original")
    np.testing.assert_allclose(large, pixels[45:55, 90:110].repeat(4, axis=0).repeat(4, axis=1), atol=1e-6)
    small = drawn(renderer, Window(0.0, 0.0, 3.0, 4.0, 100, 50), show="original")
    # Of 3 x 4 pixels 4 x 4 samples see one column twice
    columns = np.floor((np.arange(400) + 0.5) * 3.0 / 4.0).astype(int)
    means = pixels[:, columns].reshape(50, 4, 100, 4, 3).mean(axis=(1, 3))
    np.testing.assert_allclose(small, means, atol=1e-5)
    whole = np.concatenate([values for _, values in trained.fitted.strips()])
    half = drawn(renderer, Window(0.0, 0.0, 2.0, 2.0, 150, 100))
    np.testing.assert_allclose(half, whole.reshape(100, 2, 150, 2, 3).mean(axis=(1, 3)), atol=1e-6)
    around = drawn(renderer, Window(-10.0, -20.0, 1.0, 1.0, 30, 50))
    np.testing.assert_array_equal(around[20:, 10:], whole[:30, :20])
    assert (around[:20] == around[0, 0]).all() and (around[:, :10] == around[0, 0]).all()


def test_impossible_windows_are_refused(trained: ImageTask, png: Path) -> None:
    """Zooms not positive, windows without size, another image's source, no source to show."""
    with pytest.raises(ImageError, match="zoom must be positive"):
        Window.around(0.0, 0.0, 0.0, (8, 8), (8, 8))
    with pytest.raises(ImageError, match="a window needs"):
        Window(0.0, math.nan, 1.0, 1.0, 8, 8)
    with pytest.raises(ImageError, match=r"90x61 .* the fit 300x200"):
        WindowRenderer(trained.fitted, PixelSource(png))
    with pytest.raises(ImageError, match="original image is not there"):
        WindowRenderer(trained.fitted).draw(Window(0.0, 0.0, 1.0, 1.0, 8, 8), show="error")


def test_snapshot_gives_image_measures_and_field(trained: ImageTask, tmp_path: Path) -> None:
    """A snapshot shows the same picture, measures the same, and is a `Field` for others."""
    path = tmp_path / "snapshot.safetensors"
    trained.save(path, {"seconds": 1.5, "steps": 150})
    measures = trained.evaluate()
    assert evaluate_snapshot(path, device="cpu") == measures
    assert measures["snapshot_bytes"] == path.stat().st_size
    assert measures["source_bytes"] == trained.source.path.stat().st_size
    np.testing.assert_array_equal(FittedImage.load(path, "cpu").reconstruct(), trained.fitted.reconstruct())
    assert nrc.Field.load(path, device="cpu").n_params == trained.n_params
    with pytest.raises(ImageError, match=r"90x61 .* the fit 300x200"):
        evaluate_snapshot(path, source=save(tmp_path / "other.png", photo()), device="cpu")
    trained.field.save(tmp_path / "field.safetensors")
    with pytest.raises(SnapshotError, match="not the snapshot of an image"):
        FittedImage.load(tmp_path / "field.safetensors", "cpu")


def test_pictures_are_the_reconstruction_and_its_error(
    trained: ImageTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole PNG and strips of TIFF hold the same pixels; the error picture is the difference, white at 0.1."""
    pictures = trained.pictures(tmp_path)
    whole = trained.fitted.reconstruct()
    np.testing.assert_array_equal(np.asarray(Image.open(pictures["reconstruction"])), whole)
    difference = np.sqrt(np.square((whole - trained.source.pixels.astype(float)) / 255.0).mean(axis=2))
    error = np.asarray(Image.open(pictures["error"])).astype(float)
    assert (
        np.abs(error - np.clip(difference * 2550.0, 0.0, 255.0)).max() < 6.0
    )  # the picture is of values before rounding
    monkeypatch.setattr(fitted_image, "WHOLE_PNG_PIXELS", 0)
    monkeypatch.setattr(fitted_image, "STRIP_PIXELS", 1)
    tiff = trained.pictures(tmp_path)["reconstruction"]
    assert tiff.suffix == ".tif"
    np.testing.assert_array_equal(np.asarray(Image.open(tiff)), whole)


def test_error_picture_of_a_wide_image_is_scaled_down(trained: ImageTask, monkeypatch: pytest.MonkeyPatch) -> None:
    """Squares of pixels are averaged, those cut off by the border included."""
    monkeypatch.setattr(fitted_image, "ERROR_WIDTH", 43)  # 7 x 7 pixels: neither side divides
    shown = np.clip(np.concatenate([values for _, values in trained.fitted.strips()]), 0.0, 1.0)
    square = np.square(shown - trained.source.pixels / 255.0).mean(axis=2)
    expected = [[math.sqrt(square[y : y + 7, x : x + 7].mean()) for x in range(0, 300, 7)] for y in range(0, 200, 7)]
    picture = fitted_image.error_picture(trained.fitted, trained.source)
    np.testing.assert_allclose(picture[:, :, 0], np.clip(np.array(expected) * 2550.0, 0.0, 255.0), atol=0.51)


def test_resumed_run_equals_the_uninterrupted_one(png: Path) -> None:
    """State after 5 steps, restored into a new task with other threads, leads to the same bits after 12."""
    straight, first, second = (small_task(png, config={"optimizer": EMA}) for _ in range(3))
    try:
        set_threads(1)
        for _ in range(12):
            straight.step()
        set_threads(3)
        for _ in range(5):
            first.step()
        second.load_state("checkpoint", {name: array.copy() for name, array in first.state().items()})
        set_threads(2)
        for _ in range(7):
            second.step()
    finally:
        set_threads(0)
    assert second.n_steps == 12
    expected, found = straight.state(), second.state()
    assert expected.keys() == found.keys()
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)
    assert straight.evaluate() == second.evaluate()
    assert straight.identity() == second.identity()


def test_fitted_follows_training(png: Path) -> None:
    """After measuring and more steps the picture is that of the newest average, not of the one measured."""
    task = small_task(png, config={"optimizer": EMA})
    task.step()
    task.evaluate()
    for _ in range(20):
        task.step()
    shown = np.concatenate([values for _, values in task.fitted.strips()])
    task.evaluate()
    np.testing.assert_array_equal(np.concatenate([values for _, values in task.fitted.strips()]), shown)


EMA = {"otype": "Ema", "decay": 0.95, "nested": {"otype": "Adam", "learning_rate": 1e-2}}


def test_wrong_state_is_refused(png: Path) -> None:
    """A state with a missing array or another shape raises SnapshotError and changes nothing."""
    task = small_task(png)
    task.step()
    before = {name: array.copy() for name, array in task.state().items()}
    for wrong in ({}, before | {"params": before["params"][:-1]}, before | {"task.n_steps": np.array([-1])}):
        with pytest.raises(SnapshotError):
            task.load_state("checkpoint", wrong)
    after = task.state()
    for name in before:
        np.testing.assert_array_equal(after[name], before[name])


def test_identity_changes_with_what_decides_the_result(png: Path, tmp_path: Path) -> None:
    """Another seed, setting or content of the file is another run; another name of the file is the same."""
    renamed = tmp_path / "renamed.png"
    renamed.write_bytes(png.read_bytes())
    assert small_task(renamed).identity() == small_task(png).identity()
    others = (
        small_task(png, seed=3),
        small_task(png, batch_size=512),
        small_task(png, grid={"n_levels": 7}),
        small_task(save(tmp_path / "other.png", photo() + 1)),
    )
    for other in others:
        assert other.identity() != small_task(png).identity()


def test_focus_draws_nine_in_ten_samples_from_its_region(png: Path) -> None:
    """With a focus 90 % of a batch are inside, evenly over its pixels; without one the batch is as before."""
    task = small_task(png)
    task.focus = (10, 20, 30, 40)
    task.step()
    x, y = np.rint(task._x.numpy() * 90 - 0.5).astype(int).T
    inside = (x >= 10) & (x < 30) & (y >= 20) & (y < 40)
    n_focus = round(0.9 * 1024)
    assert inside[:n_focus].all()
    counts = Counter(zip(x[:n_focus].tolist(), y[:n_focus].tolist(), strict=True))
    assert len(counts) == 400
    assert max(counts.values()) == math.ceil(n_focus / 400)
    with pytest.raises(ImageError, match="region must be"):
        task.focus = (0, 0, 91, 5)
    task.focus = None
    plain = small_task(png)
    plain.step()
    plain.step()
    task.step()
    np.testing.assert_array_equal(task._x.numpy(), plain._x.numpy())


@pytest.mark.parametrize("region", [(10, 20, 45, 40), (3, 4, 4, 5)])
def test_small_focus_draws_its_pixels_equally_often(png: Path, region: tuple[int, int, int, int]) -> None:
    """Where a region has fewer pixels than its share has rows, no pixel comes twice more often than another."""
    task = small_task(png)
    task.focus = x0, y0, x1, y1 = region
    counts: Counter = Counter()
    for _ in range(5):
        task.step()
        x, y = np.rint(task._x.numpy()[: round(0.9 * 1024)] * 90 - 0.5).astype(int).T
        counts.update(zip(x.tolist(), y.tolist(), strict=True))
    assert set(counts) == {(x, y) for x in range(x0, x1) for y in range(y0, y1)}
    assert max(counts.values()) - min(counts.values()) <= 1


def test_focus_sharpens_its_region() -> None:
    """Concentrated samples lower the error inside by more than the same steps on the whole image would."""
    example = runpy.run_path(str(CHECKOUT / "examples" / "focus_region.py"))
    image = CHECKOUT / "docs" / "pictures" / "ajar_room_nrc.png"
    settings = {"steps": 60, "focus_steps": 60, "device": "cpu"}
    result = example["focus_region"](image, **settings)
    longer = example["focus_region"](image, **(settings | {"steps": 120, "focus_steps": 0}))
    assert result["after"]["inside"] > result["before"]["inside"] + 0.5
    assert result["after"]["inside"] > longer["before"]["inside"] + 0.5


@pytest.mark.parametrize("n_channels", [1, 2, 4])
def test_all_channel_counts_are_fitted_and_written(tmp_path: Path, n_channels: int) -> None:
    """Grey and alpha are trained, and the picture has as many channels as the source."""
    image = photo(40, 50, n_channels)
    path = save(tmp_path / "a.png", image[:, :, 0] if n_channels == 1 else image, {2: "LA"}.get(n_channels))
    if n_channels == 2:
        Image.fromarray(image, "LA").save(path)
    task = small_task(path)
    before = task.progress()["psnr"]
    for _ in range(30):
        task.step()
    assert task.progress()["psnr"] > before + 3.0
    written = np.asarray(Image.open(task.pictures(tmp_path)["reconstruction"]))
    assert written.reshape(40, 50, -1).shape[2] == n_channels
    assert np.abs(written.reshape(image.shape).astype(float) - image).mean() < 40.0


@pytest.mark.gpu
def test_cuda_draws_the_same_batches(png: Path) -> None:
    """Pixels on the device and pixels gathered by the CPU give the same batch, which is the CPU's."""
    cpu, cuda = small_task(png), small_task(png, device="cuda:0")
    for _ in range(3):
        cpu.step()
        cuda.step()
    np.testing.assert_allclose(cuda._x.numpy(), cpu._x.numpy(), rtol=1e-6)
    np.testing.assert_allclose(cuda._y.numpy(), cpu._y.numpy(), rtol=1e-6)
    assert wp.get_device("cuda:0") == cuda.device
