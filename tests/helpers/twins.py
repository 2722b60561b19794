"""Slow, simple versions of a stage and of aggregation, written edge by edge from the paper's equations."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dgnet.graph import DynamicGraph


def sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z))


def run_stage_by_edges(stage: DynamicGraph, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output, adjacency, α, and the nodes that ran, of a routed stage, from Eqs. (3) to (5) and the definition of removal.

    A Python loop over samples and edges, without gradients.
    """
    last = stage.topology.num_nodes - 1
    mask = stage.topology.mask.tolist()
    adjacency = torch.zeros(len(x), last + 1, last + 1)
    features = {0: stage.input(x)}
    alive = {0: [True] * len(x)}
    alpha: dict[tuple[int, int], list[float]] = {}
    gates = stage.node_gates
    votes = [[0.0] * (last + 1) for _ in x]  # for each sample and node: the sum of the senders' terms for its gate
    for j in range(1, last + 1):
        # Node j - 1 has run: it predicts its out-edges.
        i = j - 1
        out_edges = [k for k in range(last + 1) if mask[k][i]]
        router = stage.weighting.routers[str(i)]
        seen = features[i].relu() if stage.router_reads == "activation" else features[i]
        for b in range(len(x)):
            pooled = [seen[b, c].mean().item() for c in range(seen.shape[1])]
            for row, k in enumerate(out_edges):
                z = sum(w * v for w, v in zip(router.weight[row].tolist(), pooled, strict=True)) + router.bias[row].item()
                alpha.setdefault((i, k), []).append(sigmoid(z) if alive[i][b] else 0.0)
            gated = [k for k in out_edges if k != last]
            if gates is not None and gates.reads == "stage":
                gated = list(range(1, last)) if i == 0 else []
            for row, k in enumerate(gated if gates is not None and alive[i][b] else []):
                column = gates.columns[str(i)].weight[row].tolist()
                votes[b][k] += sum(w * v for w, v in zip(column, pooled, strict=True))
        tau = stage.weighting.tau[j].item()
        alive[j] = []
        rows = []
        for b in range(len(x)):
            total = torch.zeros_like(x[b] if j == 1 else features[0][b])
            is_alive = False
            least = 0.5 if gates is None or stage.training else 0.5 + stage.threshold_offset
            gate = gates is None or j == last or sigmoid(votes[b][j] + gates.bias[j].item()) >= least
            for i in range(j):
                if not mask[j][i] or not alive[i][b] or not (gate or stage.training):
                    continue
                a = alpha[i, j][b]
                psi = a * sigmoid(a - tau) if stage.weighting.options.gate == "psi" else a
                if not stage.training and stage.weighting.options.inference_weight == "raw":
                    psi = a
                if not stage.training and a < tau + stage.threshold_offset:
                    continue
                is_alive = True
                adjacency[b, j, i] = psi
                total = total + psi * (x[b] if j == 1 else features[i][b])
            alive[j].append(is_alive and gate)
            rows.append(total)
        x_hat = torch.stack(rows)
        if j > 1 and stage.shortcut == "edge":
            x_hat = x_hat.relu()
        if j == last:
            alphas = torch.zeros_like(adjacency)
            for (i, k), values in alpha.items():
                alphas[:, k, i] = torch.tensor(values)
            ran = torch.tensor([alive[k] for k in range(last)]).T  # (B, N - 1): all but the output node
            return x_hat, adjacency, alphas, ran
        feature = stage.nodes[j - 1](x_hat)
        if stage.shortcut == "node":
            shortcut = torch.stack([adjacency[b, 1, 0] * features[0][b] for b in range(len(x))]) if j == 1 else x_hat
            feature = (feature + shortcut).relu()
        features[j] = torch.stack(
            [f if is_alive else torch.zeros_like(f) for f, is_alive in zip(feature, alive[j], strict=True)]
        )
    raise AssertionError("a stage ends with its output node")


TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def sum_by_sample(features: list[Tensor], weights: Tensor, is_open: Tensor | None) -> Tensor:
    """Eq. (3) sample by sample and edge by edge in float64, over open edges only."""
    rows = []
    for b in range(len(weights)):
        total = torch.zeros(features[0].shape[1:], dtype=torch.float64)
        for e, feature in enumerate(features):
            if is_open is None or is_open[b, e]:
                total = total + weights[b, e].double() * feature[b].double()
        rows.append(total)
    return torch.stack(rows)


def draw_case(seed: int, shape: tuple[int, ...], edges: int, dtype: torch.dtype, layout: str, closing: str):
    """Random features, `edges` tensors of `shape`, weights (B, E), and which edges are open, (B, E) or None.

    `layout`: "contiguous", "channels_last" or "strided". `closing`: "none" (no mask), "some", "all" (all edges
    closed) or "no edge" (none closed). Features of closed edges are NaN or infinite.
    """
    generator = torch.Generator().manual_seed(seed)
    batch, channels, height, width = shape
    features = []
    for _ in range(edges):
        if layout == "strided":
            feature = torch.randn(batch, channels, height, 2 * width, generator=generator)[..., ::2]
        else:
            feature = torch.randn(shape, generator=generator)
        feature = feature.to(dtype)
        features.append(feature.to(memory_format=torch.channels_last) if layout == "channels_last" else feature)
    weights = torch.rand(batch, edges, generator=generator, dtype=torch.promote_types(dtype, torch.float32)) + 0.1
    if closing == "none":
        return features, weights, None
    is_open = torch.rand(batch, edges, generator=generator) < {"some": 0.5, "all": 0.0, "no edge": 1.0}[closing]
    for e, feature in enumerate(features):
        feature[~is_open[:, e]] = [torch.nan, torch.inf, -torch.inf][e % 3]
    return features, weights, is_open
