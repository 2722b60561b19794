"""§3 of the paper: topology, weighting, aggregation, stage. Imports torch and networkx, knows no backbone."""

from dgnet.graph.aggregate import aggregate as aggregate
from dgnet.graph.node_gate import NodeGates as NodeGates
from dgnet.graph.record import Record as Record
from dgnet.graph.record import find_stages as find_stages
from dgnet.graph.record import record_connectivity as record_connectivity
from dgnet.graph.record import require_stages as require_stages
from dgnet.graph.record import use_connectivity as use_connectivity
from dgnet.graph.stage import DynamicGraph as DynamicGraph
from dgnet.graph.stage import remove as remove
from dgnet.graph.topology import TOPOLOGIES as TOPOLOGIES
from dgnet.graph.topology import Topology as Topology
from dgnet.graph.topology import build_topology as build_topology
from dgnet.graph.topology import node_names as node_names
from dgnet.graph.weighting import FixedWeighting as FixedWeighting
from dgnet.graph.weighting import LearnedWeighting as LearnedWeighting
from dgnet.graph.weighting import RoutedWeighting as RoutedWeighting
from dgnet.graph.weighting import Router as Router
from dgnet.graph.weighting import Weighting as Weighting
from dgnet.graph.weighting import global_average_pool as global_average_pool
