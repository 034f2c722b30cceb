"""Panels of a scene: the cache, and lights, materials and display."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import warp as wp
from imgui_bundle import imgui

from nrc.cache import CacheConfig
from nrc.display import Operator
from nrc.pathtracer import Integrator
from nrc.scene import MATERIAL_KINDS, Material
from nrc.viewer.scene_session import Compare, SceneSession
from nrc.viewer.widgets import button, checkbox, choice, color, explain, section, slider, slider_int, text_input

if TYPE_CHECKING:
    from nrc.viewer.app import Viewer

ROUGH = ("conductor", "dielectric", "plastic", "metallic_roughness", "principled")
METALLIC = ("metallic_roughness", "principled")
REFRACTIVE = ("dielectric", "thin_dielectric", "plastic", "metallic_roughness", "principled")
CACHE_FIGURES = ("records", "rounds", "dropped_records", "invalid_queries", "skipped_steps", "radiance_scale")


def draw_cache_panel(viewer: Viewer, session: SceneSession) -> None:
    """What the picture shows and how the cache learns."""
    if not section("radiance cache"):
        return
    settings = viewer.settings
    changes: dict[str, Any] = {
        "integrator": choice("integrator", settings.integrator, get_args(Integrator)),
    }
    view = choice("view", settings.shown_view, settings.views)
    if view != settings.shown_view:
        changes["view"] = view
    if settings.integrator != "path":
        if checkbox("split: path | cache", settings.split is not None) != (settings.split is not None):
            changes["split"] = 0.5 if settings.split is None else None
        changes["train"] = checkbox("train", settings.train)
        imgui.same_line()
        if imgui.button("empty the cache"):
            viewer.reset_cache()
        changes["threshold"] = slider("spread threshold", settings.threshold, 0.0, 1.0, "%.4f", logarithmic=True)
        explain("paths end in the cache where their area spread exceeds this share of the first footprint (c, Eq. 4)")
        changes["min_spread"] = slider("least spread", settings.min_spread, 0.0, 0.2, "%.3f")
        explain("and where they are this wide, as a fraction of the scene's size: keeps contact shadows in close-ups")
        changes["cache"] = _cache_config(viewer.settings.cache, session.device)
    changes["max_depth"] = slider_int("longest path", settings.max_depth, 1, 65)
    changes["compare"] = choice("compare with", settings.compare, get_args(Compare))
    if settings.compare == "file":
        file = text_input("reference", "reference.exr")
        imgui.same_line()
        if imgui.button("load##reference") and file:
            viewer.load_reference(Path(file))
    if changes["integrator"] == "path":
        changes["split"] = None
    viewer.change(**changes)
    figures = [(name, viewer.stats[name]) for name in CACHE_FIGURES if name in viewer.stats]
    for name, value in figures:
        imgui.text_disabled(f"{name.replace('_', ' ')}: {value:.4g}")


def _cache_config(config: CacheConfig, device: wp.Device) -> CacheConfig:
    """The cache's configuration as the panel has it. Another encoding starts it empty."""
    batch_size = config.batch_size_on(device)
    encoding = choice("encoding", config.encoding, ("hash", "frequency"))
    rate = slider("learning rate", config.learning_rate, 1e-5, 1e-1, "%.5f", logarithmic=True)
    n_batches = slider_int("steps per frame", config.n_batches, 1, 16)
    sizes = sorted({batch_size, *(1 << exponent for exponent in range(8, 17))})
    chosen = int(choice("records per step", str(batch_size), [str(size) for size in sizes]))
    explain("training records of an optimizer step; a frame takes as many of them as it has steps")
    records = config.batch_size if chosen == batch_size else chosen
    return replace(config, encoding=encoding, learning_rate=rate, n_batches=n_batches, batch_size=records)


