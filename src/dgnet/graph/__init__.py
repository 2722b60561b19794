"""The graph core, §3 of the paper: topology, weighting, aggregation, stages. It uses torch and networkx, and no backbone.

Where each equation is computed: (1) _topology; (3) _aggregate and _nodes; (4) _router and _pooling; (5) _gating; the gradients
(7) to (10) _aggregate, _gating and _router. (2), the network as a sequence of stages, is in dgnet.models; (6), the loss, is in
dgnet.training.
"""

from dgnet.graph._aggregate import aggregate as aggregate
from dgnet.graph._aggregate import aggregate_rows as aggregate_rows
from dgnet.graph._aggregate import partial_sums as partial_sums
from dgnet.graph._aggregate_form import AggregationForm as AggregationForm
from dgnet.graph._aggregate_form import find_aggregation as find_aggregation
from dgnet.graph._aggregate_plain import aggregate_by_loop as aggregate_by_loop
from dgnet.graph._context import ContextStack as ContextStack
from dgnet.graph._edge_weights import split_ways as split_ways
from dgnet.graph._edge_weights import sum_in_groups as sum_in_groups
from dgnet.graph._gating import GateOptions as GateOptions
from dgnet.graph._gating import NodeGates as NodeGates
from dgnet.graph._gating import accept_cuts as accept_cuts
from dgnet.graph._gating import close_edges as close_edges
from dgnet.graph._gating import find_alive as find_alive
from dgnet.graph._gating import least_logit as least_logit
from dgnet.graph._gating import stack_alive as stack_alive
from dgnet.graph._layout import LAYOUTS as LAYOUTS
from dgnet.graph._layout import from_map as from_map
from dgnet.graph._layout import to_map as to_map
from dgnet.graph._network_gates import NetworkGates as NetworkGates
from dgnet.graph._network_gates import link_gates as link_gates
from dgnet.graph._nodes import OWN_WEIGHTING as OWN_WEIGHTING
from dgnet.graph._nodes import Further as Further
from dgnet.graph._nodes import StageNodes as StageNodes
from dgnet.graph._nodes import StageOptions as StageOptions
from dgnet.graph._pooling import ValidArea as ValidArea
from dgnet.graph._pooling import current_area as current_area
from dgnet.graph._pooling import global_average_pool as global_average_pool
from dgnet.graph._pooling import select_samples as select_samples
from dgnet.graph._pooling import use_area as use_area
from dgnet.graph._pooling import without_autocast as without_autocast
from dgnet.graph._record import Record as Record
from dgnet.graph._record import record_connectivity as record_connectivity
from dgnet.graph._record import use_connectivity as use_connectivity
from dgnet.graph._router import PooledLinear as PooledLinear
from dgnet.graph._router import Router as Router
from dgnet.graph._signed import LinearWeighting as LinearWeighting
from dgnet.graph._signed import SignedOptions as SignedOptions
from dgnet.graph._signed import SignedWeighting as SignedWeighting
from dgnet.graph._signed import SoftmaxWeighting as SoftmaxWeighting
from dgnet.graph._stage import DynamicGraph as DynamicGraph
from dgnet.graph._stage import compile_options as compile_options
from dgnet.graph._stage import find_stages as find_stages
from dgnet.graph._stage import require_stages as require_stages
from dgnet.graph._static import STATIC_STARTS as STATIC_STARTS
from dgnet.graph._topology import TOPOLOGIES as TOPOLOGIES
from dgnet.graph._topology import TOPOLOGY_NAMES as TOPOLOGY_NAMES
from dgnet.graph._topology import RandomGraphOptions as RandomGraphOptions
from dgnet.graph._topology import Topology as Topology
from dgnet.graph._topology import TopologyLike as TopologyLike
from dgnet.graph._topology import build_topology as build_topology
from dgnet.graph._topology import node_names as node_names
from dgnet.graph._topology import parallel as parallel
from dgnet.graph._walk import DenseWalk as DenseWalk
from dgnet.graph._walk import Walk as Walk
from dgnet.graph._weighting import FixedWeighting as FixedWeighting
from dgnet.graph._weighting import LearnedOptions as LearnedOptions
from dgnet.graph._weighting import LearnedWeighting as LearnedWeighting
from dgnet.graph._weighting import RoutedOptions as RoutedOptions
from dgnet.graph._weighting import RoutedWeighting as RoutedWeighting
from dgnet.graph._weighting import Weighting as Weighting
from dgnet.graph._wiring import Observer as Observer
from dgnet.graph._wiring import Wiring as Wiring
from dgnet.graph._wiring import observe as observe
