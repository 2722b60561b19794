"""Dynamic Graph Networks for vision: each stage of a CNN is a complete DAG, and routers weigh its edges for every image."""

from typing import TYPE_CHECKING

from dgnet._lazy import lazy_names
from dgnet._registration import register_networks

if TYPE_CHECKING:
    from dgnet import analysis as analysis
    from dgnet import data as data
    from dgnet import detection as detection
    from dgnet import errors as errors
    from dgnet import evaluation as evaluation
    from dgnet import graph as graph
    from dgnet import inference as inference
    from dgnet import memory as memory
    from dgnet import models as models
    from dgnet import training as training
    from dgnet._cost import Cost as Cost
    from dgnet._cost import cost as cost
    from dgnet._describe import Description as Description
    from dgnet._describe import describe as describe
    from dgnet._version import __version__ as __version__
    from dgnet.analysis import plot_adjacency as plot_adjacency
    from dgnet.analysis import plot_graph as plot_graph
    from dgnet.checkpoint import load_checkpoint as load_checkpoint
    from dgnet.errors import UsageError as UsageError
    from dgnet.evaluation import Evaluation as Evaluation
    from dgnet.evaluation import evaluate as evaluate
    from dgnet.graph import DynamicGraph as DynamicGraph
    from dgnet.graph import Topology as Topology
    from dgnet.graph import Weighting as Weighting
    from dgnet.graph import compile_options as compile_options
    from dgnet.graph import record_connectivity as record_connectivity
    from dgnet.graph import use_connectivity as use_connectivity
    from dgnet.inference import compile_network as compile_network
    from dgnet.inference import export_network as export_network
    from dgnet.inference import fold_batch_norms as fold_batch_norms
    from dgnet.inference import set_mode as set_mode
    from dgnet.inference import set_sparse as set_sparse
    from dgnet.inference import set_threshold_offset as set_threshold_offset
    from dgnet.memory import keep_freed_memory as keep_freed_memory
    from dgnet.models import Connectivity as Connectivity
    from dgnet.models import convert as convert
    from dgnet.models import create_model as create_model
    from dgnet.models import list_models as list_models
    from dgnet.models import load_static_weights as load_static_weights
    from dgnet.models import to_static as to_static
    from dgnet.publishing import Publication as Publication
    from dgnet.publishing import publish as publish
    from dgnet.training import TrainConfig as TrainConfig
    from dgnet.training import train as train
else:
    __getattr__, __dir__, __all__ = lazy_names(__name__)

register_networks()
