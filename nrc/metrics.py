"""How far a rendered image is from its reference.

`mse`, `relmse` and `mean_bias` compare linear radiance. `psnr`, `ssim` and `flip` compare what a display shows: values
in [0, 1], sRGB-encoded. `compare` takes two linear images and computes them all.
"""

from __future__ import annotations

import math

import numpy as np
from scipy import ndimage

from nrc.image import ImageError, srgb_decode, srgb_encode

RELMSE_EPSILON = 0.01
PIXELS_PER_DEGREE = 67.0  # a 0.7 m wide 4K display seen from 0.7 m, FLIP's default

LINEAR_RGB_TO_XYZ = np.array(  # sRGB primaries and white, IEC 61966-2-1
    [
        [0.4123907992659595, 0.3575843393838780, 0.1804807884018343],
        [0.2126390058715104, 0.7151686787677559, 0.0721923153607337],
        [0.0193308187155918, 0.1191947797946259, 0.9505321522496608],
    ]
)
WHITE_XYZ = LINEAR_RGB_TO_XYZ.sum(axis=1)


def compare(a: np.ndarray, r: np.ndarray) -> dict[str, float]:
    """All metrics of the linear image `a` against the linear reference `r`, both (height, width, 3).

    Returns:
        `mse`, `relmse` and `mean_bias` of the values as they are; `psnr` [dB], `ssim` and `flip` (mean) of both images
        clipped to [0, 1] and sRGB-encoded.

    Raises:
        ImageError: Sizes differ, an image is not (height, width, 3), or holds non-finite values.
    """
    _check_same_shape(a, r)
    for name, image in (("image", a), ("reference", r)):
        if image.ndim != 3 or image.shape[2] != 3:
            raise ImageError(f"{name} must have shape (height, width, 3), got {image.shape}")
        n_bad = int(np.count_nonzero(~np.isfinite(image)))
        if n_bad:
            raise ImageError(f"{name} holds {n_bad} non-finite values")
    shown_a, shown_r = (srgb_encode(np.clip(image.astype(np.float64), 0.0, 1.0)) for image in (a, r))
    return {
        "mse": mse(a, r),
        "relmse": relmse(a, r),
        "psnr": psnr(shown_a, shown_r),
        "ssim": ssim(shown_a, shown_r),
        "flip": float(flip(shown_a, shown_r).mean()),
        "mean_bias": mean_bias(a, r),
    }


def mse(a: np.ndarray, r: np.ndarray) -> float:
    """Mean squared difference over pixels and channels."""
    _check_same_shape(a, r)
    return float(np.mean(np.square(a.astype(np.float64) - r)))


def relmse(a: np.ndarray, r: np.ndarray) -> float:
    """Relative mean squared error, mean((a - r)^2 / (r^2 + 0.01)) over pixels and channels."""
    _check_same_shape(a, r)
    reference = r.astype(np.float64)
    return float(np.mean(np.square(a - reference) / (np.square(reference) + RELMSE_EPSILON)))


def mean_bias(a: np.ndarray, r: np.ndarray) -> float:
    """mean(a) / mean(r) - 1; 0 where both means are 0, infinite where only the reference's is."""
    _check_same_shape(a, r)
    mean_a, mean_r = float(np.mean(a, dtype=np.float64)), float(np.mean(r, dtype=np.float64))
    if mean_r == 0.0:
        return 0.0 if mean_a == 0.0 else math.copysign(math.inf, mean_a)
    return mean_a / mean_r - 1.0


def psnr(a: np.ndarray, r: np.ndarray, peak: float = 1.0) -> float:
    """Peak signal-to-noise ratio [dB] of the values as given, 10 log10(peak^2 / mse); infinite for equal images."""
    error = mse(a, r)
    return math.inf if error == 0.0 else 10.0 * math.log10(peak * peak / error)


