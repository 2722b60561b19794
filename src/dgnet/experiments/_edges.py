"""Whether the edges of a stage can learn, and which of them opened and closed in training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgnet.experiments._report import format_table
from dgnet.graph import DynamicGraph, find_stages, record_connectivity


def format_edges(rows: Sequence[Sequence[str]]) -> str:
    """The rows of `compare_edges` as a Markdown table."""
    heads = ["run", "stage", "open edges, %, start", "trained", "opened, %", "closed, %", "gradient per edge, start", "trained"]
    return format_table(heads, [list(row) for row in rows])


def compare_edges(name: str, start: nn.Module, trained: nn.Module, images: Tensor, labels: Tensor) -> list[list[str]]:
    """One row for each stage: shares of edges × images that are open, that opened and that closed, and gradient norms.

    `start`, `trained`: the network before and after training, in evaluation mode. `images`: (B, 3, H, W), `labels`: (B,).
    """
    opened = [find_open_edges(network, images) for network in (start, trained)]
    gradients = [find_gradients(network, images, labels) for network in (start, trained)]
    rows = []
    for stage, graph in enumerate(find_stages(trained)):
        before, after = (found[stage][:, graph.topology.mask] for found in opened)
        shares = (before, after, after & ~before, before & ~after)
        norms = [found[stage] for found in gradients]
        cells = [f"{100 * float(share.float().mean()):.1f}" for share in shares]
        cells += ["–" if norm is None else f"{float(norm[graph.topology.mask].square().mean().sqrt()):.1e}" for norm in norms]
        rows.append([name, str(stage + 1), *cells])
    return rows


@torch.no_grad()
def find_open_edges(network: nn.Module, images: Tensor) -> list[Tensor]:
    """Which edges are open for each image, (B, N, N) for each stage. A weight of 0 counts as closed."""
    with record_connectivity(network) as record:
        network(images)
    return [matrix != 0 for matrix in record.adjacency]


def find_gradients(network: nn.Module, images: Tensor, labels: Tensor) -> list[Tensor | None]:
    """For each stage the norm of the loss's gradient in the parameters of each edge, (N, N), with weights as in training.

    These are its row of W and b in the sender's router, and its static weight. None: the stage has no such parameters, or
    routers of the user's own. Normalisations keep the statistics of evaluation.
    """
    network.zero_grad()
    with weigh_as_in_training(network), torch.enable_grad():
        F.cross_entropy(network(images), labels).backward()
    found = [_norms(stage) for stage in find_stages(network)]
    network.zero_grad()
    return found


@contextmanager
def weigh_as_in_training(network: nn.Module) -> Iterator[None]:
    """A context in which the weightings of a network in evaluation mode are in training mode."""
    weightings = [stage.weighting for stage in find_stages(network)]
    for weighting in weightings:
        weighting.train()
    try:
        yield
    finally:
        for weighting in weightings:
            weighting.eval()


def _norms(stage: DynamicGraph) -> Tensor | None:
    topology, weighting = stage.topology, stage.weighting
    squares = torch.zeros(topology.num_nodes, topology.num_nodes, dtype=torch.float64, device="cpu")
    is_known = False
    routers: Any = getattr(weighting, "routers", {})
    parameter: Any
    for node, router in routers.items():
        if not isinstance(router, nn.Linear):
            return None
        receivers = list(topology.free_receivers(int(node)))
        for parameter in (router.weight, router.bias):
            if parameter is not None and parameter.grad is not None:
                own = parameter.grad.double().cpu().reshape(len(receivers), -1).square().sum(1)
                squares[receivers, int(node)] += own
                is_known = True
    order = getattr(weighting, "order", None)
    for name in ("static", "alpha"):
        parameter = getattr(weighting, name, None)
        if order is not None and isinstance(parameter, nn.Parameter) and parameter.grad is not None:
            for node in range(1, topology.num_nodes):
                own = order.row(parameter.grad, node).double().cpu()
                squares[node, list(topology.senders(node))] += own.reshape(len(own), -1).square().sum(1)
            is_known = True
    return squares.sqrt() if is_known else None
