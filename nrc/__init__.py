"""Path tracing with a neural radiance cache that learns while it renders, in NVIDIA Warp."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# Where the public names live; they load on first use, so that `import nrc` stays quick.
_PUBLIC = {
    "CacheConfig": "nrc.cache",
    "Camera": "nrc.scene",
    "DeviceScene": "nrc.device_scene",
    "Encoding": "nrc.field",
    "Field": "nrc.field",
    "Material": "nrc.scene",
    "Mesh": "nrc.scene",
    "Network": "nrc.field",
    "Optimizer": "nrc.optimizer",
    "PathTracer": "nrc.pathtracer",
    "PathTracerConfig": "nrc.pathtracer",
    "RadianceCache": "nrc.cache",
    "Records": "nrc.records",
    "Renderer": "nrc.renderer",
    "Scene": "nrc.scene",
    "SnapshotError": "nrc.snapshot",
    "Trainer": "nrc.trainer",
    "TrainingPaths": "nrc.records",
    "load": "nrc.assets",
    "load_config": "nrc.config",
    "make_query": "nrc.cache",
    "training_tiles": "nrc.records",
}
__all__ = [*_PUBLIC, "__version__"]


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'nrc' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)
