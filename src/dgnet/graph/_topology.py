"""Which edges a stage has: the binary code 1_e(i, j) of Eq. (1), and the edge sets of §3.1.

N nodes in topological order: node 0 is the *input node*, node N - 1 the *output node*, those between hold the blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from random import Random
from typing import Any

import networkx as nx
import torch
from torch import Tensor

from dgnet.errors import UsageError, check_choice, check_range
from dgnet.options import Options, option


@dataclass(frozen=True, eq=False)
class Topology:
    """The edges of one stage.

    `mask`: (N, N) bool, strictly lower triangular; row j marks the in-edges of node j. `entry`: nodes that read the raw
    stage input, each through its one in-edge (0, j). `pinned`: node -> the constant weight of each of its in-edges. All
    other edges are *free*: the weighting gives their weights.

    Raises UsageError if the mask is no such matrix, or a node lies on no path from the input node to the output node.
    """

    mask: Tensor
    entry: tuple[int, ...] = (1,)
    pinned: Mapping[int, float] = field(default_factory=dict)
    num_nodes: int = field(init=False, repr=False)
    """N, input and output node included."""
    output: int = field(init=False, repr=False)
    """The output node, N - 1."""
    blocks: range = field(init=False, repr=False)
    """The nodes that hold blocks, 1 to N - 2."""
    _senders: tuple[tuple[int, ...], ...] = field(init=False, repr=False)
    _receivers: tuple[tuple[int, ...], ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        try:
            mask = self.mask if isinstance(self.mask, Tensor) else torch.as_tensor(self.mask, device="cpu")
        except (TypeError, ValueError, RuntimeError) as error:
            raise UsageError(f"a topology is a square matrix of 0 and 1, got {self.mask!r}") from error
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
        object.__setattr__(self, "num_nodes", len(mask))
        object.__setattr__(self, "output", len(mask) - 1)
        object.__setattr__(self, "blocks", range(1, len(mask) - 1))
        for node in self.entry:
            if not 0 < node < self.num_nodes - 1:
                raise UsageError(f"an entry node is a block node, 1 to {self.num_nodes - 2}, got {node}")
            if self.senders(node) != (0,):
                raise UsageError(f"entry node {node} reads the raw stage input only, got in-edges {self.senders(node)}")
        for node, weight in self.pinned.items():
            if node not in range(1, self.num_nodes) or not math.isfinite(weight):
                raise UsageError(
                    f"`pinned` maps receiving nodes, 1 to {self.num_nodes - 1}, to finite numbers, got {node}: {weight}"
                )
        self._check_paths()

    def _check_paths(self) -> None:
        last = self.num_nodes - 1
        reached, reaching = self._reached(), {last}
        for i in range(last - 1, -1, -1):
            if reaching.intersection(self.receivers(i)):
                reaching.add(i)
        stranded = sorted(set(range(last + 1)) - (reached & reaching))
        if stranded:
            raise UsageError(f"node {stranded[0]} lies on no path from the input node 0 to the output node {last}")

    def _reached(self, without: int | None = None) -> set[int]:
        """The nodes to which a path leads from the input node, if the node `without` is closed."""
        reached = {0}
        for j in range(1, self.num_nodes):
            if j != without and reached.intersection(self.senders(j)):
                reached.add(j)
        return reached

    def find_cut(self) -> int | None:
        """The first block that is on every path from the input node to the output node; None if there is none.

        If this block is closed, nothing reaches the output node.
        """
        return next((j for j in self.blocks if self.output not in self._reached(without=j)), None)

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
        """The nodes j of the free out-edges (node, j), ascending."""
        return tuple(j for j in self.receivers(node) if j not in self.pinned)

    def to_dict(self) -> dict[str, Any]:
        """Plain values that `from_dict` and `build_topology` take. Checkpoints store random graphs in this form."""
        return {
            "num_nodes": self.num_nodes,
            "edges": [[i, j] for j in range(self.num_nodes) for i in self.senders(j)],
            "entry": list(self.entry),
            "pinned": {str(node): weight for node, weight in self.pinned.items()},
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Topology:
        """The inverse of `to_dict`. Raises UsageError for values that describe no topology."""
        try:
            num_nodes = int(values["num_nodes"])
            mask = torch.zeros(num_nodes, num_nodes, dtype=torch.bool, device="cpu")
            for i, j in values["edges"]:
                if not 0 <= min(i, j) <= max(i, j) < num_nodes:
                    raise IndexError(f"edge [{i}, {j}] of {num_nodes} nodes")
                mask[j, i] = True
            pinned = {int(node): float(weight) for node, weight in values.get("pinned", {}).items()}
            return cls(mask, tuple(values.get("entry", (1,))), pinned)
        except UsageError:
            raise
        except (LookupError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise UsageError(f"a topology is {{num_nodes, edges: [[i, j], …]}}, got {str(values)[:80]} ({error})") from None

    @property
    def reads_input_node(self) -> bool:
        """Whether a node aggregates the input node's feature; entry nodes read the raw stage input instead."""
        return any(j not in self.entry for j in self.receivers(0))


