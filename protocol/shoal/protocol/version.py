"""The installed version of Shoal."""

from __future__ import annotations

from importlib.metadata import version

SOFTWARE_VERSION = version("shoal")
