"""A Mitsuba scene file as a tree of nodes that remember which of their properties were understood."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from nrc.scene import SceneError, Vec3

CHECKED = ("BSDF", "Shape", "Emitter", "Sensor", "Integrator", "Film")


def import_mitsuba(path: Path | str) -> Any:
    """The `mitsuba` package.

    Raises:
        SceneError: If it is not installed.
    """
    try:
        import mitsuba
    except ImportError:
        raise SceneError(f"{path}: Mitsuba scenes need the mitsuba package: pip install mitsuba") from None
    return mitsuba


@contextmanager
def mitsuba_session(mi: Any, folder: Path) -> Iterator[None]:
    """Run the body in `scalar_rgb` with file names relative to `folder`, then put variant and file resolver back.

    Where no variant was active, `scalar_rgb` stays: Mitsuba has no way back to none.
    """
    variant = mi.variant()
    if variant != "scalar_rgb":
        mi.set_variant("scalar_rgb")
    resolver = mi.file_resolver()
    local = mi.FileResolver(resolver)
    local.prepend(str(folder))
    mi.set_file_resolver(local)
    try:
        yield
    finally:
        mi.set_file_resolver(resolver)
        if variant is not None and variant != "scalar_rgb":
            mi.set_variant(variant)


class Node:
    """One XML element with a plugin: its properties, its children, and where it stands in the file."""

    def __init__(self, document: Document, index: int) -> None:
        self.document, self.index = document, index
        node = document.state.nodes[index]
        self.kind: str = str(node.type).rsplit(".", 1)[-1]  # "BSDF", "Shape", ...
        self.props = node.props
        self.plugin: str = node.props.plugin_name()
        self.id: str = node.props.id()
        self.seen: set[str] = set()
        self.names = tuple(self.props.keys())
        self._reference = document.mi.Properties.Type.ResolvedReference

    def __str__(self) -> str:
        label = f"{self.kind.lower() if self.kind != 'BSDF' else 'bsdf'} {self.plugin!r}"
        return f"{label} ({self.id})" if self.id else label

    @property
    def where(self) -> str:
        """File, line and column."""
        return str(self.document.mi.parser.file_location(self.document.state, self.document.state.nodes[self.index]))

    def error(self, message: object) -> SceneError:
        """The exception to raise for a fault in this node."""
        return SceneError(f"{self.where}: {self}: {message}")

    def warn(self, message: str) -> None:
        self.document.warn(f"{self}: {message}")

    def ignore(self, *names: str) -> None:
        """Count properties as understood that make no difference here."""
        self.seen.update(names)

    def has(self, name: str) -> bool:
        return name in self.names

    def get(self, name: str, default: Any = None) -> Any:
        """Value of a property; a child comes as its Node."""
        if name not in self.names:
            return default
        self.seen.add(name)
        if self.props.type(name) == self._reference:
            return self.document.node(self.props[name].index())
        return self.props[name]

    def number(self, name: str, default: float) -> float:
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not np.isfinite(value):
            raise self.error(f"{name}: expected a number")
        return float(value)

    def matrix(self, name: str = "to_world") -> np.ndarray:
        """A transformation as (4, 4) float64; the identity if there is none."""
        value = self.get(name)
        return np.eye(4) if value is None else np.array(value.matrix, dtype=np.float64).reshape(4, 4)

    def children(self, kind: str | None = None) -> list[tuple[str, Node]]:
        """Child nodes and the property they are given as, those of one kind or all."""
        found = []
        for name in self.names:
            if self.props.type(name) == self._reference:
                child = self.document.node(self.props[name].index())
                if kind is None or child.kind == kind:
                    self.seen.add(name)
                    found.append((name, child))
        return found

    def colour(self, name: str, default: float, role: str = "texture") -> Vec3 | Node:
        """A colour, or the Node of a texture that varies over the surface.

        `role` is "texture" (reflectances, clamped to [0, 1] by Mitsuba), "unbounded_texture" or "emissive_texture".
        """
        value = self.get(name, default)
        if isinstance(value, (int, float)):
            return (float(value),) * 3
        if isinstance(value, Node):
            return value.constant() or value
        types = self.document.mi.Properties.Type
        if self.props.type(name) in (types.Color, types.Vector):
            return _vec3(value)
        if self.props.type(name) != types.Spectrum:
            raise self.error(f"{name}: expected a colour or a texture")
        props = self.document.mi.parser.SceneNode(self.document.state.nodes[self.index]).props
        return self.document.evaluate(getattr(props, f"get_{role}")(name))

    def constant(self) -> Vec3 | None:
        """Colour of a texture that is the same everywhere, else None."""
        if self.plugin in ("bitmap", "checkerboard", "mesh_attribute"):
            return None
        if self.plugin == "blackbody":
            return self._blackbody()
        if self.plugin in ("rgb", "srgb", "uniform", "spectrum", "d65", "regular", "irregular"):
            self.seen.update(self.names)
            return self.document.evaluate(self.document.instantiate(self))
        texture = self.document.instantiate(self)
        return None if texture.is_spatially_varying() else self.document.evaluate(texture)

    def _blackbody(self) -> Vec3:
        """Planck's law integrated against the CIE 1931 observer, as Mitsuba's spectral film would see it."""
        mi = self.document.mi
        kelvin, scale = self.number("temperature", 5000.0), self.number("scale", 1.0)
        self.ignore("wavelength_min", "wavelength_max")
        nm = np.arange(360.0, 831.0)
        h, c, k = 6.62607015e-34, 299792458.0, 1.380649e-23
        with np.errstate(over="ignore"):
            radiance = 2e-9 * h * c**2 / ((1e-9 * nm) ** 5 * np.expm1(h * c / (1e-9 * nm * k * kelvin)))
        xyz = np.array([np.array(mi.cie1931_xyz(float(x))).ravel() for x in nm]).T @ radiance / 106.7502593994140625
        return _vec3(np.maximum(np.array(mi.xyz_to_srgb(mi.ScalarColor3f(*map(float, xyz)))).ravel(), 0.0) * scale)


class Document:
    """A parsed scene file. Use inside `mitsuba_session`.

    Raises:
        SceneError: If Mitsuba cannot parse the file, or a parameter in `defines` does not occur in it.
    """

    def __init__(self, mi: Any, path: Path, defines: dict[str, str]) -> None:
        self.mi, self.path = mi, path
        self.warnings: dict[str, int] = {}
        self._nodes: dict[int, Node] = {}
        self.config = mi.parser.ParserConfig("scalar_rgb")
        self.config.merge_meshes = self.config.merge_equivalent = self.config.parallel = False
        self.config.unused_properties = mi.LogLevel.Debug  # reported in one warning instead
        try:
            self.state = mi.parser.parse_file(self.config, str(path), **defines)
            mi.parser.transform_upgrade(self.config, self.state)
            mi.parser.transform_resolve_references(self.config, self.state)
        except RuntimeError as error:
            raise SceneError(f"{path}: {plain(error)}") from None

    def node(self, index: int) -> Node:
        if index not in self._nodes:
            self._nodes[index] = Node(self, index)
        return self._nodes[index]

    def warn(self, message: str) -> None:
        self.warnings[message] = self.warnings.get(message, 0) + 1

    def collected_warnings(self) -> tuple[str, ...]:
        """Every warning once, and one that names all properties nobody asked for."""
        messages = [text if count == 1 else f"{text} ({count} times)" for text, count in self.warnings.items()]
        ignored: dict[str, None] = {}
        for node in (node for node in self._nodes.values() if node.seen):  # the others are definitions nobody uses
            ignored.update(dict.fromkeys(f"{node}.{name}" for name in node.names if name not in node.seen))
        if ignored:
            messages.append(f"ignored properties: {', '.join(ignored)}")
        return tuple(messages)

    def check_plugins(self) -> None:
        """Raise SceneError at an element whose plugin Mitsuba does not have and that nothing is substituted for."""
        manager, unknown = self.mi.PluginManager.instance(), self.mi.ObjectType.Unknown
        for node in (self.node(index) for index in range(len(self.state.nodes))):
            if node.kind in CHECKED and node.plugin != "phong" and manager.plugin_type(node.plugin) == unknown:
                raise node.error("Mitsuba has no such plugin")

    def instantiate(self, node: Node, keep: frozenset[str] | None = None) -> Any:
        """The Mitsuba object of a node; of its child nodes only those of the kinds in `keep` (all if None)."""
        mi, state = self.mi, self.mi.parser.ParserState()
        nodes: list[Any] = []
        state.files, state.versions = self.state.files, self.state.versions

        def copy(index: int) -> int:
            new = mi.parser.SceneNode(self.state.nodes[index])
            place = len(nodes)
            nodes.append(new)
            for name in tuple(new.props.keys()):
                if new.props.type(name) != mi.Properties.Type.ResolvedReference:
                    continue
                child = new.props[name].index()
                if keep is not None and self.node(child).kind not in keep:
                    del new.props[name]
                else:
                    new.props[name] = mi.Properties.ResolvedReference(copy(child))
            return place

        copy(node.index)
        state.nodes = mi.parser.SceneNodeList(nodes)
        try:
            made = mi.parser.instantiate(self.config, state)
        except RuntimeError as error:
            raise SceneError(f"{self.path}: {plain(error)}") from None
        return made[0] if isinstance(made, list) else made

    def evaluate(self, texture: Any, uv: tuple[float, float] = (0.5, 0.5)) -> Vec3:
        """Colour of a Mitsuba texture at `uv`."""
        si = self.mi.SurfaceInteraction3f()
        si.uv = uv
        return _vec3(texture.eval(si))


def plain(error: Exception) -> str:
    """Mitsuba's message without the place in its own source, on one line."""
    text = " ".join(str(error).split())
    return text.split("] ", 1)[1] if text.startswith("[parser.cpp") else text


def _vec3(value: Any) -> Vec3:
    x, y, z = (float(c) for c in np.array(value, dtype=np.float64).ravel()[:3])
    return x, y, z
