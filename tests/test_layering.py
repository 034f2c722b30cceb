"""Imports point one way, and kernels read as the conventions say: both checked on the source's syntax tree."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parent.parent
SOURCES = {"nrc": CHECKOUT / "nrc", "nrc.viewer": CHECKOUT / "viewer", "nrc.scenes": CHECKOUT / "scenes"}

# Packages that only some installations have.
OPTIONAL = ("torch", "mitsuba", "drjit", "pyglet", "imgui_bundle", "pycolmap")

# (modules, what they must not reach through any chain of imports)
FORBIDDEN = [
    (("nrc.cache", "nrc.field", "nrc.trainer"), ("nrc.pathtracer", "nrc.scene", "nrc.assets", "nrc.renderer")),
    (("nrc.scene", "nrc.image", "nrc.launch", "nrc.assets"), ("nrc.pathtracer", "nrc.cache", "nrc.renderer")),
    (("nrc.fit",), ("nrc.pathtracer", "nrc.cache", "nrc.renderer", "nrc.device_scene")),
    (("nrc.display",), ("nrc.cache", "nrc.renderer", "nrc.assets")),
    (("nrc.launch",), ("nrc.scene", "nrc.image", "nrc.kernels")),
]
# The renderer, and what is built on it
CACHE_CONSUMERS = (
    "nrc",
    "nrc.animation_job",
    "nrc.bench",
    "nrc.cli",
    "nrc.cli_render",
    "nrc.cli_view",
    "nrc.debug_views",
    "nrc.integrations",
    "nrc.render_job",
    "nrc.renderer",
    "nrc.viewer",
)


def within(module: str, packages: tuple[str, ...]) -> bool:
    """Whether `module` is one of `packages` or below one; the root package `nrc` stands for itself alone."""
    return any(module == package or (package != "nrc" and module.startswith(f"{package}.")) for package in packages)


def source_files() -> dict[str, Path]:
    """Every Python file of the package by module name."""
    files = {}
    for package, folder in SOURCES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = [package, *path.relative_to(folder).with_suffix("").parts]
            files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return files


FILES = source_files()


def imports(module: str, source: str, *, is_package: bool, known: dict[str, Path], top_level: bool) -> set[str]:
    """Modules that `source` imports; `top_level` leaves out what functions import when called.

    Imports under `if TYPE_CHECKING:` count too: they couple the code as any other import does.
    """
    found: set[str] = set()
    for node in walk(ast.parse(source), skip_functions=top_level):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".")[: len(module.split(".")) - node.level + is_package]
                base = ".".join([*package, base] if base else package)
            for alias in node.names:
                name = f"{base}.{alias.name}"
                found.add(name if name in known else base)
    return found


def walk(node: ast.AST, *, skip_functions: bool) -> Iterator[ast.AST]:
    """Nodes below `node`, without function bodies on demand."""
    for child in ast.iter_child_nodes(node):
        if skip_functions and isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        yield child
        yield from walk(child, skip_functions=skip_functions)


def import_graph(*, top_level: bool) -> dict[str, set[str]]:
    """Module to what it imports, for every file of the package."""
    return {
        module: imports(
            module, path.read_text(), is_package=path.name == "__init__.py", known=FILES, top_level=top_level
        )
        for module, path in FILES.items()
    }


def reachable(graph: dict[str, set[str]], start: str) -> dict[str, list[str]]:
    """What `start` imports directly or through others, with the chain that leads there."""
    chains: dict[str, list[str]] = {}
    todo = [[start]]
    while todo:
        chain = todo.pop()
        for target in graph.get(chain[-1], ()):
            if target not in chains:
                chains[target] = [*chain, target]
                todo.append(chains[target])
    return chains


def test_kernels_import_only_warp_and_the_standard_library() -> None:
    """Kernel modules depend on nothing of the host side, not even NumPy."""
    graph = {
        module: targets for module, targets in import_graph(top_level=False).items() if within(module, ("nrc.kernels",))
    }
    assert graph
    bad = {
        f"{module} imports {target}"
        for module, targets in graph.items()
        for target in targets
        if target.split(".")[0] not in sys.stdlib_module_names
        and target.split(".")[0] != "warp"
        and not within(target, ("nrc.kernels",))
    }
    assert not bad


def test_imports_have_no_cycle() -> None:
    """No module reaches itself through what it imports when it is imported."""
    graph = import_graph(top_level=True)
    cycles = [" -> ".join(reachable(graph, module)[module]) for module in graph if module in reachable(graph, module)]
    assert not cycles


def test_only_the_renderer_and_above_reach_the_cache() -> None:
    """The path tracer, and everything else below the renderer, emits records and never sees the cache."""
    graph = import_graph(top_level=False)
    chains = {module: reachable(graph, module).get("nrc.cache") for module in graph}
    bad = [" -> ".join(chain) for module, chain in chains.items() if chain and not within(module, CACHE_CONSUMERS)]
    assert not bad


def test_lower_layers_do_not_reach_higher_ones() -> None:
    """The learning core knows no scenes, scenes know no renderer, launching knows nobody."""
    graph = import_graph(top_level=False)
    bad = [
        " -> ".join(chain)
        for modules, forbidden in FORBIDDEN
        for module in graph
        if within(module, modules)
        for target, chain in reachable(graph, module).items()
        if within(target, forbidden)
    ]
    assert not bad


def test_optional_packages_are_imported_only_when_used() -> None:
    """Only the viewer and the integrations import optional packages at the top; others do so inside functions."""
    bad = [
        f"{module} imports {target}"
        for module, targets in import_graph(top_level=True).items()
        if not within(module, ("nrc.viewer", "nrc.integrations"))
        for target in targets
        if target.split(".")[0] in OPTIONAL or within(target, ("nrc.viewer", "nrc.integrations"))
    ]
    assert not bad


def test_import_graph_sees_every_form_of_import() -> None:
    """Absolute, relative and submodule imports resolve to module names; calls' imports are told apart."""
    source = (
        "import numpy as np\nimport nrc.launch\nfrom nrc import scene, __version__\nfrom . import bvh\n"
        "from .kernels.rng import hash\nfrom ..cache import A\nif 1:\n    import json\n"
        "def f():\n    import torch\nclass C:\n    import csv\n"
    )
    known = {"nrc.scene": Path(), "nrc.fit.bvh": Path()}
    top = imports("nrc.fit.sdf", source, is_package=False, known=known, top_level=True)
    local = {"nrc.fit.bvh", "nrc.fit.kernels.rng", "nrc.cache"}
    assert top == {"numpy", "nrc.launch", "nrc.scene", "nrc", "json", "csv"} | local
    all_ = imports(
        "nrc.fit", "def f():\n    import torch\nfrom .a import b", is_package=True, known={}, top_level=False
    )
    assert all_ == {"torch", "nrc.fit.a"}
    assert reachable({"a": {"b"}, "b": {"c"}, "c": {"a"}}, "a")["a"] == ["a", "b", "c", "a"]


