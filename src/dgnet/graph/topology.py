"""Which edges a stage has (§3.1).

N nodes in topological order: node 0 is the *input node*, node N - 1 the *output node*, those between hold the blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dgnet.errors import UsageError, lookup


@dataclass(frozen=True, eq=False)
class Topology:
    """The edges of one stage.

    `mask`: (N, N) bool, strictly lower triangular; row j marks the in-edges of node j. `entry`: nodes that read the raw
    stage input, each through its one in-edge (0, j). `pinned`: node -> the constant weight of each of its in-edges; all
    other edges are *free*, their weights come from the weighting.

    Raises UsageError where the mask is no such matrix or a node lies on no path from the input node to the output node.
    """

    mask: Tensor
    entry: tuple[int, ...] = (1,)
    pinned: Mapping[int, float] = field(default_factory=dict)
    _senders: tuple[tuple[int, ...], ...] = field(init=False, repr=False)
    _receivers: tuple[tuple[int, ...], ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        mask = torch.as_tensor(self.mask)
        if mask.ndim != 2 or mask.shape[0] != mask.shape[1]:
            raise UsageError(f"a topology is a square matrix, got shape {tuple(mask.shape)}")
        if len(mask) < 3:
            raise UsageError(f"a stage has at least 3 nodes (input, one block, output), got {len(mask)}")
        mask = mask.bool().cpu()
        if mask.triu().any():
            i, j = (mask.triu().nonzero()[0]).tolist()
            raise UsageError(
                f"a topology is acyclic: node {i} has an in-edge from node {j}, allowed are nodes 0 to {i - 1}"
                if i
                else f"node 0 is the input node and has no in-edges, got one from node {j}"
            )
        object.__setattr__(self, "mask", mask)
        # Plain tuples: a compiled stage unrolls its loops over them.
        object.__setattr__(self, "_senders", tuple(tuple(row.nonzero().flatten().tolist()) for row in mask))
        object.__setattr__(self, "_receivers", tuple(tuple(row.nonzero().flatten().tolist()) for row in mask.T))
        for node in self.entry:
            if not 0 < node < self.num_nodes - 1:
                raise UsageError(f"an entry node is a block node, 1 to {self.num_nodes - 2}, got {node}")
            if self.senders(node) != (0,):
                raise UsageError(f"entry node {node} reads the raw stage input only, got in-edges {self.senders(node)}")
        self._check_paths()

    def _check_paths(self) -> None:
        last = self.num_nodes - 1
        reached, reaching = {0}, {last}
        for j in range(1, last + 1):
            if reached.intersection(self.senders(j)):
                reached.add(j)
        for i in range(last - 1, -1, -1):
            if reaching.intersection(self.receivers(i)):
                reaching.add(i)
        stranded = sorted(set(range(last + 1)) - (reached & reaching))
        if stranded:
            raise UsageError(f"node {stranded[0]} lies on no path from the input node 0 to the output node {last}")

    @property
    def num_nodes(self) -> int:
        return len(self._senders)

    @property
    def num_edges(self) -> int:
        return sum(len(senders) for senders in self._senders)

    def senders(self, node: int) -> tuple[int, ...]:
        """The nodes i of the in-edges (i, node), ascending."""
        return self._senders[node]

    def receivers(self, node: int) -> tuple[int, ...]:
        """The nodes j of the out-edges (node, j), ascending."""
        return self._receivers[node]

    def free_receivers(self, node: int) -> tuple[int, ...]:
        """The nodes j of the out-edges (node, j) that the weighting weighs, ascending."""
        return tuple(j for j in self.receivers(node) if j not in self.pinned)

    @property
    def reads_input_node(self) -> bool:
        """Whether a node aggregates the input node's feature; entry nodes read the raw stage input instead."""
        return any(j not in self.entry for j in self.receivers(0))


def complete(num_nodes: int) -> Topology:
    """All edges (i, j), i < j: DG-Net's stages (§3.2)."""
    return Topology(torch.ones(num_nodes, num_nodes, dtype=torch.bool).tril(-1))


def residual(num_nodes: int) -> Topology:
    """Edges (i, i + 1) and (i, i + 2): E_res of §3.1."""
    return Topology(torch.ones(num_nodes, num_nodes, dtype=torch.bool).tril(-1).triu(-2))


def chain(num_nodes: int) -> Topology:
    """Edges (i, i + 1): E_vgg of §3.1."""
    return Topology(torch.ones(num_nodes, num_nodes, dtype=torch.bool).tril(-1).triu(-1))


TopologyLike = str | Tensor | Topology | Callable[[int], "Topology | Tensor"]

TOPOLOGIES: dict[str, Callable[[int], Topology]] = {"complete": complete, "residual": residual, "chain": chain}


def build_topology(topology: TopologyLike, num_nodes: int) -> Topology:
    """A stage's topology from a name, a mask, a Topology, or a callable that maps `num_nodes` to one of these.

    Raises UsageError for an unknown name, a bad mask, or one whose size is not `num_nodes`.
    """
    if isinstance(topology, str):
        topology = lookup("topology", topology, TOPOLOGIES)
    if callable(topology):
        topology = topology(num_nodes)
    if not isinstance(topology, Topology):
        topology = Topology(topology)
    if topology.num_nodes != num_nodes:
        raise UsageError(f"the stage has {num_nodes} nodes (blocks + 2), the topology {topology.num_nodes}")
    return topology
