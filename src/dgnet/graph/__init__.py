"""§3 of the paper: topology, weighting, aggregation, stage. Imports torch and networkx, knows no backbone."""

from dgnet.graph._aggregate import aggregate as aggregate
from dgnet.graph._gating import NodeGates as NodeGates
from dgnet.graph._record import Record as Record
from dgnet.graph._record import find_stages as find_stages
from dgnet.graph._record import record_connectivity as record_connectivity
from dgnet.graph._record import require_stages as require_stages
from dgnet.graph._record import use_connectivity as use_connectivity
from dgnet.graph._stage import DynamicGraph as DynamicGraph
from dgnet.graph._stage import remove as remove
from dgnet.graph._topology import TOPOLOGIES as TOPOLOGIES
from dgnet.graph._topology import Topology as Topology
from dgnet.graph._topology import build_topology as build_topology
from dgnet.graph._topology import node_names as node_names
from dgnet.graph._weighting import FixedWeighting as FixedWeighting
from dgnet.graph._weighting import LearnedWeighting as LearnedWeighting
from dgnet.graph._weighting import RoutedWeighting as RoutedWeighting
from dgnet.graph._weighting import Router as Router
from dgnet.graph._weighting import Weighting as Weighting
from dgnet.graph._weighting import global_average_pool as global_average_pool
