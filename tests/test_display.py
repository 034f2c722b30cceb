"""Pictures for the screen against NumPy twins in double precision: operators, exposure, encoding, false colours."""

from __future__ import annotations

import math

import numpy as np
import pytest
import warp as wp
from test_renderer import frames, renderer_of

from nrc.display import Display, ToneMapping
from nrc.image import to_srgb8

DEVICE = wp.get_device("cpu")
ONE_CODE = 1  # single against double precision may round to the neighbouring code value
OPERATORS = ("none", "reinhard", "aces", "agx")

# Matrices as rows, from the sources named in nrc/kernels/display.py.
ACES_IN = np.array([[0.59719, 0.35458, 0.04823], [0.07600, 0.90834, 0.01566], [0.02840, 0.13383, 0.83777]])
ACES_OUT = np.array([[1.60475, -0.53108, -0.07367], [-0.10208, 1.10813, -0.00605], [-0.00327, -0.07276, 1.07602]])
AGX_IN = np.array(
    [
        [0.842479062253094, 0.0784335999999992, 0.0792237451477643],
        [0.0423282422610123, 0.878468636469772, 0.0791661274605434],
        [0.0423756549057051, 0.0784336, 0.879142973793104],
    ]
)
AGX_POLYNOMIAL = (15.5, -40.14, 31.96, -6.868, 0.4298, 0.1191, -0.00232)


def twin(radiance: np.ndarray, operator: str, exposure: float) -> np.ndarray:
    """Code values (n, 3) as they should be, as float before rounding."""
    c = np.nan_to_num(radiance.astype(np.float64), nan=0.0, posinf=1e9, neginf=0.0) * 2.0**exposure
    c = np.clip(c, 0.0, 1e9)
    if operator == "reinhard":
        c = c / (1.0 + c @ [0.2126, 0.7152, 0.0722])[:, None]
    elif operator == "aces":
        v = c @ ACES_IN.T
        c = (v * (v + 0.0245786) - 0.000090537) / (v * (0.983729 * v + 0.4329510) + 0.238081) @ ACES_OUT.T
    elif operator == "agx":
        stops = np.clip(np.log2(np.maximum(c @ AGX_IN.T, 1e-10)), -12.47393, 4.026069)
        x = (stops + 12.47393) / (4.026069 + 12.47393)
        c = np.maximum(np.polyval(AGX_POLYNOMIAL, x) @ np.linalg.inv(AGX_IN).T, 0.0) ** 2.2
    c = np.clip(c, 0.0, 1.0)
    return 255.0 * np.where(c <= 0.0031308, 12.92 * c, 1.055 * c ** (1.0 / 2.4) - 0.055)


def colors(n: int = 4000) -> np.ndarray:
    """Random hues over twelve stops around 1, greys, primaries, and black."""
    rng = np.random.default_rng(1)
    random = rng.random((n, 3)) * 2.0 ** rng.uniform(-8.0, 4.0, (n, 1))
    greys = np.repeat(np.geomspace(1e-5, 1e3, 100)[:, None], 3, axis=1)
    return np.concatenate([random, greys, 3.0 * np.eye(3), np.zeros((1, 3))]).astype(np.float32)


def shown(radiance: np.ndarray, tone: ToneMapping) -> np.ndarray:
    """(n, 4) bytes as they lie in memory."""
    display = Display(DEVICE)
    for buffer in (0, 1):
        display._buffers[buffer] = wp.full(len(radiance), 0x01020304, dtype=wp.uint32, device=DEVICE)
    pixels = display.show(wp.array(radiance, dtype=wp.vec3, device=DEVICE), tone)
    assert pixels.dtype == wp.uint32 and pixels.shape == (len(radiance),)
    return pixels.numpy().view(np.uint8).reshape(-1, 4)


@pytest.mark.parametrize("exposure", [0.0, 2.5, -3.0])
@pytest.mark.parametrize("operator", OPERATORS)
def test_bytes_are_those_of_the_twin(operator, exposure):
    """R, G, B within rounding, A = 255."""
    pixels = shown(colors(), ToneMapping(operator, exposure))
    assert np.abs(pixels[:, :3] - twin(colors(), operator, exposure)).max() < 0.5 + 0.02
    assert (pixels[:, 3] == 255).all()


def test_without_operator_it_is_the_png():
    """`none` at any exposure is what `nrc.image` writes."""
    for exposure in (0.0, 1.0):
        pixels = shown(colors(), ToneMapping(exposure=exposure))[:, :3].astype(int)
        assert np.abs(pixels - to_srgb8(colors()[:, None], exposure)[:, 0].astype(int)).max() <= ONE_CODE


