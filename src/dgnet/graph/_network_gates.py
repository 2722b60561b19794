"""Block gates of a whole network that are decided at once, from the feature of the first stage's input node.

Letters: B batch, N nodes of a stage, G gates of the network, C channels, H and W height and width.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dgnet.errors import UsageError
from dgnet.graph._gating import GateOptions, NodeGates, least_logit
from dgnet.graph._pooling import pool_feature, without_autocast
from dgnet.graph._router import PooledLinear
from dgnet.graph._topology import Topology

_POLICY_STEPS = 3
"""Convolutions of a convolutional policy, each of which halves height and width."""


class GatePolicy(nn.Module):
    """The votes for all gates of a network from one feature, (B, C, H, W) -> (B, G).

    `form`: "linear", a linear layer on the pooled feature; "convolutional", three 3×3 convolutions of stride 2 before it, which
    double the channels from the second on, as the policy network of BlockDrop (Wu et al., CVPR 2018) reads the image.
    """

    def __init__(self, channels: int, num_gates: int, options: GateOptions) -> None:
        super().__init__()
        self.std = options.node_gate_std
        self.trunk = nn.Sequential()
        if options.gate_policy == "convolutional":
            for step in range(_POLICY_STEPS):
                wider = channels if step == 0 else 2 * channels
                # Without batch statistics: an image's gates do not depend on the others of its batch.
                self.trunk.extend([nn.Conv2d(channels, wider, 3, 2, 1, bias=False), nn.GroupNorm(1, wider), nn.ReLU()])
                channels = wider
        self.head = PooledLinear(channels, num_gates, bias=False, norm=options.router_norm)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Reset the parameters to their initial values."""
        for module in self.trunk:
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.GroupNorm):
                module.reset_parameters()
        nn.init.normal_(self.head.weight, std=self.std)

    def forward(self, feature: Tensor) -> Tensor:
        # Float32 under autocast too, as in all routing.
        with without_autocast(feature):
            votes: Tensor = self.head(pool_feature(self.trunk(feature.to(self.head.weight.dtype))))
            return votes


class PassedDecisions:
    """What the first stage has decided for the other stages in a forward pass. Each thread has its own.

    The stages of a network share one such object. Each stage takes its decisions once. A copy starts empty.
    """

    def __init__(self) -> None:
        self._held: dict[tuple[int, str, int], Tensor] = {}  # of a thread: a kind of decision, for a stage

    def put(self, kind: str, decisions: Sequence[Tensor]) -> None:
        """Store decisions of a kind for each stage, (B, gates of the stage)."""
        thread = _thread()
        for stage, own in enumerate(decisions):
            self._held[thread, kind, stage] = own

    def take(self, kind: str, stage: int) -> Tensor | None:
        """The decisions for a stage, counted from 0; None if the first stage has not run before it."""
        return self._held.pop((_thread(), kind, stage), self._held.pop((0, kind, stage), None))

    def see(self, kind: str, stage: int) -> Tensor:
        """What `take` would return, which must be there."""
        return self._held[_thread(), kind, stage]

    def clear(self) -> None:
        """Forget what another pass of this thread has left, if it stopped before the last stage."""
        thread = _thread()
        for key in list(self._held):  # a copy: other threads change the dictionary meanwhile
            if key[0] == thread:
                self._held.pop(key, None)

    def __reduce__(self) -> tuple[Any, ...]:
        return PassedDecisions, ()  # also for copies


def _thread() -> int:
    """A number of this thread; 0 in compiled code, which cannot ask."""
    return 0 if torch.compiler.is_compiling() else threading.get_ident()


class NetworkGates(NodeGates):
    """The gates of one stage, whose votes the policy of the network's first stage predicts: `gate_reads="network"`.

    A stage is linked to the others of its network by `link_gates`.
    """

    def __init__(self, topology: Topology, channels: int, options: GateOptions) -> None:
        self.policy: GatePolicy | None = None  # of the first stage only
        super().__init__(topology, channels, options)
        self.options, self.channels = options, channels
        self.linked: tuple[NetworkGates, ...] = ()  # those of each stage of the network
        self.stage = 0
        self.passed = PassedDecisions()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.policy is not None:
            self.policy.reset_parameters()

    @property
    def serves_others(self) -> bool:
        return self.policy is not None

    @property
    def readers(self) -> list[nn.Linear]:
        return [] if self.policy is None else [self.policy.head]

    def predict(self, node: int, feature: Tensor) -> Tensor:
        if self.policy is not None:
            self.passed.clear()
            self.passed.put("votes", self._split(self.policy(feature)))
        votes = self.passed.take("votes", self.stage)
        if votes is None or len(votes) != len(feature):
            raise UsageError(
                "gate_reads='network': the gates of this stage are decided by the network's first stage, which has not run on"
                " these images; run the whole network"
            )
        return votes

    def find_open_gates(self, votes: Tensor, offset: float) -> Tensor:
        # The first stage asks for all stages, so that the CPU waits once for the whole network.
        if self.policy is not None:
            others = [self.passed.see("votes", own.stage) for own in self.linked[1:]]
            logits = torch.cat([votes, *others], dim=1) + torch.cat([own.bias[1:-1] for own in self.linked]).to(votes)
            self.passed.put("open", self._split((logits >= least_logit(offset)).cpu()))
        opened = self.passed.take("open", self.stage)
        return super().find_open_gates(votes, offset) if opened is None else opened

    def _split(self, decisions: Tensor) -> tuple[Tensor, ...]:
        """Decisions for all gates of the network, (B, G), stage by stage."""
        parts: tuple[Tensor, ...] = decisions.split([len(own.topology.blocks) for own in self.linked], dim=1)
        return parts


def link_gates(gates: Sequence[NodeGates | None]) -> None:
    """Give the first stage a policy for the gates of all stages, if these are decided at once. `gates`: of each stage."""
    linked = [own for own in gates if isinstance(own, NetworkGates)]
    passed = PassedDecisions()
    for stage, own in enumerate(linked):
        own.stage, own.passed, own.linked = stage, passed, tuple(linked)
    if linked:
        first = linked[0]
        policy = GatePolicy(first.channels, sum(len(own.topology.blocks) for own in linked), first.options)
        first.policy = policy.to(first.bias.device, first.bias.dtype).train(first.training)
