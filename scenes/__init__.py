"""Scenes that ship with the package, made by this project."""