@pytest.mark.parametrize("operator", OPERATORS)
def test_edge_values(operator):
    """NaN and negative components count as 0, infinity is as bright as it gets, whatever the exposure."""
    bad = np.array([[math.nan] * 3, [-1.0, -math.inf, -0.0], [math.inf] * 3, [3e38] * 3, [1e-40] * 3], np.float32)
    good = np.array([[0.0] * 3, [0.0] * 3, [1e9] * 3, [1e9] * 3, [0.0] * 3], np.float32)
    for exposure in (-20.0, 0.0, 64.0):
        tone = ToneMapping(operator, exposure)
        pixels = shown(bad, tone)
        assert np.array_equal(pixels[:2], shown(good, tone)[:2])
        assert (pixels[:2, :3] == 0).all()
        if exposure >= 0.0:
            assert np.array_equal(pixels[2:4], shown(good, tone)[2:4]) and (pixels[2:4, :3] >= 254).all()
    mixed = shown(np.array([[math.nan, 0.5, -1.0]], np.float32), ToneMapping(operator))
    assert np.array_equal(mixed, shown(np.array([[0.0, 0.5, 0.0]], np.float32), ToneMapping(operator)))


@pytest.mark.parametrize("operator", OPERATORS)
def test_brighter_greys_are_not_darker(operator):
    """Greys stay grey within two code values and rise with radiance, from black to white."""
    grey = np.repeat(np.geomspace(1e-6, 1e4, 2000)[:, None], 3, axis=1).astype(np.float32)
    pixels = shown(grey, ToneMapping(operator))[:, :3].astype(int)
    assert (np.diff(pixels, axis=0) >= 0).all() and pixels[0].max() <= 1 and pixels[-1].min() >= 254
    assert np.ptp(pixels, axis=1).max() <= 2


@pytest.mark.parametrize(
    "options", [{"operator": "filmic"}, {"exposure": math.nan}, {"exposure": math.inf}, {"exposure": -65.0}]
)
def test_invalid_tone_mappings_are_refused(options):
    """The message names the field."""
    with pytest.raises(ValueError, match=next(iter(options))):
        ToneMapping(**options)


@pytest.mark.parametrize("integrator", ["path", "nrc"])
def test_film_is_shown_as_its_image(integrator):
    """The film's mean on the device is `image` to single precision, black before the first frame, any number after."""
    renderer = renderer_of(integrator=integrator, size=12)
    display = Display(DEVICE)
    for n in (0, 1, 4):
        frames(renderer, n)
        image = renderer.image().reshape(-1, 3)
        assert np.allclose(renderer.film.mean().numpy(), image, rtol=1e-6, atol=1e-9)
        tone = ToneMapping("aces", 1.0)
        pixels = display.show_film(renderer.film, tone).numpy().view(np.uint8).reshape(-1, 4)
        assert np.abs(pixels[:, :3] - twin(image, "aces", 1.0)).max() < 0.5 + 0.02
    assert pixels[:, :3].max() > 50


def test_two_buffers_take_turns():
    """A picture survives the next call; sizes may change in between, and small ones allocate nothing."""
    display = Display(DEVICE)

    def show(n: int, value: float) -> wp.array:
        return display.show(wp.full(n, wp.vec3(value, value, value), dtype=wp.vec3, device=DEVICE))

    first = show(6, 0.0)
    second = show(9, 1.0)
    assert (first.numpy() == 0xFF000000).all() and (second.numpy() == 0xFFFFFFFF).all()
    third = show(6, 1.0)
    assert third.ptr == first.ptr and second.shape == (9,) and (second.numpy() == 0xFFFFFFFF).all()
    fourth = show(4, 0.0)
    assert fourth.ptr == second.ptr and (third.numpy() == 0xFFFFFFFF).all() and fourth.shape == (4,)


def test_false_colours_follow_the_map():
    """Matplotlib's viridis between the bounds, its ends outside, black for NaN."""
    from matplotlib import colormaps

    values = np.concatenate([np.linspace(-2.0, 6.0, 999), [math.nan, math.inf, -math.inf]]).astype(np.float32)
    pixels = Display(DEVICE).show_scalars(wp.array(values, dtype=float, device=DEVICE), -1.0, 5.0)
    pixels = pixels.numpy().view(np.uint8).reshape(-1, 4)
    t = np.clip((values[:999].astype(np.float64) + 1.0) / 6.0, 0.0, 1.0)
    nearest = np.round(255.0 * t).astype(int)
    table = colormaps["viridis"](np.arange(256), bytes=True)
    assert np.array_equal(pixels[:999], table[nearest])
    assert pixels[999:].tolist() == [[0, 0, 0, 255], table[255].tolist(), table[0].tolist()]


def test_false_colours_of_a_constant():
    """Equal bounds tell below from the rest; unordered or infinite ones are refused."""
    display = Display(DEVICE)
    values = wp.array([0.0, 1.0, 2.0], dtype=float, device=DEVICE)
    pixels = display.show_scalars(values, 1.0, 1.0).numpy()
    assert pixels[0] != pixels[1] == pixels[2]
    for lower, upper in ((1.0, 0.0), (math.nan, 1.0), (0.0, math.inf)):
        with pytest.raises(ValueError, match="lower"):
            display.show_scalars(values, lower, upper)