def draw_animation_panel(viewer: Viewer) -> None:
    """Play, pause and scrub."""
    timeline = viewer.timeline
    if timeline.duration <= 0.0 or not section("animation"):
        return
    if imgui.button("pause" if timeline.is_playing else "play"):
        timeline.toggle()
    imgui.same_line()
    timeline.loops = checkbox("loop", timeline.loops)
    if timeline.has_camera:
        imgui.same_line()
        follows = checkbox("the scene's camera", timeline.follows_camera)
        if timeline.follows_camera and not follows:
            viewer.take_control()
        timeline.follows_camera = follows
    at = slider("second", timeline.time, 0.0, timeline.duration, f"%.2f of {timeline.duration:.2f} s")
    if at != timeline.time:
        timeline.seek(at)
    timeline.speed = slider("speed", timeline.speed, 0.05, 4.0, "%.2f", logarithmic=True)


def draw_scene_panel(viewer: Viewer, session: SceneSession) -> None:
    """Display, lights, and the material of the picked object."""
    settings = viewer.settings
    changes: dict[str, Any] = {}
    if section("display"):
        operator = choice("tone mapping", settings.tone.operator, get_args(Operator))
        exposure = slider("exposure", settings.tone.exposure, -8.0, 8.0, "%+.2f stops")
        changes["reproject"] = checkbox("reuse frames in motion", settings.reproject)
        explain("averages a moving picture with the frames before, along its motion, while few samples are there")
        changes["tone"] = replace(settings.tone, operator=operator, exposure=exposure)
    if section("lights", opened=False):
        if session.has_environment:
            turn = slider("environment turn", settings.environment_turn, -180.0, 180.0, "%.0f deg")
            gain = slider("environment", settings.environment_gain, 0.0, 100.0, logarithmic=True)
            changes |= {"environment_turn": turn, "environment_gain": gain}
        changes["light_gains"] = tuple(
            slider(f"{name}##{i}", gain, 0.0, 100.0, logarithmic=True)
            for i, (name, gain) in enumerate(zip(session.light_names, settings.light_gains, strict=True))
        )
    if viewer.was_picked:
        imgui.set_next_item_open(True)
        viewer.was_picked = False
    if section("picked object", opened=False):
        changes |= _draw_material(viewer)
    viewer.change(**changes)


def _draw_material(viewer: Viewer) -> dict[str, Any]:
    picked = viewer.picked
    if picked is None:
        imgui.text_disabled("click on an object")
        return {}
    mesh, overrides = picked["mesh"], dict(viewer.settings.materials)
    material: Material = overrides.get(mesh, picked["material"])  # the file's own, where nothing overrides it
    imgui.text(f"{picked['name']}: {material.name or material.kind}")
    edited = edit_material(material)
    if edited is not material:
        overrides[mesh] = edited
    if button("as in the file", enabled=mesh in overrides):
        del overrides[mesh]
    materials = tuple(sorted(overrides.items(), key=lambda item: item[0]))
    return {"materials": materials} if materials != viewer.settings.materials else {}


def edit_material(material: Material) -> Material:
    """Widgets for a material; the same object where nothing was changed."""
    kind = choice("kind", material.kind, MATERIAL_KINDS)
    fields: dict[str, Any] = {"kind": kind}
    base = "specular" if kind in ("conductor", "dielectric", "thin_dielectric") else "base_color"
    fields[base] = color(base.replace("_color", " colour"), getattr(material, base))
    if kind in ROUGH:
        roughness = slider("roughness", material.roughness[0], 0.0, 1.0)
        fields["roughness"] = material.roughness if roughness == material.roughness[0] else (roughness, roughness)
    if kind in METALLIC:
        fields["metallic"] = slider("metallic", material.metallic, 0.0, 1.0)
        fields["transmission"] = slider("transmission", material.transmission, 0.0, 1.0)
    if kind in REFRACTIVE:
        fields["ior"] = slider("index of refraction", material.ior, 1.0, 2.5)
    strength = max(material.emission)
    hue = tuple(c / strength for c in material.emission) if strength > 0.0 else (1.0, 1.0, 1.0)
    new_hue, new_strength = color("emission colour", hue), slider("emission", strength, 0.0, 100.0, logarithmic=True)
    if (new_hue, new_strength) != (hue, strength):
        fields["emission"] = tuple(new_strength * c for c in new_hue)
    return (
        material if all(getattr(material, k) == value for k, value in fields.items()) else replace(material, **fields)
    )