def test_importing_nrc_loads_no_optional_package() -> None:
    """`import nrc` starts without the viewer, torch or Mitsuba, and without initialising Warp."""
    program = (
        "import sys, nrc\n"
        f"print([m for m in sys.modules if m.split('.')[0] in {OPTIONAL!r} or m.startswith('nrc.viewer')])"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=CHECKOUT)
    assert run.stdout.splitlines() == ["[]"]  # Warp's initialisation would print its banner


def warp_decorator(node: ast.FunctionDef) -> str | None:
    """'kernel' or 'func' where `node` is decorated with @wp.kernel or @wp.func, with or without arguments."""
    for decorator in node.decorator_list:
        target = decorator.func if isinstance(decorator, ast.Call) else decorator
        if isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name) and target.value.id == "wp":
            return target.attr
    return None


def lint(source: str) -> list[str]:
    """What the kernels of `source`, in factories too, do against the conventions."""
    problems = []
    tree = ast.parse(source)
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and warp_decorator(node)]
    for node in functions:
        arguments = node.args.args
        for argument in arguments:
            if isinstance(argument.annotation, ast.Call):
                problems.append(f"{node.name}: write {argument.arg} as wp.array[...], not wp.array(...)")
        for call in ast.walk(node):
            if isinstance(call, ast.Call) and ast.unparse(call.func) in ("print", "wp.printf"):
                problems.append(f"{node.name}: prints")
        if warp_decorator(node) != "kernel":
            continue
        problems += [f"{node.name}: {argument.arg} has no type" for argument in arguments if not argument.annotation]
        first = arguments[0] if arguments else None
        if first is None or first.arg != "first" or first.annotation is None or ast.unparse(first.annotation) != "int":
            problems.append(f"{node.name}: the first parameter must be `first: int`")
        if not ast.get_docstring(node):
            problems.append(f"{node.name}: has no docstring")
        if node.name.endswith("_kernel") or node.name == "kernel":
            problems.append(f"{node.name}: a kernel's name is a verb phrase without 'kernel'")
    kernels = [node for node in functions if warp_decorator(node) == "kernel"]
    if kernels and "enable_backward" not in source:
        problems.append("module compiles adjoints: set enable_backward to False")
    return problems


@pytest.mark.parametrize("module", FILES)
def test_kernels_follow_the_conventions(module: str) -> None:
    """Typed parameters, `first` first, a docstring, no printing, no adjoints."""
    assert lint(FILES[module].read_text()) == []


GOOD_KERNEL = '''
wp.set_module_options({"enable_backward": False})

@wp.kernel
def scale(first: int, out_x: wp.array[float]):
    """Scale. One thread per element."""
'''


@pytest.mark.parametrize(
    ("before", "after", "problem"),
    [
        ("", "", None),
        ("out_x: wp.array[float]", "out_x", "scale: out_x has no type"),
        ("wp.array[float]", "wp.array(dtype=float)", "scale: write out_x as wp.array[...], not wp.array(...)"),
        ("first: int, ", "", "scale: the first parameter must be `first: int`"),
        ("first: int", "first: wp.int64", "scale: the first parameter must be `first: int`"),
        ('"""Scale. One thread per element."""', "pass", "scale: has no docstring"),
        ('element."""', 'element."""\n    print(first)', "scale: prints"),
        ("def scale", "def scale_kernel", "scale_kernel: a kernel's name is a verb phrase without 'kernel'"),
        ("enable_backward", "fast_math", "module compiles adjoints: set enable_backward to False"),
    ],
)
def test_linter_finds_each_breach(before: str, after: str, problem: str | None) -> None:
    """A good kernel passes and each single breach is found."""
    assert lint(GOOD_KERNEL.replace(before, after) if before else GOOD_KERNEL) == ([problem] if problem else [])
