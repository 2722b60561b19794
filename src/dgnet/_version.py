"""The version of the installed package. A module of its own: looking it up takes longer than the rest of `import dgnet`."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("dgnet")
except PackageNotFoundError:  # used from a source tree that was not installed
    __version__ = "0.0.0"
