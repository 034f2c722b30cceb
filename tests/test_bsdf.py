"""BSDFs against Mitsuba 3 and a NumPy twin, and every sampler against its own density."""

import functools

import numpy as np
import pytest
import warp as wp
from reference_bsdf import metallic_roughness_f
from scipy import stats

from nrc.kernels.bsdf import (
    Bsdf,
    bsdf_albedo,
    bsdf_eval_pdf,
    bsdf_has_smooth_lobe,
    bsdf_roughness,
    bsdf_sample,
)
from nrc.launch import launch
from nrc.plastic import plastic_table
from nrc.scene import MATERIAL_KINDS

wp.set_module_options({"enable_backward": False})


@wp.kernel
def evaluate_bsdf(
    first: int,
    # Scene
    bsdf: wp.array[Bsdf],  # (1,)
    # In
    wo: wp.array[wp.vec3],
    wi: wp.array[wp.vec3],
    # Out
    out_f_pdf: wp.array[wp.vec4],
):
    """Evaluate one direction pair. One thread per pair."""
    i = first + wp.tid()
    out_f_pdf[i] = bsdf_eval_pdf(bsdf[0], wo[i], wi[i])


@wp.kernel
def draw_bsdf(
    first: int,
    # Scene
    bsdf: wp.array[Bsdf],  # (1,)
    # In
    wo: wp.array[wp.vec3],
    u: wp.array[wp.vec3],
    # Out
    out_wi: wp.array[wp.vec3],
    out_weight_pdf: wp.array[wp.vec4],
    out_delta_eta: wp.array[wp.vec2],
):
    """Draw one direction. One thread per draw."""
    i = first + wp.tid()
    s = bsdf_sample(bsdf[0], wo[i], u[i])
    out_wi[i] = s.wi
    out_weight_pdf[i] = wp.vec4(s.weight[0], s.weight[1], s.weight[2], s.pdf)
    out_delta_eta[i] = wp.vec2(float(s.delta), s.eta)


@wp.kernel
def summarize_bsdf(
    first: int,
    # Scene
    bsdf: wp.array[Bsdf],  # (n,)
    # In
    wo: wp.array[wp.vec3],
    # Out
    out_diffuse: wp.array[wp.vec3],
    out_specular: wp.array[wp.vec3],
    out_roughness: wp.array[float],
    out_smooth_lobe: wp.array[int],
):
    """Albedo, roughness and lobe flag. One thread per material."""
    i = first + wp.tid()
    albedo = bsdf_albedo(bsdf[i], wo[i])
    out_diffuse[i] = albedo.diffuse
    out_specular[i] = albedo.specular
    out_roughness[i] = bsdf_roughness(bsdf[i])
    out_smooth_lobe[i] = wp.where(bsdf_has_smooth_lobe(bsdf[i]), 1, 0)


CPU = wp.get_device("cpu")
RED = (0.8, 0.4, 0.1)
BLUE = (0.3, 0.6, 0.9)
GOLD_ETA, GOLD_K = (0.143, 0.375, 1.442), (3.983, 2.386, 1.603)


@functools.cache
def coat_table(ior: float, alpha: tuple[float, float], beckmann: bool) -> wp.array:
    """A rough plastic's table on the device."""
    return wp.array(plastic_table(ior, alpha, beckmann, CPU), dtype=float, device=CPU)


def make_bsdf(kind: str, alpha: tuple[float, float] | float = 0.0, **fields) -> Bsdf:
    """Bsdf with `nrc.scene.Material`'s defaults and the given fields."""
    b = Bsdf()
    b.kind = MATERIAL_KINDS.index(kind)
    b.base_color, b.specular, b.transmittance = wp.vec3(0.5), wp.vec3(1.0), wp.vec3(1.0)
    b.ior, b.specular_factor, b.k = 1.5, 1.0, wp.vec3(1.0)
    alpha = alpha if isinstance(alpha, tuple) else (alpha, alpha)
    b.alpha = wp.vec2(*alpha)
    for name, value in fields.items():
        setattr(b, name, wp.vec3(*value) if isinstance(value, tuple) else value)
    if kind == "plastic" and max(alpha) > 0.0:
        b.plastic_table = coat_table(b.ior, alpha, bool(b.beckmann)).ptr
    return b


def on_device(b: Bsdf) -> wp.array:
    return wp.array([b], dtype=Bsdf, device=CPU)


def vectors(x: np.ndarray) -> wp.array:
    return wp.array(np.ascontiguousarray(x, np.float32), dtype=wp.vec3, device=CPU)