def complete(num_nodes: int) -> Topology:
    """All edges (i, j), i < j: DG-Net's stages (§3.2)."""
    return Topology(_all_edges(num_nodes))


def residual(num_nodes: int) -> Topology:
    """Edges (i, i + 1) and (i, i + 2): E_res of §3.1."""
    return Topology(_all_edges(num_nodes).triu(-2))


def chain(num_nodes: int) -> Topology:
    """Edges (i, i + 1): E_vgg of §3.1."""
    return Topology(_all_edges(num_nodes).triu(-1))


def parallel(num_nodes: int) -> Topology:
    """Edges (0, j) and (j, N - 1): all blocks read the raw stage input side by side, and the output node sums them."""
    mask = torch.zeros(num_nodes, num_nodes, dtype=torch.bool, device="cpu")
    mask[1 : num_nodes - 1, 0] = mask[num_nodes - 1, 1 : num_nodes - 1] = True
    return Topology(mask, entry=tuple(range(1, num_nodes - 1)))


def _all_edges(num_nodes: int) -> Tensor:
    # On the CPU even if the model is built on the meta device: building a stage reads the edges.
    return torch.ones(num_nodes, num_nodes, dtype=torch.bool, device="cpu").tril(-1)


@dataclass(frozen=True)
class RandomGraphOptions(Options):
    """Options of the random topologies (Xie et al., 2019, §3.4)."""

    topology_seed: int = option(
        0, "seed of random topologies; each stage draws its own", used_by={"topology": ("er", "ba", "ws")}
    )
    er_p: float = option(0.2, "ER: probability of an edge between two blocks", used_by={"topology": ("er",)})
    ba_m: int = option(5, "BA: edges of each new block", used_by={"topology": ("ba",)})
    ws_k: int = option(4, "WS: neighbours of a block on the ring", used_by={"topology": ("ws",)})
    ws_p: float = option(0.75, "WS: probability that an edge is rewired", used_by={"topology": ("ws",)})

    def check(self) -> None:
        """Raises UsageError if a seed or a number of edges or neighbours is no whole number."""
        for name in ("topology_seed", "ba_m", "ws_k"):
            if not isinstance(getattr(self, name), int):
                raise UsageError(f"{name} must be a whole number, got {getattr(self, name)!r}")

    def generator(self, stage: int) -> Random:
        """The random generator for the graph of a stage, counted from 1."""
        return Random(f"{self.topology_seed}/{stage}")


def erdos_renyi(num_nodes: int, options: RandomGraphOptions, rng: Random) -> Topology:
    """ER(P): each pair of blocks has an edge with probability `er_p`."""
    probability = options.er_p
    check_range("er_p", probability, 0, 1)
    return _draw("er", f"er_p={probability}", num_nodes, 1, lambda b: nx.erdos_renyi_graph(b, probability, seed=rng))


def barabasi_albert(num_nodes: int, options: RandomGraphOptions, rng: Random) -> Topology:
    """BA(M): blocks are added one by one, each with `ba_m` edges, preferably to blocks that already have many."""
    edges = options.ba_m
    check_range("ba_m", edges, 1)
    return _draw("ba", f"ba_m={edges}", num_nodes, edges + 1, lambda b: nx.barabasi_albert_graph(b, edges, seed=rng))


