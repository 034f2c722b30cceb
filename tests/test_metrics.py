"""Metrics against closed forms, scikit-image's SSIM and NVIDIA's FLIP."""

from __future__ import annotations

import math
import platform
import sys

import numpy as np
import pytest

from nrc.image import ImageError
from nrc.metrics import compare, difference_picture, flip, mean_bias, mse, psnr, relmse, ssim

# flip-evaluator computes in float32; its map and ours differ by rounding amplified by the exponent 0.7 near zero.
FLIP_MAP_TOLERANCE = 2e-4
FLIP_MEAN_TOLERANCE = 2e-5


def wave() -> np.ndarray:
    """A smooth test picture (48, 64, 3) in [0, 1]."""
    y, x = np.mgrid[0:48, 0:64] / 16.0
    return np.stack([0.5 + 0.5 * np.sin(x * y), 0.5 + 0.5 * np.cos(2 * x + y), 0.5 + 0.25 * np.sin(3 * y)], axis=2)


def disturbed_wave() -> np.ndarray:
    """`wave` darkened and overlaid with ripples."""
    y, x = np.mgrid[0:48, 0:64] / 16.0
    ripples = np.stack([np.cos(5 * x), np.sin(7 * y), np.sin(x + 4 * y)], axis=2) ** 2
    return np.clip(0.9 * wave() + 0.1 * ripples, 0.0, 1.0)


VARIANTS = {"disturbed": disturbed_wave(), "inverted": 1.0 - wave(), "squared": wave() ** 2}


def test_errors_of_constant_images() -> None:
    """Constant images have the errors the formulas give by hand."""
    a, r = np.full((4, 5, 3), 0.6), np.full((4, 5, 3), 0.5)
    assert mse(a, r) == pytest.approx(0.01)
    assert relmse(a, r) == pytest.approx(0.01 / (0.25 + 0.01))
    assert psnr(a, r) == pytest.approx(20.0)
    assert psnr(255.0 * a, 255.0 * r, peak=255.0) == pytest.approx(20.0)
    assert mean_bias(a, r) == pytest.approx(0.2)


def test_relmse_weighs_each_pixel_and_channel() -> None:
    """relMSE is the mean of per-value ratios, not the ratio of means, and sees float32 without overflow."""
    r = np.array([[[0.0, 1.0, 1e30]]], np.float32)
    a = np.array([[[0.1, 2.0, 2e30]]], np.float32)
    assert relmse(a, r) == pytest.approx((0.01 / 0.01 + 1.0 / 1.01 + 1.0) / 3.0, rel=1e-6)


def test_black_reference_has_a_defined_bias() -> None:
    """Bias against black is 0 for black and infinite otherwise."""
    black = np.zeros((2, 2, 3))
    assert mean_bias(black, black) == 0.0
    assert mean_bias(black + 1.0, black) == math.inf


# skimage.metrics.structural_similarity 0.26.0 with channel_axis=2, gaussian_weights=True, sigma=1.5,
# use_sample_covariance=False, data_range=1.0
@pytest.mark.parametrize(
    ("variant", "expected"),
    [("disturbed", 0.8308109264375797), ("inverted", -0.36640051795470024), ("squared", 0.7021094188620967)],
)
def test_ssim_equals_scikit_image(variant: str, expected: float) -> None:
    """SSIM is scikit-image's to rounding."""
    assert ssim(VARIANTS[variant], wave()) == pytest.approx(expected, abs=1e-12)


def test_ssim_of_constant_images() -> None:
    """Without variance SSIM is its luminance term, on images smaller than the window too."""
    expected = (2 * 0.3 * 0.6 + 1e-4) / (0.3**2 + 0.6**2 + 1e-4)
    for size in (3, 40):
        assert ssim(np.full((size, size, 3), 0.3), np.full((size, size, 3), 0.6)) == pytest.approx(expected, rel=1e-9)


# flip-evaluator 1.7, evaluate(reference, test, "LDR", inputsRGB=True, applyMagma=False, parameters={"ppd": 67.0})
@pytest.mark.parametrize(
    ("variant", "expected"),
    [("disturbed", 0.24824769794940948), ("inverted", 0.9599225521087646), ("squared", 0.5835095643997192)],
)
def test_flip_mean_equals_the_published_tool(variant: str, expected: float) -> None:
    """Mean FLIP is the published implementation's."""
    assert float(flip(VARIANTS[variant], wave()).mean()) == pytest.approx(expected, abs=FLIP_MEAN_TOLERANCE)


@pytest.mark.parametrize("ppd", [20.0, 67.0])
def test_flip_map_equals_the_published_tool(ppd: float) -> None:
    """Every pixel of the FLIP map is the published implementation's, borders and noise included."""
    if sys.version_info >= (3, 14) or platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("flip-evaluator has no wheel for this Python or machine")
    import flip_evaluator

    rng = np.random.default_rng(11)
    r = rng.random((45, 70, 3)).astype(np.float32)
    a = np.clip(r + 0.2 * rng.standard_normal(r.shape), 0.0, 1.0).astype(np.float32)
    a[:20] = r[:20]
    expected, _, _ = flip_evaluator.evaluate(r, a, "LDR", inputsRGB=True, applyMagma=False, parameters={"ppd": ppd})
    np.testing.assert_allclose(flip(a, r, ppd), expected[:, :, 0], atol=FLIP_MAP_TOLERANCE)


def test_equal_images_have_no_error() -> None:
    """An image against itself scores perfectly everywhere."""
    scores = compare(wave(), wave())
    assert scores == {"mse": 0.0, "relmse": 0.0, "psnr": math.inf, "ssim": 1.0, "flip": 0.0, "mean_bias": 0.0}
    assert (difference_picture(wave(), wave()) == 255).all()


def test_compare_shows_linear_images_as_srgb() -> None:
    """PSNR of linear 0.21404 against 0 is that of the displayed 0.5; values over 1 display as 1."""
    grey, black = np.full((16, 16, 3), 0.21404114), np.zeros((16, 16, 3))
    assert compare(grey, black)["psnr"] == pytest.approx(10.0 * math.log10(1.0 / 0.25), abs=1e-5)
    scores = compare(np.full((16, 16, 3), 9.0), np.full((16, 16, 3), 3.0))
    assert (scores["psnr"], scores["flip"], scores["mean_bias"]) == (math.inf, 0.0, pytest.approx(2.0))


def test_difference_picture_is_red_where_too_bright() -> None:
    """+100 % is red, -100 % blue, +20 % a fifth of the way from white to red."""
    r = np.full((1, 3, 3), 0.99)
    a = r + np.array([[[1.0], [-1.0], [0.2]]])
    np.testing.assert_array_equal(difference_picture(a, r), [[[255, 0, 0], [0, 0, 255], [255, 204, 204]]])


def test_unequal_or_unusable_images_are_named() -> None:
    """Different sizes name both; non-finite values are counted on the side they are on."""
    a, r = np.zeros((2, 3, 3)), np.zeros((4, 5, 3))
    with pytest.raises(ImageError, match="3 x 2 x 3 and 5 x 4 x 3"):
        compare(a, r)
    with pytest.raises(ImageError, match="zero size"):
        mse(np.zeros((0, 3, 3)), np.zeros((0, 3, 3)))
    bad = np.zeros((2, 3, 3))
    bad[0, 0] = (np.nan, np.inf, 0.0)
    with pytest.raises(ImageError, match="reference holds 2 non-finite values"):
        compare(a, bad)
    with pytest.raises(ImageError, match=r"image must have shape \(height, width, 3\)"):
        compare(a[:, :, 0], a[:, :, 0])
