"""Which parameters the optimiser changes with which weight decay and learning rate."""

from __future__ import annotations

from typing import Any

from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import nn

from dgnet.errors import UsageError
from dgnet.graph import find_stages
from dgnet.training._config_optimizer import OptimizerOptions
from dgnet.training._optimizer import IS_ROUTING


def build_parameter_groups(
    network: nn.Module, config: OptimizerOptions, layer_decay: float | None = None
) -> list[dict[str, Any]]:
    """Parameters with and without weight decay; with `layer_decay`, also by layer, each with its share of the learning rate.

    Routers, gates, thresholds and normalisation have groups of their own if an option gives them another decay, learning rate
    or optimiser. With `layer_decay` routers, gates and thresholds always have: no layer's share is applied to them.
    """
    exempt: set[str] = getattr(network, "no_weight_decay", set)()
    groups: list[dict[str, Any]]
    if layer_decay is None:
        groups = param_groups_weight_decay(network, config.weight_decay, no_weight_decay_list=exempt)
    else:
        groups = param_groups_layer_decay(network, config.weight_decay, no_weight_decay_list=exempt, layer_decay=layer_decay)
    stages = find_stages(network)
    weightings = [stage.weighting for stage in stages]
    gates = [stage.node_gates for stage in stages if stage.node_gates is not None]
    has_own = config.router_optimizer != "same"
    deciders = [weighting for weighting in weightings if weighting.reads_features or has_own]
    routing = [parameter for module in (*deciders, *gates) for parameter in module.parameters() if parameter.requires_grad]
    ids = {id(weighting.threshold) for weighting in weightings}
    thresholds = [parameter for parameter in routing if id(parameter) in ids]
    routers = [parameter for parameter in routing if id(parameter) not in ids]
    if has_own and not routing:
        raise UsageError(
            f"--router-optimizer {config.router_optimizer} has no effect: no weight or gate of this network learns"
        )
    decay = config.weight_decay if config.routing_decay == "all" else 0.0
    apart: list[dict[str, Any]] = []
    if config.norm_decay:
        connectivity = {id(p) for module in (*weightings, *gates) for p in module.parameters()}
        for group in groups:
            plain = [p for p in group["params"] if p.ndim <= 1 and id(p) not in connectivity]
            apart.append({**group, "params": plain, "weight_decay": config.weight_decay})
    rate: dict[str, Any] = {}
    if config.router_lr != 1 or layer_decay is not None:
        rate["lr_scale"] = config.router_lr
    if config.router_optimizer == "adamw" and "muon" in config.optimizer:
        rate["use_fallback"] = True  # timm's Muon then uses AdamW
    elif config.router_optimizer != "same":
        rate[IS_ROUTING] = True
    if config.routing_decay != "weights":
        apart.append({"params": routers, "weight_decay": decay, **rate})
    elif rate:
        undecayed = {id(p) for name, p in network.named_parameters() if name in exempt}
        matrices, biases = (
            [p for p in routers if (p.ndim > 1 and id(p) not in undecayed) is is_matrix] for is_matrix in (True, False)
        )
        apart.append({"params": matrices, "weight_decay": config.weight_decay, **rate})
        apart.append({"params": biases, "weight_decay": 0.0, **rate})
    if config.routing_decay == "all" or config.threshold_lr != 1 or layer_decay is not None or IS_ROUTING in rate:
        marked = {IS_ROUTING: True} if IS_ROUTING in rate else {}
        apart.append({"params": thresholds, "weight_decay": decay, "lr_scale": config.threshold_lr, **marked})
    moved = {id(parameter) for group in apart for parameter in group["params"]}
    for group in groups:
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in moved]
    return [group for group in [*groups, *apart] if group["params"]]