def ssim(a: np.ndarray, r: np.ndarray) -> float:
    """Mean structural similarity of two images (height, width, channels) with values in [0, 1], averaged over channels.

    Gaussian window of 11 x 11 pixels, sigma 1.5, C1 = 0.01^2, C2 = 0.03^2 (Wang et al., "Image Quality Assessment: From
    Error Visibility to Structural Similarity", 2004), over the pixels whose window lies inside; along an axis shorter
    than the window the image is mirrored instead.
    """
    _check_same_shape(a, r)
    radius = 5

    def blur(image: np.ndarray) -> np.ndarray:
        return ndimage.gaussian_filter(image, sigma=1.5, radius=radius, axes=(0, 1))

    x, y = a.astype(np.float64), r.astype(np.float64)
    mu_x, mu_y = blur(x), blur(y)
    variances = blur(x * x) - mu_x * mu_x + blur(y * y) - mu_y * mu_y
    covariance = blur(x * y) - mu_x * mu_y
    c1, c2 = 0.01**2, 0.03**2
    similarity = (2.0 * mu_x * mu_y + c1) * (2.0 * covariance + c2)  # Eq. 13
    similarity /= (mu_x * mu_x + mu_y * mu_y + c1) * (variances + c2)
    inside = tuple(slice(radius, -radius) if n > 2 * radius else slice(None) for n in x.shape[:2])
    return float(similarity[inside].mean())


def flip(a: np.ndarray, r: np.ndarray, ppd: float = PIXELS_PER_DEGREE) -> np.ndarray:
    """LDR-FLIP error map (height, width) in [0, 1] of sRGB-encoded images (height, width, 3) with values in [0, 1].

    Andersson et al., "FLIP: A Difference Evaluator for Alternating Images", 2020.

    Args:
        ppd: Pixels per degree of visual angle.
    """
    _check_same_shape(a, r)
    opponent_a, opponent_r = (_opponent(srgb_decode(np.clip(image.astype(np.float64), 0.0, 1.0))) for image in (a, r))
    color = _color_difference(_visible_lab(opponent_a, ppd), _visible_lab(opponent_r, ppd))
    features = _feature_difference((opponent_a[:, :, 0] + 16.0) / 116.0, (opponent_r[:, :, 0] + 16.0) / 116.0, ppd)
    return color ** (1.0 - features)  # the final difference


def difference_picture(a: np.ndarray, r: np.ndarray) -> np.ndarray:
    """Signed relative error as a picture (height, width, 3) uint8: white where equal, red too bright, blue too dark.

    The error (mean_rgb(a) - mean_rgb(r)) / (mean_rgb(r) + 0.01) reaches full colour at +-1.
    """
    _check_same_shape(a, r)
    mean_a, mean_r = a.mean(axis=2, dtype=np.float64), r.mean(axis=2, dtype=np.float64)
    error = np.nan_to_num(np.clip((mean_a - mean_r) / (np.abs(mean_r) + RELMSE_EPSILON), -1.0, 1.0))
    white = 1.0 - np.abs(error)
    picture = np.stack([np.where(error > 0.0, 1.0, white), white, np.where(error < 0.0, 1.0, white)], axis=2)
    return (255.0 * picture + 0.5).astype(np.uint8)


def _check_same_shape(a: np.ndarray, r: np.ndarray) -> None:
    if a.shape != r.shape:
        sizes = [" x ".join(str(n) for n in (*image.shape[1::-1], *image.shape[2:])) for image in (a, r)]
        raise ImageError(f"images differ in size (width x height x channels): {sizes[0]} and {sizes[1]}")
    if a.size == 0:
        raise ImageError(f"images have zero size, shape {a.shape}")


def _opponent(linear: np.ndarray) -> np.ndarray:
    """Linear RGB to YCxCz, the linear opponent space of the spatial filters."""
    xyz = linear @ LINEAR_RGB_TO_XYZ.T / WHITE_XYZ
    x, y, z = xyz[:, :, 0], xyz[:, :, 1], xyz[:, :, 2]
    return np.stack([116.0 * y - 16.0, 500.0 * (x - y), 200.0 * (y - z)], axis=2)


