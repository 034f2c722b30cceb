"""`DeviceScene.replaced`: what did not change is shared, and nothing else tells it from a fresh upload."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from small_scenes import GREY, config, floor, moved, shape

from nrc.assets import shapes
from nrc.device_scene import DeviceScene
from nrc.renderer import Renderer
from nrc.scene import Camera, Environment, Material, Mesh, PointLight, Scene, SpotLight, Texture

RNG = np.random.default_rng(3)
SKY = Environment(RNG.random((8, 16, 3)).astype(np.float32))
WOOD = Texture(RNG.integers(0, 256, (8, 8, 3), np.uint8), srgb=True)
GLOW = Texture(RNG.random((4, 4, 3)).astype(np.float32), srgb=True)
TURN = np.array([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0], [-1.0, 0.0, 0.0]])
NOTHING = Mesh(np.zeros((0, 3), np.float32), np.zeros((0, 3), np.int32), 0, name="empty")


def scene() -> Scene:
    """A textured floor, an empty mesh, a ball and a glowing one, a point light and a sky."""
    ball = shapes.sphere(8, 16)
    return Scene(
        (
            floor(0, 2.0),
            NOTHING,
            shape(ball, 1, moved((-0.8, 0.5, 0.0), 0.5)),
            shape(ball, 2, moved((0.8, 0.5, 0), 0.4)),
        ),
        (
            replace(GREY, base_color_texture=WOOD),
            Material(kind="plastic", roughness=(0.4, 0.4)),
            replace(GREY, emission=(2.0, 1.0, 0.5), emission_texture=GLOW),
        ),
        Camera.look_at((0.0, 2.0, 4.0), (0.0, 0.3, 0.0)),
        lights=(PointLight((1.0, 3.0, 1.0), (4.0, 4.0, 4.0)),),
        environment=SKY,
    )


def with_material(i: int, **changes) -> Callable[[Scene], Scene]:
    def change(before: Scene) -> Scene:
        materials = list(before.materials)
        materials[i] = replace(materials[i], **changes)
        return replace(before, materials=tuple(materials))

    return change


def with_new_material(before: Scene) -> Scene:
    red = Material(base_color=(0.9, 0.1, 0.1))
    mesh = replace(before.meshes[2], material=3)
    return replace(before, materials=(*before.materials, red), meshes=(*before.meshes[:2], mesh, before.meshes[3]))


CHANGES: dict[str, Callable[[Scene], Scene]] = {
    "nothing": lambda before: before,
    "colour": with_material(1, base_color=(0.1, 0.6, 0.2)),
    "kind": with_material(1, kind="metallic_roughness", metallic=1.0),
    "plastic roughness": with_material(1, roughness=(0.2, 0.2)),
    "texture moved": with_material(0, roughness_texture=WOOD),
    "texture gone": with_material(0, base_color_texture=None),
    "emission on": with_material(1, emission=(0.0, 1.0, 0.0)),
    "emission off": with_material(2, emission=(0.0, 0.0, 0.0)),
    "alpha": with_material(1, alpha_mode="blend", opacity=0.5),
    "material added": with_new_material,
    "mesh gone": lambda before: replace(before, meshes=before.meshes[1:]),
    "normals gone": lambda before: replace(
        before, meshes=(*before.meshes[:2], replace(before.meshes[2], normals=None), before.meshes[3])
    ),
    "light intensity": lambda before: replace(before, lights=(replace(before.lights[0], intensity=(0.5, 9.0, 0.5)),)),
    "light added": lambda before: replace(
        before, lights=(*before.lights, SpotLight((0, 3, 0), (0, -1, 0), (5, 5, 5), 0.2, 0.4))
    ),
    "lights gone": lambda before: replace(before, lights=()),
    "sky turned": lambda before: replace(before, environment=replace(SKY, to_world=TURN)),
    "sky scaled": lambda before: replace(before, environment=replace(SKY, scale=3.0)),
    "sky replaced": lambda before: replace(before, environment=Environment.constant((0.2, 0.3, 0.9))),
    "sky gone": lambda before: replace(before, environment=None),
    "sky dark": lambda before: replace(before, environment=replace(SKY, scale=0.0)),
}
GEOMETRY = ("positions", "indices", "normals", "uv0", "uv1", "colors", "tangents")
MAP = ("environment", "environment_rows", "environment_columns")


def picture(uploaded: DeviceScene) -> np.ndarray:
    """Two frames, bit for bit what the uploaded scene decides."""
    renderer = Renderer(uploaded, 24, 16, config(max_depth=5))
    renderer.frame()
    renderer.frame()
    return renderer.image()


@pytest.mark.parametrize("name", CHANGES)
def test_replaced_scene_renders_as_a_fresh_one(name):
    """Same bits whatever changed, and back again."""
    before, after = scene(), CHANGES[name](scene())
    first = DeviceScene(before, "cpu")
    replaced = first.replaced(after)
    fresh = picture(DeviceScene(after, "cpu"))
    assert fresh.max() > 0.0
    assert picture(replaced).tobytes() == fresh.tobytes()
    assert picture(replaced.replaced(before)).tobytes() == picture(first).tobytes()
    assert replaced.scene is after and first.scene is before


@pytest.mark.parametrize("name", [name for name in CHANGES if name not in ("mesh gone", "normals gone")])
def test_geometry_is_shared(name):
    """Hierarchy and vertex arrays are the same objects where no mesh's arrays changed."""
    before = scene()
    first = DeviceScene(before, "cpu")
    after = first.replaced(CHANGES[name](before))
    assert after.bvh is first.bvh
    assert all(getattr(after.view, array).ptr == getattr(first.view, array).ptr for array in GEOMETRY)
    shares_sky = name not in ("sky replaced", "sky gone")
    assert all((getattr(after.view, array).ptr == getattr(first.view, array).ptr) == shares_sky for array in MAP)
    if "texture" not in name:
        assert after.view.texels.ptr == first.view.texels.ptr


def test_one_attribute_alone_is_made_anew():
    """A mesh without its normals shares everything but the normals."""
    before = scene()
    first = DeviceScene(before, "cpu")
    after = first.replaced(CHANGES["normals gone"](before))
    shared = [array for array in GEOMETRY if getattr(after.view, array).ptr == getattr(first.view, array).ptr]
    assert after.bvh is first.bvh and shared == [array for array in GEOMETRY if array != "normals"]


def test_unused_parts_are_let_go():
    """A scene keeps nothing of the ones before it that it does not use."""
    first = DeviceScene(scene(), "cpu")
    after = first.replaced(CHANGES["sky replaced"](first.scene))
    assert all(source is not SKY.image for sources, _ in after._parts.values() for source in sources)
    assert not after._earlier


def test_equal_plastics_share_one_table():
    """Every address that a material holds is that of a table which the scene keeps alive."""
    base = scene()
    coat = replace(base.materials[1], name="another")
    uploaded = DeviceScene(replace(base, materials=(*base.materials, coat)), "cpu")
    addresses = uploaded.view.materials.numpy()["bsdf"]["plastic_table"]
    kept = [part.ptr for name, (_, part) in uploaded._parts.items() if name.startswith("plastic")]
    assert addresses[1] == addresses[-1] != 0
    assert set(addresses[addresses != 0].tolist()) == set(kept)
