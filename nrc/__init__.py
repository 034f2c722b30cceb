"""Path tracing with a neural radiance cache that learns while it renders, in NVIDIA Warp."""

__version__ = "0.1.0"