def evaluate(b: Bsdf, wo: np.ndarray, wi: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """f (n, 3) and pdf (n,)."""
    out = wp.full(len(wo), wp.vec4(np.nan), dtype=wp.vec4, device=CPU)
    launch(evaluate_bsdf, len(wo), inputs=[on_device(b), vectors(wo), vectors(wi)], outputs=[out], device=CPU)
    return out.numpy()[:, :3], out.numpy()[:, 3]


def draw(b: Bsdf, wo: np.ndarray, u: np.ndarray) -> dict[str, np.ndarray]:
    """wi (n, 3), weight (n, 3), pdf, delta, eta (n,)."""
    n = len(wo)
    wi = wp.full(n, wp.vec3(np.nan), dtype=wp.vec3, device=CPU)
    weight_pdf = wp.full(n, wp.vec4(np.nan), dtype=wp.vec4, device=CPU)
    delta_eta = wp.full(n, wp.vec2(np.nan), dtype=wp.vec2, device=CPU)
    inputs = [on_device(b), vectors(wo), vectors(u)]
    launch(draw_bsdf, n, inputs=inputs, outputs=[wi, weight_pdf, delta_eta], device=CPU)
    weight_pdf, delta_eta = weight_pdf.numpy(), delta_eta.numpy()
    return {
        "wi": wi.numpy(),
        "weight": weight_pdf[:, :3],
        "pdf": weight_pdf[:, 3],
        "delta": delta_eta[:, 0] > 0.0,
        "eta": delta_eta[:, 1],
    }


def summarize(bsdfs: list[Bsdf], wo: np.ndarray) -> tuple[np.ndarray, ...]:
    """Diffuse and specular albedo (n, 3), roughness and smooth-lobe flag (n,)."""
    n = len(bsdfs)
    diffuse, specular = (wp.full(n, wp.vec3(np.nan), dtype=wp.vec3, device=CPU) for _ in range(2))
    roughness = wp.full(n, np.nan, dtype=float, device=CPU)
    smooth = wp.full(n, -1, dtype=int, device=CPU)
    inputs = [wp.array(bsdfs, dtype=Bsdf, device=CPU), vectors(wo)]
    launch(summarize_bsdf, n, inputs=inputs, outputs=[diffuse, specular, roughness, smooth], device=CPU)
    return diffuse.numpy(), specular.numpy(), roughness.numpy(), smooth.numpy()


def sphere(rng: np.random.Generator, n: int) -> np.ndarray:
    """Uniform directions, every eighth one nearly grazing, float32-representable."""
    z = rng.uniform(-1.0, 1.0, n)
    z[::8] *= 10.0 ** rng.uniform(-3.0, -1.0, len(z[::8]))
    phi = rng.uniform(0.0, 2.0 * np.pi, n)
    r = np.sqrt(1.0 - z * z)
    return np.stack([r * np.cos(phi), r * np.sin(phi), z], axis=1).astype(np.float32)


def direction(theta: float, phi: float = 0.7) -> np.ndarray:
    """Unit vector with polar angle `theta` [rad]."""
    return np.array([np.sin(theta) * np.cos(phi), np.sin(theta) * np.sin(phi), np.cos(theta)], np.float32)


def rgb(value: tuple[float, ...]) -> dict:
    return {"type": "rgb", "value": list(value)}


def conductor(distribution: str, au: float, av: float) -> tuple[Bsdf, dict]:
    ours = make_bsdf(
        "conductor", (au, av), eta=GOLD_ETA, k=GOLD_K, specular=BLUE, beckmann=int(distribution == "beckmann")
    )
    theirs = {"type": "roughconductor", "distribution": distribution, "alpha_u": au, "alpha_v": av}
    return ours, theirs | {"eta": rgb(GOLD_ETA), "k": rgb(GOLD_K), "specular_reflectance": rgb(BLUE)}


def dielectric(distribution: str, au: float, av: float, ior: float) -> tuple[Bsdf, dict]:
    beckmann = int(distribution == "beckmann")
    ours = make_bsdf("dielectric", (au, av), ior=ior, specular=BLUE, transmittance=RED, beckmann=beckmann)
    theirs = {"type": "roughdielectric", "distribution": distribution, "alpha_u": au, "alpha_v": av}
    return ours, theirs | ior_and_tints(ior)


def ior_and_tints(ior: float) -> dict:
    return {
        "int_ior": ior,
        "ext_ior": 1.0,
        "specular_reflectance": rgb(BLUE),
        "specular_transmittance": rgb(RED),
    }


def plastic(distribution: str, alpha: float, nonlinear: bool, ior: float) -> tuple[Bsdf, dict]:
    beckmann = int(distribution == "beckmann")
    ours = make_bsdf(
        "plastic", alpha, base_color=RED, specular=BLUE, ior=ior, nonlinear=int(nonlinear), beckmann=beckmann
    )
    theirs = {"type": "plastic", "int_ior": ior, "ext_ior": 1.0, "nonlinear": nonlinear}
    theirs |= {"diffuse_reflectance": rgb(RED), "specular_reflectance": rgb(BLUE)}
    if alpha > 0.0:
        theirs |= {"type": "roughplastic", "distribution": distribution, "alpha": alpha}
    return ours, theirs


def principled(roughness: float, eta: float = 1.5, spec_trans: float = 0.0, **fields) -> tuple[Bsdf, dict]:
    ours = make_bsdf("principled", roughness**2, base_color=RED, ior=eta, transmission=spec_trans, **fields)
    theirs = {"type": "principled", "base_color": rgb(RED), "roughness": roughness, "eta": eta}
    return ours, theirs | {"spec_trans": spec_trans} | fields


# Every material Mitsuba has too: (ours, theirs).
SHARED = {
    "diffuse": (make_bsdf("diffuse", base_color=RED), {"type": "diffuse", "reflectance": rgb(RED)}),
    "mirror": (
        make_bsdf("conductor", eta=GOLD_ETA, k=GOLD_K, specular=BLUE),
        {"type": "conductor", "eta": rgb(GOLD_ETA), "k": rgb(GOLD_K), "specular_reflectance": rgb(BLUE)},
    ),
    "conductor_ggx": conductor("ggx", 0.3, 0.3),
    "conductor_ggx_sharp": conductor("ggx", 0.02, 0.02),
    "conductor_ggx_anisotropic": conductor("ggx", 0.1, 0.6),
    "conductor_ggx_alpha_1": conductor("ggx", 1.0, 1.0),
    "conductor_beckmann": conductor("beckmann", 0.3, 0.3),
    "conductor_beckmann_anisotropic": conductor("beckmann", 0.5, 0.15),
    "conductor_beckmann_alpha_1": conductor("beckmann", 1.0, 1.0),
    "glass": (
        make_bsdf("dielectric", ior=1.5, specular=BLUE, transmittance=RED),
        {"type": "dielectric"} | ior_and_tints(1.5),
    ),
    "bubble": (
        make_bsdf("dielectric", ior=0.75, specular=BLUE, transmittance=RED),
        {"type": "dielectric"} | ior_and_tints(0.75),
    ),
    "dielectric_ggx": dielectric("ggx", 0.3, 0.3, 1.5),
    "dielectric_ggx_anisotropic": dielectric("ggx", 0.2, 0.5, 1.33),
    "dielectric_ggx_inverted": dielectric("ggx", 0.4, 0.4, 0.7),
    "dielectric_beckmann": dielectric("beckmann", 0.3, 0.3, 1.5),
    "dielectric_beckmann_anisotropic": dielectric("beckmann", 0.15, 0.5, 1.8),
    "window": (
        make_bsdf("thin_dielectric", ior=1.5, specular=BLUE, transmittance=RED),
        {"type": "thindielectric"} | ior_and_tints(1.5),
    ),
    "plastic": plastic("ggx", 0.0, False, 1.49),
    "plastic_nonlinear": plastic("ggx", 0.0, True, 1.9),
    "plastic_ggx": plastic("ggx", 0.1, False, 1.49),
    "plastic_ggx_nonlinear": plastic("ggx", 0.6, True, 1.3),
    "plastic_beckmann": plastic("beckmann", 0.3, False, 1.5),
    "plastic_beckmann_sharp": plastic("beckmann", 0.02, True, 1.5),
    "principled": principled(0.5),
    "principled_metal": principled(0.3, metallic=1.0, anisotropic=0.8),
    "principled_tints": principled(0.4, metallic=0.3, spec_tint=0.7, sheen=0.8, sheen_tint=0.5, flatness=0.6),
    "principled_clearcoat": principled(0.6, clearcoat=0.9, clearcoat_gloss=0.3, spec_tint=0.2),
    "principled_glass": principled(0.4, 1.4, spec_trans=1.0),
    "principled_everything": principled(
        0.45,
        1.3,
        spec_trans=0.6,
        metallic=0.2,
        anisotropic=0.5,
        spec_tint=0.4,
        sheen=0.5,
        sheen_tint=0.3,
        clearcoat=0.7,
        clearcoat_gloss=0.1,
        flatness=0.3,
    ),
    "principled_rough": principled(1.0, 1.8, spec_trans=0.3, clearcoat=1.0, clearcoat_gloss=0.0),
}

METALLIC_ROUGHNESS = {
    "gltf_dielectric": {"base_color": RED, "metallic": 0.0, "roughness": 0.5},
    "gltf_metal": {"base_color": RED, "metallic": 1.0, "roughness": 0.3},
    "gltf_mixed": {"base_color": BLUE, "metallic": 0.4, "roughness": 0.7, "ior": 1.8},
    "gltf_rough": {"base_color": BLUE, "metallic": 0.0, "roughness": 1.0},
    "gltf_specular": {
        "base_color": BLUE,
        "metallic": 0.1,
        "roughness": 0.4,
        "specular_factor": 0.6,
        "specular": (0.2, 1.0, 30.0),
    },
    "gltf_no_specular": {"base_color": BLUE, "metallic": 0.0, "roughness": 0.4, "specular_factor": 0.0},
    "gltf_window": {"base_color": BLUE, "metallic": 0.0, "roughness": 0.4, "transmission": 1.0},
    "gltf_frosted": {"base_color": RED, "metallic": 0.2, "roughness": 0.6, "transmission": 0.3, "ior": 1.3},
}


def gltf_bsdf(fields: dict) -> Bsdf:
    fields = dict(fields)
    return make_bsdf("metallic_roughness", fields.pop("roughness") ** 2, **fields)


EVERY = {name: pair[0] for name, pair in SHARED.items()} | {k: gltf_bsdf(v) for k, v in METALLIC_ROUGHNESS.items()}
TWO_SIDED = [n for n in EVERY if EVERY[n].kind in (2, 3) or EVERY[n].transmission > 0.0]
DELTA_ONLY = ["mirror", "glass", "bubble", "window"]
WITH_DENSITY = [name for name in EVERY if name not in DELTA_ONLY]


def mitsuba_bsdf(name: str):
    """Mitsuba's counterpart."""
    mi = pytest.importorskip("mitsuba")
    mi.set_variant("scalar_rgb")
    return mi, mi.load_dict(SHARED[name][1])


def probes(name: str, seed: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Direction pairs: uniform over the sphere, and the same number drawn from the material itself."""
    rng = np.random.default_rng(seed)
    wo = sphere(rng, n)
    s = draw(EVERY[name], wo, rng.random((n, 3)))
    drawn = (s["pdf"] > 0.0) & ~s["delta"]
    return np.concatenate([wo, wo[drawn]]), np.concatenate([sphere(rng, n), s["wi"][drawn]])


# Two float32 evaluations of a peak of relative width alpha differ by about 1e-7 / alpha² where the half vector is exact
# to one ulp; grazing directions divide by their cosine on top of that.
ORACLE_RTOL = 2e-3


@pytest.mark.parametrize("name", SHARED)
def test_bsdf_matches_mitsuba(name):
    """f times cosine and pdf are Mitsuba's for random, grazing and likely direction pairs on both sides."""
    mi, theirs = mitsuba_bsdf(name)
    wo, wi = probes(name, 1, 400)
    f, pdf = evaluate(EVERY[name], wo, wi)
    context = mi.BSDFContext()
    expected, expected_pdf = np.zeros((len(wo), 3)), np.zeros(len(wo))
    for i in range(len(wo)):
        si = mi.SurfaceInteraction3f()
        si.wi = wo[i].tolist()
        value, density = theirs.eval_pdf(context, si, wi[i].tolist())
        expected[i], expected_pdf[i] = np.array(value), density
    if EVERY[name].kind == MATERIAL_KINDS.index("principled"):
        # Mitsuba reports densities for directions its sampler never draws: from below, without transmission.
        expected_pdf[(wo[:, 2] < 0.0) & (EVERY[name].transmission == 0.0)] = 0.0
    value = f * np.abs(wi[:, 2:3])
    np.testing.assert_allclose(value, expected, rtol=ORACLE_RTOL, atol=1e-5)
    np.testing.assert_allclose(pdf, expected_pdf, rtol=ORACLE_RTOL, atol=1e-5)
    assert (np.abs(expected) > 1e-4).any() or name in DELTA_ONLY


@pytest.mark.parametrize("name", SHARED)
def test_bsdf_sample_matches_mitsuba(name):
    """The same random numbers give Mitsuba's direction, weight, density and relative index of refraction."""
    mi, theirs = mitsuba_bsdf(name)
    rng = np.random.default_rng(2)
    wo, u = sphere(rng, 400), rng.random((400, 3)).astype(np.float32)
    wo = wo[np.abs(wo[:, 2]) < 0.98]  # Mitsuba drops the azimuth, which orients the sample, close to the normal
    ours = draw(EVERY[name], wo, u)
    context = mi.BSDFContext()
    n_drawn = 0
    for i in range(len(wo)):
        si = mi.SurfaceInteraction3f()
        si.wi = wo[i].tolist()
        s, weight = theirs.sample(context, si, float(u[i, 0]), u[i, 1:].tolist())
        weight = np.array(weight)
        if not weight.any():
            np.testing.assert_array_equal(ours["weight"][i], 0.0)
            continue
        n_drawn += 1
        np.testing.assert_allclose(ours["wi"][i], np.array(s.wo), atol=2e-4)
        np.testing.assert_allclose(ours["weight"][i], weight, rtol=1e-2, atol=1e-5)
        np.testing.assert_allclose(ours["pdf"][i], s.pdf, rtol=1e-2)
        np.testing.assert_allclose(ours["eta"][i], s.eta, rtol=1e-5)
        assert ours["delta"][i] == mi.has_flag(s.sampled_type, mi.BSDFFlags.Delta)
    assert n_drawn > 100


@pytest.mark.parametrize("name", METALLIC_ROUGHNESS)
def test_bsdf_metallic_roughness_matches_twin(name):
    """f equals the NumPy transcription of the glTF specification."""
    wo, wi = probes(name, 3, 2000)
    f, _ = evaluate(EVERY[name], wo, wi)
    expected = metallic_roughness_f(wo.astype(float), wi.astype(float), **METALLIC_ROUGHNESS[name])
    np.testing.assert_allclose(f, expected, rtol=1e-3, atol=1e-5)
    assert expected.max() > 0.1


@pytest.mark.parametrize("name", EVERY)
def test_bsdf_sample_weight_is_f_cos_over_pdf(name):
    """Drawn weights and densities are those of bsdf_eval_pdf; delta lobes have no density there."""
    rng = np.random.default_rng(4)
    wo, u = sphere(rng, 5000), rng.random((5000, 3))
    s = draw(EVERY[name], wo, u)
    assert all(np.isfinite(s[key]).all() for key in s)
    assert (s["weight"] >= 0.0).all() and (s["pdf"] >= 0.0).all()
    drawn = s["pdf"] > 0.0
    assert (s["weight"][~drawn] == 0.0).all()
    np.testing.assert_allclose(np.linalg.norm(s["wi"][drawn], axis=1), 1.0, atol=1e-5)
    f, pdf = evaluate(EVERY[name], wo, s["wi"])
    if name in DELTA_ONLY:
        assert (s["delta"] == drawn).all() and (f == 0.0).all() and (pdf == 0.0).all()
        return
    smooth = drawn & ~s["delta"]
    assert smooth.sum() > 1000
    # Rebuilding the half vector from a refracted direction loses digits near grazing; the bulk has to be tight.
    cos = np.abs(s["wi"][smooth, 2:3])
    density_error = np.abs(pdf[smooth] / s["pdf"][smooth] - 1.0)
    weight_error = np.abs(f[smooth] * cos - s["weight"][smooth] * pdf[smooth, None])
    weight_error = (weight_error / (s["weight"][smooth] * pdf[smooth, None] + 1e-6)).max(axis=1)
    assert np.quantile(density_error, 0.99) < 5e-3 and np.quantile(weight_error, 0.99) < 2e-3


N_THETA, N_PHI = 20, 40


@functools.cache
def chi2_grid(n_sub: int) -> tuple[np.ndarray, np.ndarray]:
    """Midpoints of the n_sub × n_sub parts of every cell of a (theta, phi) table, and their solid angles."""
    theta = (np.arange(N_THETA * n_sub) + 0.5) * np.pi / (N_THETA * n_sub)
    phi = (np.arange(N_PHI * n_sub) + 0.5) * 2.0 * np.pi / (N_PHI * n_sub)
    t, p = np.meshgrid(theta.astype(np.float32), phi.astype(np.float32), indexing="ij")
    w = np.stack([np.sin(t) * np.cos(p), np.sin(t) * np.sin(p), np.cos(t)], axis=-1).reshape(-1, 3)
    edges = np.cos(np.linspace(0.0, np.pi, N_THETA * n_sub + 1))
    area = (edges[:-1] - edges[1:]) * 2.0 * np.pi / (N_PHI * n_sub)
    return w, np.broadcast_to(area[:, None], t.shape)


def parts_per_cell(name: str) -> int:
    """Quadrature resolution.

    The density of refracted directions ends in a steep edge (critical angle): 16² points per cell miss its integral by
    up to 20 %, 64² by less than the tests can see.
    """
    return 64 if name in TWO_SIDED and EVERY[name].kind != MATERIAL_KINDS.index("metallic_roughness") else 16


def pool(x: np.ndarray, rare: np.ndarray) -> np.ndarray:
    """Put the cells marked `rare` together at the end."""
    return np.append(x[~rare], x[rare].sum())


G1_ERROR = 0.0035  # of the rational fit to Beckmann's masking (Walter et al. 2007), which the density contains
CHI2_ANGLES = (0.2, 1.0, 1.45, np.pi - 0.9)
CHI2_CASES = [
    (name, theta) for name in WITH_DENSITY for theta in CHI2_ANGLES if theta < np.pi / 2.0 or name in TWO_SIDED
]


@pytest.mark.parametrize("name", [n for n in WITH_DENSITY if "sharp" not in n])
def test_bsdf_sample_follows_pdf(name):
    """Histograms of drawn directions pass a χ² test against the integrated density, misses and delta lobes included."""
    n = 200_000
    n_sub = parts_per_cell(name)
    rng = np.random.default_rng([5, WITH_DENSITY.index(name)])
    angles = [theta for case, theta in CHI2_CASES if case == name]
    for theta in angles:
        wo = np.broadcast_to(direction(theta), (n, 3))
        s = draw(EVERY[name], wo, rng.random((n, 3)))
        wi = s["wi"][(s["pdf"] > 0.0) & ~s["delta"]]
        i_theta = np.clip((np.arccos(np.clip(wi[:, 2], -1.0, 1.0)) / np.pi * N_THETA).astype(int), 0, N_THETA - 1)
        i_phi = np.clip((np.arctan2(wi[:, 1], wi[:, 0]) / (2.0 * np.pi) % 1.0 * N_PHI).astype(int), 0, N_PHI - 1)
        observed = np.bincount(i_theta * N_PHI + i_phi, minlength=N_THETA * N_PHI)
        grid, area = chi2_grid(n_sub)
        _, pdf = evaluate(EVERY[name], np.broadcast_to(direction(theta), grid.shape), grid)
        cells = (pdf.reshape(area.shape) * area).reshape(N_THETA, n_sub, N_PHI, n_sub).sum(axis=(1, 3)).ravel()
        assert cells.sum() < 1.0 + 5e-3
        # The rest (misses, delta lobes, directions below the surface) is one more cell.
        expected = np.append(cells, max(0.0, 1.0 - cells.sum())) * n
        observed = np.append(observed, n - observed.sum())
        slack = G1_ERROR * np.append(cells, 1.0) * n if EVERY[name].beckmann else np.zeros_like(expected)
        expected, observed, slack = (pool(x, expected < 5.0) for x in (expected, observed, slack))
        if expected[-1] < 1.0:
            assert observed[-1] <= 5 + slack[-1]
            expected, observed, slack = expected[:-1], observed[:-1], slack[:-1]
        excess = np.maximum(np.abs(observed - expected) - slack, 0.0)
        p_value = stats.chi2.sf((excess**2 / expected).sum(), len(expected) - 1)
        # Šidák: 1 % false alarms over all cases together.
        assert p_value > 1.0 - 0.99 ** (1.0 / len(CHI2_CASES)), f"theta {theta:.2f}: p = {p_value:.2e}"


QUADRATURE_RTOL = 0.01  # of the table's integral, beside four standard errors


@pytest.mark.parametrize("name", [n for n in WITH_DENSITY if "sharp" not in n])
def test_bsdf_sample_misses_no_lobe(name):
    """The mean weight is the integral of f times cosine, and no direction with f > 0 has zero density."""
    n = 100_000
    rng = np.random.default_rng([11, WITH_DENSITY.index(name)])
    for theta in (1.0, np.pi - 0.9):
        if theta > np.pi / 2.0 and name not in TWO_SIDED:
            continue
        s = draw(EVERY[name], np.broadcast_to(direction(theta), (n, 3)), rng.random((n, 3)))
        weight = np.where(s["delta"][:, None], 0.0, s["weight"])
        grid, area = chi2_grid(parts_per_cell(name))
        f, pdf = evaluate(EVERY[name], np.broadcast_to(direction(theta), grid.shape), grid)
        assert (pdf[(f > 0.0).any(axis=1)] > 0.0).all()
        expected = (f * (np.abs(grid[:, 2]) * area.ravel())[:, None]).sum(axis=0)
        error = np.abs(weight.mean(axis=0) - expected)
        assert (error <= 4.0 * weight.std(axis=0) / np.sqrt(n) + QUADRATURE_RTOL * expected).all()


WHITE = (1.0, 1.0, 1.0)
FURNACE = {
    "diffuse": make_bsdf("diffuse", base_color=WHITE),
    "mirror": make_bsdf("conductor"),
    "conductor_ggx": make_bsdf("conductor", (0.1, 0.7)),
    "conductor_beckmann": make_bsdf("conductor", 0.4, beckmann=1),
    "glass": make_bsdf("dielectric"),
    "dielectric_ggx": make_bsdf("dielectric", 0.5),
    "dielectric_beckmann": make_bsdf("dielectric", 0.3, beckmann=1),
    "window": make_bsdf("thin_dielectric"),
    "plastic": make_bsdf("plastic", base_color=WHITE),
    "plastic_ggx": make_bsdf("plastic", 0.3, base_color=WHITE),
    "plastic_beckmann": make_bsdf("plastic", 0.3, base_color=WHITE, beckmann=1, nonlinear=1),
    "gltf_metal": make_bsdf("metallic_roughness", 0.3, base_color=WHITE, metallic=1.0),
    "gltf_window": make_bsdf("metallic_roughness", 0.1, base_color=WHITE, transmission=1.0),
    "principled_metal": make_bsdf("principled", 0.2, base_color=WHITE, metallic=1.0, anisotropic=0.5),
    "principled_glass": make_bsdf("principled", 0.3, base_color=WHITE, transmission=1.0),
}
LOSSLESS = ("diffuse", "mirror", "glass", "window")


@pytest.mark.parametrize("name", FURNACE)
def test_bsdf_furnace_gains_no_energy(name):
    """White materials return at most the light that arrives, lossless ones all of it, at every angle."""
    n = 50_000
    rng = np.random.default_rng(6)
    for theta in (0.0, 0.8, 1.3, 1.5, np.pi - 0.5, np.pi - 1.3):
        if theta > np.pi / 2.0 and not (FURNACE[name].kind in (2, 3) or FURNACE[name].transmission > 0.0):
            continue
        s = draw(FURNACE[name], np.broadcast_to(direction(theta), (n, 3)), rng.random((n, 3)))
        # Undo the radiance scaling of refraction to count power.
        power = s["weight"].mean(axis=1) * s["eta"] ** 2
        if name == "window" or "gltf" in name:
            np.testing.assert_array_equal(s["eta"], 1.0)
        bound = 4.0 * power.std() / np.sqrt(n) + 1e-5
        assert power.mean() <= 1.0 + bound
        if name in LOSSLESS:
            assert power.mean() >= 1.0 - bound


@pytest.mark.parametrize("name", WITH_DENSITY)
def test_bsdf_is_reciprocal(name):
    """f(wo, wi) / eta_o² is symmetric: refraction scales radiance, everything else is plainly reciprocal."""
    wo, wi = probes(name, 7, 1000)
    # The half vector's rounding, magnified by sharp lobes at grazing angles, is not what this tests.
    keep = (np.abs(wo[:, 2]) > 0.02) & (np.abs(wi[:, 2]) > 0.02)
    wo, wi = wo[keep], wi[keep]
    forward, backward = evaluate(EVERY[name], wo, wi)[0], evaluate(EVERY[name], wi, wo)[0]
    if EVERY[name].kind in (2, 6):
        forward /= np.where(wo[:, 2:3] > 0.0, 1.0, EVERY[name].ior ** 2)
        backward /= np.where(wi[:, 2:3] > 0.0, 1.0, EVERY[name].ior ** 2)
    if EVERY[name].kind == MATERIAL_KINDS.index("principled"):
        # Reflection from below is scaled by the transmission weight; tint and metal exist on the front alone.
        both = (wo[:, 2] > 0.0) | (wi[:, 2] > 0.0)
        forward, backward = forward[both], backward[both]
    np.testing.assert_allclose(forward, backward, rtol=5e-3, atol=1e-5)
    assert forward.max() > 1e-3


@pytest.mark.parametrize("name", [n for n in EVERY if n not in TWO_SIDED])
def test_bsdf_reflecting_kinds_are_black_below(name):
    """Neither evaluation nor sampling returns anything for wo or wi below the surface."""
    rng = np.random.default_rng(8)
    wo, wi = sphere(rng, 500), sphere(rng, 500)
    below = (wo[:, 2] <= 0.0) | (wi[:, 2] <= 0.0)
    f, pdf = evaluate(EVERY[name], wo[below], wi[below])
    assert (f == 0.0).all() and (pdf == 0.0).all()
    wo[:, 2] = -np.abs(wo[:, 2])
    s = draw(EVERY[name], wo, rng.random((500, 3)))
    assert (s["weight"] == 0.0).all() and (s["pdf"] == 0.0).all()
    wo[:, 2] = np.abs(wo[:, 2])
    s = draw(EVERY[name], wo, rng.random((500, 3)))
    assert (s["wi"][s["pdf"] > 0.0, 2] > 0.0).all()


EXTREME_ALPHAS = (0.0, 5e-5, 1e-4, 1e-3, 1.0)


@pytest.mark.parametrize("kind", MATERIAL_KINDS)
@pytest.mark.parametrize("beckmann", [0, 1])
def test_bsdf_stays_finite_at_the_extremes(kind, beckmann):
    """Grazing and normal directions, corner random numbers and extreme roughness give finite, non-negative results."""
    cosines = np.array([1.0, 1.0 - 1e-7, 0.5, 1e-3, 1e-6, 1e-12, 0.0, -1e-12, -1e-6, -0.5, -1.0], np.float32)
    corner = np.array([0.0, 1e-7, 0.5, 1.0 - 2.0**-24])
    u = np.stack(np.meshgrid(corner, corner, corner), axis=-1).reshape(-1, 3)
    cos, u = np.repeat(cosines, len(u)), np.tile(u, (len(cosines), 1))
    wo = np.stack([np.sqrt(1.0 - cos.astype(float) ** 2), np.zeros_like(cos), cos], axis=1)
    for alpha in EXTREME_ALPHAS:
        for extra in (
            {},
            {"transmission": 0.5, "metallic": 0.5, "clearcoat": 1.0, "sheen": 1.0, "base_color": (0.0,) * 3},
        ):
            b = make_bsdf(kind, alpha, beckmann=beckmann, **extra)
            s = draw(b, wo, u)
            assert all(np.isfinite(s[key]).all() for key in s)
            assert (s["weight"] >= 0.0).all() and (s["pdf"] >= 0.0).all()
            for wi in (s["wi"], np.roll(wo, 7, axis=0), -wo, wo):
                f, pdf = evaluate(b, wo, wi)
                assert np.isfinite(f).all() and np.isfinite(pdf).all()
                assert (f >= 0.0).all() and (pdf >= 0.0).all()


@pytest.mark.parametrize("kind", ["conductor", "dielectric"])
def test_bsdf_becomes_smooth_as_alpha_vanishes(kind):
    """Below the threshold the mean weight of the rough lobes continues into the delta lobe's."""
    rng = np.random.default_rng(9)
    wo, u = np.broadcast_to(direction(0.6), (20_000, 3)), rng.random((20_000, 3))
    rough = draw(make_bsdf(kind, 2e-4, eta=GOLD_ETA, k=GOLD_K), wo, u)
    smooth = draw(make_bsdf(kind, 5e-5, eta=GOLD_ETA, k=GOLD_K), wo, u)
    assert smooth["delta"].all() and not rough["delta"].any()
    np.testing.assert_allclose(rough["weight"].mean(axis=0), smooth["weight"].mean(axis=0), rtol=2e-3)
    # A few normals lie in the long tail of the distribution, and a few u fall between the two reflectances.
    assert np.quantile(np.abs(rough["wi"] - smooth["wi"]), 0.999) < 0.01


def test_bsdf_albedo_is_positive_where_f_is():
    """No channel scatters without an albedo, however black the material's other parameters are."""
    rng = np.random.default_rng(10)
    colors = [(0.0, 0.0, 0.0), (0.0, 0.5, 1.0), (1.0, 0.0, 0.2)]
    seen = 0
    for kind in MATERIAL_KINDS:
        for trial in range(24):
            fields = {name: float(rng.choice([0.0, 0.3, 1.0])) for name in ("metallic", "transmission", "spec_tint")}
            fields |= {name: float(rng.choice([0.0, 0.8])) for name in ("specular_factor", "sheen", "clearcoat")}
            fields |= {name: colors[rng.integers(3)] for name in ("base_color", "specular", "transmittance")}
            alpha = 0.0 if trial % 4 == 0 else 0.3
            b = make_bsdf(kind, alpha, eta=GOLD_ETA, k=GOLD_K, sheen_tint=0.5, **fields)
            wo, wi = sphere(rng, 200), sphere(rng, 200)
            f, _ = evaluate(b, wo, wi)
            diffuse, specular, roughness, smooth = summarize([b] * 200, wo)
            albedo = diffuse + specular
            assert (albedo >= 0.0).all() and (albedo < 3.0).all() and ((roughness >= 0.0) & (roughness <= 1.0)).all()
            assert (albedo[f > 0.0] > 1e-4).all()
            assert smooth.all() or (f == 0.0).all()
            seen += int((f > 0.0).sum())
    assert seen > 10_000


def test_bsdf_summary_known_values():
    """Albedo, roughness and smooth-lobe flag of materials where they are plain."""
    wo = np.tile(direction(0.3), (6, 1))
    bsdfs = [
        EVERY["diffuse"],
        make_bsdf("conductor"),  # eta 0, k 1: reflects everything
        make_bsdf("conductor", 0.25),
        make_bsdf("dielectric"),
        make_bsdf("dielectric", 0.04),
        make_bsdf("thin_dielectric"),
    ]
    diffuse, specular, roughness, smooth = summarize(bsdfs, wo)
    np.testing.assert_allclose(diffuse[0], RED, rtol=1e-6)
    np.testing.assert_array_equal(diffuse[1:], 0.0)
    np.testing.assert_array_equal(specular[0], 0.0)
    np.testing.assert_allclose(specular[1:], 1.0, rtol=1e-5)
    np.testing.assert_allclose(roughness, [1.0, 0.0, 0.5, 0.0, 0.2, 0.0], rtol=1e-6)
    np.testing.assert_array_equal(smooth, [1, 0, 1, 0, 1, 0])
