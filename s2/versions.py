"""Versions of the packages that a figure rests on."""

from __future__ import annotations

from contextlib import suppress
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version


def version_of(package: str) -> str | None:
    """Of a package by the name it is installed under: what its metadata say, or where it lies on the path without any,
    `__version__` of its module (`megatron.core` of `megatron-core`). None where neither says."""
    with suppress(PackageNotFoundError):
        return version(package)
    for name in dict.fromkeys((package, package.replace("-", "_"), package.replace("-", "."))):
        with suppress(Exception):  # a module made for another machine raises OSError, RuntimeError and what not
            return str(import_module(name).__version__)
    return None
