"""Parts of a network that are not trained, for the whole run or its first epochs."""

from __future__ import annotations

from timm.models import group_parameters
from torch import nn

from dgnet.errors import UsageError
from dgnet.graph import find_stages
from dgnet.models import TimmNetwork, classifier_prefixes
from dgnet.training._config_finetuning import HEAD


class Freezing:
    """Keeps parameters, and the statistics of their normalisation layers, for `epochs`; for the whole run if that is None.

    `what`: "head" keeps all but the classifier, a number the first groups of the network's `group_matcher`. Routers and gates
    are kept if all blocks of their stage are. What is kept for the whole run needs no gradient from now on, and gets no group
    in the optimiser.

    Raises UsageError if nothing would be left to train, and for a network that does not say what its groups are.
    """

    def __init__(self, network: TimmNetwork, model: str, what: str, epochs: int | None = None) -> None:
        self.network, self.epochs = network, epochs
        self.names = _find_names(network, model, what)
        self._is_frozen: bool | None = None
        self._norms: list[nn.Module] | None = None
        if epochs is None:
            self._allow_gradients(False)

    def apply(self, epoch: int, needs_gradients: bool) -> None:
        """Freeze or release, as `epoch`, counted from 0, says. To be called before each step.

        `needs_gradients`: whether a wrapper of the network, such as DDP, expects a gradient of each parameter in every step.
        They are then computed, and `drop_gradients` removes them.
        """
        is_frozen = self.epochs is None or epoch < self.epochs
        if self._norms is None:
            self._norms = self._find_norms()  # not before: --sync-bn replaces the layers when training starts
        if is_frozen or self._is_frozen:
            for module in self._norms:
                module.train(not is_frozen)  # Lightning may have put them in training mode
        if is_frozen == self._is_frozen:
            return
        if self.epochs is not None and not needs_gradients:
            self._allow_gradients(not is_frozen)
        self._is_frozen = is_frozen

    def drop_gradients(self) -> None:
        """Remove the gradients of what is frozen now: optimisers skip a parameter without one."""
        if self._is_frozen:
            for name, parameter in self.network.named_parameters():
                if name in self.names:
                    parameter.grad = None

    def describe(self) -> str:
        """One line on what is frozen, for how long."""
        parameters = dict(self.network.named_parameters())
        numbers = [sum(parameters[name].numel() for name in names) for names in (self.names, parameters)]
        parts = list(dict.fromkeys(name.partition(".")[0] for name in parameters if name in self.names))
        span = "in the whole run" if self.epochs is None else f"in the first {self.epochs} epoch{'s' * (self.epochs != 1)}"
        return f"not trained {span}: {numbers[0]:,} of {numbers[1]:,} parameters ({', '.join(parts)})"

    def _allow_gradients(self, allows: bool) -> None:
        for name, parameter in self.network.named_parameters():
            if name in self.names:
                parameter.requires_grad_(allows)

    def _find_norms(self) -> list[nn.Module]:
        """The layers with running statistics that lie in a module all of whose parameters are frozen."""
        found: dict[int, nn.Module] = {}
        for name, module in self.network.named_modules():
            own = {f"{name}.{parameter}" for parameter, _ in module.named_parameters()} if name else {""}
            if own and own <= self.names:
                found |= {id(part): part for part in module.modules() if getattr(part, "running_mean", None) is not None}
        return list(found.values())


def _find_names(network: TimmNetwork, model: str, what: str) -> set[str]:
    """The names of the parameters that `what` freezes."""
    heads = classifier_prefixes(network)
    if what == HEAD:
        if not heads:
            raise UsageError(f"--freeze head: {model} does not say which part is its classifier; give a number of groups")
        return {name for name, _ in network.named_parameters() if not name.startswith(heads)}
    if not hasattr(network, "group_matcher"):
        raise UsageError(f"--freeze {what}: {model} does not say what its groups are; use --freeze head")
    groups: dict[int, list[str]] = group_parameters(network, network.group_matcher(coarse=True))
    if int(what) >= len(groups):
        raise UsageError(
            f"--freeze {what} leaves nothing to train: {model} has {len(groups)} groups; use {len(groups) - 1} or less"
        )
    return _without_shared_routing(network, {name for group in sorted(groups)[: int(what)] for name in groups[group]})


def _without_shared_routing(network: nn.Module, names: set[str]) -> set[str]:
    """`names` without the routers and gates of stages that have a node whose name is not among them.

    In a converted network the groups are blocks, and the routers of a stage decide about all its blocks.
    """
    parameters = {id(parameter): name for name, parameter in network.named_parameters()}
    for stage in find_stages(network):
        if not all(parameters[id(parameter)] in names for parameter in stage.nodes.parameters()):
            routing = [stage.weighting] if stage.node_gates is None else [stage.weighting, stage.node_gates]
            names = names - {parameters[id(parameter)] for part in routing for parameter in part.parameters()}
    return names
