"""Offline fitting: images, signed distance functions and radiance fields on one learning core and one training loop."""

from importlib import import_module
from typing import Any

# Where the public names live; they load on first use.
_PUBLIC = {
    "FitConfig": "nrc.fit.settings",
    "FitError": "nrc.fit.job",
    "evaluate": "nrc.fit.run",
    "export": "nrc.fit.exports",
    "fit": "nrc.fit.run",
    "fit_image": "nrc.fit.run",
    "fit_nerf": "nrc.fit.run",
    "fit_sdf": "nrc.fit.run",
    "sweep": "nrc.fit.sweeps",
}
__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'nrc.fit' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)