def watts_strogatz(num_nodes: int, options: RandomGraphOptions, rng: Random) -> Topology:
    """WS(K, P): a ring in which each block has `ws_k` neighbours; every edge is rewired with probability `ws_p`."""
    neighbours, probability = options.ws_k, options.ws_p
    check_range("ws_k", neighbours, 2)
    if neighbours % 2:
        raise UsageError(f"ws_k must be even (half of the neighbours are on each side), got {neighbours}")
    check_range("ws_p", probability, 0, 1)
    settings = f"ws_k={neighbours}, ws_p={probability}"
    return _draw(
        "ws", settings, num_nodes, neighbours + 1, lambda b: nx.watts_strogatz_graph(b, neighbours, probability, seed=rng)
    )


_DRAWS = 100


def _draw(name: str, settings: str, num_nodes: int, min_blocks: int, sample: Callable[[int], nx.Graph]) -> Topology:
    """A random graph over the blocks. Edges are directed from the lower to the higher index, as in RandWire.

    Blocks without an in-edge get one from the input node with weight 1; the output node computes the mean of the blocks without
    an out-edge. A graph that is not connected is drawn again, at most `_DRAWS` times in all.
    """
    blocks = num_nodes - 2
    if blocks < min_blocks:
        raise UsageError(f"topology {name!r} with {settings} needs at least {min_blocks} blocks, the stage has {blocks}")
    graph = next((g for g in (sample(blocks) for _ in range(_DRAWS)) if nx.is_connected(g)), None)
    if graph is None:
        raise UsageError(
            f"topology {name!r} with {settings} gave no connected graph of {blocks} blocks in {_DRAWS} draws; choose more edges"
        )
    mask = torch.zeros(num_nodes, num_nodes, dtype=torch.bool, device="cpu")
    for i, j in graph.edges:
        mask[max(i, j) + 1, min(i, j) + 1] = True
    sources = [j for j in range(1, num_nodes - 1) if not mask[j].any()]
    sinks = [i for i in range(1, num_nodes - 1) if not mask[:, i].any()]
    mask[sources, 0] = True
    mask[num_nodes - 1, sinks] = True
    return Topology(mask, pinned={**dict.fromkeys(sources, 1.0), num_nodes - 1: 1 / len(sinks)})


TopologyLike = str | Tensor | Topology | Mapping[str, Any] | Callable[[int], "Topology | Tensor"]

TOPOLOGIES: dict[str, Callable[[int], Topology]] = {"complete": complete, "residual": residual, "chain": chain}
"""Topologies that depend on the number of nodes only."""

RANDOM_TOPOLOGIES: dict[str, Callable[[int, RandomGraphOptions, Random], Topology]] = {
    "er": erdos_renyi,
    "ba": barabasi_albert,
    "ws": watts_strogatz,
}
"""Topologies that are drawn at random."""

TOPOLOGY_NAMES = (*TOPOLOGIES, *RANDOM_TOPOLOGIES)


def build_topology(
    topology: TopologyLike, num_nodes: int, options: RandomGraphOptions | None = None, stage: int = 1
) -> Topology:
    """A stage's topology from a name, a mask, a Topology, its `to_dict`, or a callable from `num_nodes` to one of these.

    `options`: for random graphs. `stage`: counted from 1; each stage draws its own random graph.

    Raises UsageError for an unknown name, a bad mask, or a size other than `num_nodes`.
    """
    if callable(topology):
        topology = topology(num_nodes)
    if isinstance(topology, str):
        check_choice("topology", topology, TOPOLOGY_NAMES)
        options = options or RandomGraphOptions()
        if topology in TOPOLOGIES:
            topology = TOPOLOGIES[topology](num_nodes)
        else:
            topology = RANDOM_TOPOLOGIES[topology](num_nodes, options, options.generator(stage))
    if isinstance(topology, Mapping):
        topology = Topology.from_dict(topology)
    if not isinstance(topology, Topology):
        topology = Topology(topology)
    if topology.num_nodes != num_nodes:
        raise UsageError(f"the stage has {num_nodes} nodes (blocks + 2), the topology {topology.num_nodes}")
    return topology


def node_names(num_nodes: int) -> list[str]:
    """The labels of a stage's nodes in figures: `in`, the blocks from 1, `out`."""
    return ["in", *map(str, range(1, num_nodes - 1)), "out"]
