"""Register our networks with timm without importing timm first.

After `import dgnet`, `timm.create_model("dg_resnet50")` must work. But timm and torch take seconds to import, and `dgnet
--help` imports `dgnet` too. So the networks are imported right after something imports timm.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType


def register_networks() -> None:
    """Register our networks with timm: now if timm has been imported, otherwise at the end of its import."""
    if "timm" in sys.modules:
        _import_networks()
    else:
        sys.meta_path.insert(0, _TimmFinder())


def _import_networks() -> None:
    for module in ("dgnet.models", "dgnet._entries"):
        importlib.import_module(module)


class _TimmFinder:
    """Finds timm with the other finders, and changes its loader so that it imports `dgnet.models` after timm."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != "timm":
            return None
        found = (finder.find_spec(name, path, target) for finder in list(sys.meta_path) if finder is not self)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is None or spec.loader is None:
            return spec
        load_timm = spec.loader.exec_module

        def load_timm_and_networks(module: ModuleType) -> None:
            load_timm(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            _import_networks()

        spec.loader.exec_module = load_timm_and_networks  # type: ignore[method-assign]
        return spec
