"""Kernels, device functions and their factories; imports only warp, the standard library and itself."""
