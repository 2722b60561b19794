"""A slow, obvious twin of DynamicGraph, written from Eqs. (3) to (5) and the definition of removal, edge by edge."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dgnet.graph import DynamicGraph


def sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z))


def run_stage_by_edges(stage: DynamicGraph, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The output of a routed stage, its adjacency and its α, with a Python loop over samples and edges. No gradients."""
    last = stage.topology.num_nodes - 1
    mask = stage.topology.mask.tolist()
    adjacency = torch.zeros(len(x), last + 1, last + 1)
    features = {0: stage.input(x)}
    alive = {0: [True] * len(x)}
    alpha: dict[tuple[int, int], list[float]] = {}
    gates = stage.node_gates
    votes = [[0.0] * (last + 1) for _ in x]  # of each sample, for each node's gate
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
            for row, k in enumerate([k for k in out_edges if k != last] if gates is not None and alive[i][b] else []):
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
            return x_hat, adjacency, alphas
        feature = stage.nodes[j - 1](x_hat)
        if stage.shortcut == "node":
            shortcut = torch.stack([adjacency[b, 1, 0] * features[0][b] for b in range(len(x))]) if j == 1 else x_hat
            feature = (feature + shortcut).relu()
        features[j] = torch.stack(
            [f if is_alive else torch.zeros_like(f) for f, is_alive in zip(feature, alive[j], strict=True)]
        )
    raise AssertionError("a stage ends with its output node")