def _visible_lab(opponent: np.ndarray, ppd: float) -> np.ndarray:
    """What the eye resolves: contrast sensitivity filters, then L*a*b* with Hunt's adjustment."""
    # Amplitudes and widths [degrees^2] of each channel's Gaussians.
    channels = (((1.0, 0.0047),), ((1.0, 0.0053),), ((34.1, 0.04), (13.5, 0.025)))
    radius = math.ceil(3.0 * math.sqrt(0.04 / (2.0 * math.pi**2)) * ppd)
    degrees = np.arange(-radius, radius + 1) / ppd
    filtered = np.zeros_like(opponent)
    for i, gaussians in enumerate(channels):
        total = 0.0
        for amplitude, width in gaussians:
            kernel = np.exp(-((math.pi * degrees) ** 2) / width)
            scale = amplitude * math.sqrt(math.pi / width)
            total += scale * kernel.sum() ** 2
            filtered[:, :, i] += scale * _separable(opponent[:, :, i], kernel, kernel)
        filtered[:, :, i] /= total
    y = (filtered[:, :, 0] + 16.0) / 116.0
    xyz = np.stack([y + filtered[:, :, 1] / 500.0, y, y - filtered[:, :, 2] / 200.0], axis=2) * WHITE_XYZ
    return _hunt_lab(np.clip(xyz @ np.linalg.inv(LINEAR_RGB_TO_XYZ).T, 0.0, 1.0))


def _hunt_lab(linear: np.ndarray) -> np.ndarray:
    """Linear RGB (..., 3) to CIE L*a*b*, a* and b* scaled by 0.01 L* (Hunt effect)."""
    t = linear @ LINEAR_RGB_TO_XYZ.T / WHITE_XYZ
    delta = 6.0 / 29.0
    f = np.where(t > delta**3, np.cbrt(t), t / (3.0 * delta**2) + 4.0 / 29.0)
    lightness = 116.0 * f[..., 1] - 16.0
    hunt = 0.01 * lightness
    return np.stack(
        [lightness, hunt * 500.0 * (f[..., 0] - f[..., 1]), hunt * 200.0 * (f[..., 1] - f[..., 2])], axis=-1
    )


def _hyab(a: np.ndarray, r: np.ndarray) -> np.ndarray:
    """HyAB distance: city-block in lightness, Euclidean in chroma."""
    difference = a - r
    return np.abs(difference[..., 0]) + np.hypot(difference[..., 1], difference[..., 2])


def _color_difference(a: np.ndarray, r: np.ndarray) -> np.ndarray:
    """Colour error in [0, 1]: compressed HyAB, its lower 40 % spread over 95 % of the range."""
    exponent, knee, knee_value = 0.7, 0.4, 0.95
    largest = float(_hyab(_hunt_lab(np.array([0.0, 1.0, 0.0])), _hunt_lab(np.array([0.0, 0.0, 1.0])))) ** exponent
    error = _hyab(a, r) ** exponent / largest
    return np.where(
        error < knee, knee_value / knee * error, knee_value + (1.0 - knee_value) * (error - knee) / (1.0 - knee)
    )


def _feature_difference(a: np.ndarray, r: np.ndarray, ppd: float) -> np.ndarray:
    """Difference in edges and points of two achromatic images in [0, 1]."""
    sigma = 0.5 * 0.082 * ppd  # half an edge's visible width of 0.082 degrees
    radius = math.ceil(3.0 * sigma)
    x = np.arange(-radius, radius + 1, dtype=np.float64)
    gaussian = np.exp(-(x**2) / (2.0 * sigma**2))
    differences = []
    for derivative in (-x * gaussian, (x**2 / sigma**2 - 1.0) * gaussian):  # edges, points
        kernel = np.where(derivative > 0.0, derivative, 0.0) / derivative[derivative > 0.0].sum()
        kernel += np.where(derivative < 0.0, derivative, 0.0) / -derivative[derivative < 0.0].sum()
        smooth = gaussian / gaussian.sum()
        strength_a, strength_r = (
            np.hypot(_separable(image, kernel, smooth), _separable(image, smooth, kernel)) for image in (a, r)
        )
        differences.append(np.abs(strength_a - strength_r))
    return np.sqrt(np.maximum(*differences) / math.sqrt(2.0))


def _separable(image: np.ndarray, along_x: np.ndarray, along_y: np.ndarray) -> np.ndarray:
    """Correlate (height, width) with two one-dimensional kernels, the border repeated."""
    return ndimage.correlate1d(ndimage.correlate1d(image, along_x, axis=1, mode="nearest"), along_y, 0, mode="nearest")
