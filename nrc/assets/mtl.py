"""Wavefront MTL materials, with the Pr and Pm extension, mapped to physical ones.

- illum 4, 6, 7, 9 (or Tf and Ni without Kd and illum): smooth dielectric of index Ni; Tf filters the light that passes
  through the whole object, so each of its two interfaces gets sqrt(Tf).
- illum 3, 5, 8: mirror of reflectance Ks if Kd is (nearly) black, else a smooth plastic.
- Pr or Pm: metallic-roughness.
- Ks > 0 under illum 2 or none: plastic on Kd, or a rough metal if Kd is black; the Phong exponent Ns becomes a GGX
  width alpha = sqrt(2 / (Ns + 2)) (Walter et al. 2007, section 5.2, where it matches Beckmann to Phong).
- Otherwise diffuse. Ke emits on the front side.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np

from nrc.assets.model import Model
from nrc.assets.pictures import read_texels
from nrc.scene import Material, SceneError, Texture, Vec3

BLACK = 0.02
MAP_OPTIONS = {"-blendu": 1, "-blendv": 1, "-cc": 1, "-mm": 2, "-texres": 1, "-imfchan": 1, "-type": 1, "-boost": 1}
KNOWN = (
    *("ka", "kd", "ks", "ke", "ns", "ni", "d", "tr", "tf", "illum", "pr", "pm", "sharpness"),
    *("map_kd", "map_ke", "map_d", "map_pr", "map_bump", "bump", "norm"),
)


def read_mtl(path: Path, model: Model) -> dict[str, Material]:
    """Materials of an MTL file by name; notes in `model.warnings` what is approximated or left out."""
    entries: dict[str, dict[str, list[str]]] = {}
    current: dict[str, list[str]] | None = None
    for line in path.read_text("utf-8", "replace").replace("\\\n", " ").splitlines():
        words = line.split("#")[0].split()
        if not words:
            continue
        key = words[0].lower()
        if key == "newmtl":
            current = entries.setdefault(" ".join(words[1:]), {})
        elif current is not None:
            current[key] = words[1:]
        else:
            raise SceneError(f"{path.name}: {words[0]} comes before the first newmtl")
    return {name: _Entry(name, entry, path, model).material() for name, entry in entries.items()}


class _Entry:
    """One material's statements."""

    def __init__(self, name: str, statements: dict[str, list[str]], path: Path, model: Model) -> None:
        self.name, self.statements, self.path, self.model = name, statements, path, model

    def material(self) -> Material:
        unknown = [key for key in self.statements if key not in KNOWN]
        if unknown:
            self.model.warn(f"{self.path.name}: statements not understood and ignored: {', '.join(sorted(unknown))}")
        kd_map, ke_map = self._map("map_kd", srgb=True), self._map("map_ke", srgb=True)
        kd = self._color("kd")
        ks = self._color("ks") or (0.0, 0.0, 0.0)
        ke = self._color("ke")
        if kd is None:
            bare = not {"ks", "ke", "tf", "pr", "pm"} & self.statements.keys()
            kd = (1.0, 1.0, 1.0) if kd_map else (0.6, 0.6, 0.6) if bare else (0.0, 0.0, 0.0)
        if kd_map and max(kd) == 0.0:
            kd = (1.0, 1.0, 1.0)  # exporters write a black factor under a texture
        material = Material(
            name=self.name,
            base_color=kd,
            base_color_texture=kd_map,
            emission=ke or ((1.0, 1.0, 1.0) if ke_map else (0.0, 0.0, 0.0)),
            emission_texture=ke_map,
            two_sided=True,
        )
        material = self._surface(material, kd, ks)
        return self._relief(self._opacity(material))

    def _surface(self, material: Material, kd: Vec3, ks: Vec3) -> Material:
        """Kind of scattering, from illum and the Phong and PBR statements."""
        illum = self._number("illum")
        ior = self._number("ni") or 0.0
        ior = ior if ior > 1.0 else 1.5
        glass_by_filter = illum is None and {"tf", "ni"} <= self.statements.keys() and "kd" not in self.statements
        if illum in (4, 6, 7, 9) or glass_by_filter:
            r, g, b = (math.sqrt(min(value, 1.0)) for value in self._color("tf") or (1.0, 1.0, 1.0))
            return replace(material, kind="dielectric", ior=ior, transmittance=(r, g, b))
        if "pr" in self.statements or "pm" in self.statements or "map_pr" in self.statements:
            roughness = self._number("pr")
            roughness = 1.0 if roughness is None else roughness
            return replace(
                material,
                kind="metallic_roughness",
                metallic=min(self._number("pm") or 0.0, 1.0),
                roughness=(roughness, roughness),
                roughness_texture=self._map("map_pr", srgb=False),
                ior=ior,
            )
        if max(ks) <= 0.0 or illum in (0, 1):
            return material
        ks = (min(ks[0], 1.0), min(ks[1], 1.0), min(ks[2], 1.0))
        black = max(kd) <= BLACK and material.base_color_texture is None
        if illum in (3, 5, 8):
            roughness = 0.0
        else:
            exponent = self._number("ns")
            roughness = (2.0 / ((exponent if exponent is not None else 10.0) + 2.0)) ** 0.25
            form = "rough conductors" if black else "plastics"
            self.model.warn(f"{self.path.name}: Phong highlights (Ks, Ns) are approximated by GGX {form}")
        kind, width = ("conductor", (roughness, roughness)) if black else ("plastic", (roughness, roughness))
        return replace(material, kind=kind, specular=ks, roughness=width, ior=ior)  # type: ignore[arg-type]

    def _opacity(self, material: Material) -> Material:
        if material.kind == "dielectric":
            return material
        dissolve, transparency = self._number("d"), self._number("tr")
        opacity = dissolve if dissolve is not None else 1.0 - (transparency or 0.0)
        texture = self._map("map_d", srgb=False)
        if texture is not None and texture.image.shape[2] in (2, 4):
            image = texture.image  # a cutout kept in the alpha of a colour image, or in the colours if alpha is solid
            solid = bool((image[:, :, -1] == image[:, :, -1].flat[0]).all())
            texture = replace(texture, image=np.ascontiguousarray(image[:, :, :1] if solid else image[:, :, -1:]))
        if opacity >= 1.0 and texture is None:
            return material
        return replace(material, opacity=max(opacity, 0.0), opacity_texture=texture, alpha_mode="blend")

    def _relief(self, material: Material) -> Material:
        """Normal map (`norm`, or a bump map that looks like one) or bump map."""
        if "norm" in self.statements:
            return replace(material, normal_texture=self._map("norm", srgb=False), normal_scale=self._bm("norm"))
        key = "map_bump" if "map_bump" in self.statements else "bump"
        texture = self._map(key, srgb=False)
        if texture is None:
            return material
        means = texture.image[:, :, :3].reshape(-1, min(texture.image.shape[2], 3)).mean(axis=0)
        if len(means) == 3 and means[2] > 1.25 * max(means[0], means[1]):
            self.model.warn(f"{self.path.name}: {key} {texture.name!r} looks like a normal map and is used as one")
            return replace(material, normal_texture=texture, normal_scale=self._bm(key))
        return replace(material, bump_texture=texture, bump_scale=self._bm(key))

    def _number(self, key: str) -> float | None:
        words = [word for word in self.statements.get(key, ()) if not word.startswith("-h")]
        return self._floats(key, words[:1])[0] if words else None

    def _color(self, key: str) -> Vec3 | None:
        words = self.statements.get(key)
        if not words:
            return None
        if words[0] in ("spectral", "xyz"):
            self.model.warn(f"{self.path.name}: {key} {words[0]} is not supported and ignored")
            return None
        values = [max(value, 0.0) for value in self._floats(key, words[:3])]
        values += [values[0]] * (3 - len(values))
        return values[0], values[1], values[2]

    def _floats(self, key: str, words: list[str]) -> list[float]:
        try:
            values = [float(word) for word in words]
        except ValueError:
            values = [math.nan]
        if not all(math.isfinite(value) for value in values):
            raise SceneError(f"{self.path.name}: material {self.name!r}: {key}: not a number: {' '.join(words)}")
        return values

    def _bm(self, key: str) -> float:
        words = self.statements[key]
        place = words.index("-bm") if "-bm" in words[:-1] else None
        return self._floats(key, words[place + 1 : place + 2])[0] if place is not None else 1.0

    def _map(self, key: str, *, srgb: bool) -> Texture | None:
        """Texture of a map statement; None with a warning if its file is missing."""
        words = list(self.statements.get(key, ()))
        scale, offset, clamp = [1.0, 1.0], [0.0, 0.0], False
        while words and words[0].startswith("-"):
            option = words.pop(0)
            if option in ("-s", "-o", "-t"):
                values: list[float] = []
                while words and len(values) < 3 and _is_number(words[0]):
                    values.append(float(words.pop(0)))
                if option == "-s":
                    scale[: len(values[:2])] = values[:2]
                elif option == "-o":
                    offset[: len(values[:2])] = values[:2]
            elif option in ("-clamp", "-bm"):
                clamp = clamp or (option == "-clamp" and words[:1] == ["on"])
                del words[:1]
            elif option in MAP_OPTIONS:
                del words[: MAP_OPTIONS[option]]
            else:
                self.model.warn(f"{self.path.name}: {key}: option {option} is not understood")
        name = " ".join(words).replace("\\", "/")
        if not name:
            return None
        file = self.path.parent / name
        if not file.is_file():
            self.model.warn(f"{self.path.name}: {key}: image file {name!r} does not exist: no texture there")
            return None
        # MTL measures v from the bottom: v_file = 1 - v here, on both sides of its scale and offset.
        transform = np.array([[scale[0], 0.0, offset[0]], [0.0, scale[1], 1.0 - scale[1] - offset[1]]])
        wrap = "clamp" if clamp else "repeat"
        texels = read_texels(file, f"{self.path.name}: material {self.name!r}: {key}")
        srgb = srgb and texels.dtype == np.uint8
        return Texture(texels, srgb=srgb, transform=transform, wrap_u=wrap, wrap_v=wrap, name=name)  # type: ignore[arg-type]


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True
