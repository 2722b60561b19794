"""Dynamic Graph Networks for vision: each stage of a CNN a complete DAG, its edges weighed by routers for every image."""

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from dgnet._cost import Cost as Cost
from dgnet._cost import cost as cost
from dgnet.errors import UsageError as UsageError
from dgnet.graph import record_connectivity as record_connectivity
from dgnet.graph import use_connectivity as use_connectivity
from dgnet.memory import keep_freed_memory as keep_freed_memory
from dgnet.models import create_model as create_model
from dgnet.models import list_models as list_models
from dgnet.models import load_static_weights as load_static_weights

if TYPE_CHECKING:
    from dgnet.analysis import plot_adjacency as plot_adjacency
    from dgnet.analysis import plot_graph as plot_graph


def __getattr__(name: str) -> Any:
    """What draws is imported when it is asked for: it needs matplotlib, which takes a while."""
    if name in ("plot_adjacency", "plot_graph"):
        from dgnet import analysis

        return getattr(analysis, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


try:
    __version__ = version("dgnet")
except PackageNotFoundError:  # used from a source tree that was not installed
    __version__ = "0.0.0"
