"""Code of a user's own, as the text of a module."""

HALVES = '''
import torch
from torch import nn

from dgnet.graph import Weighting


class Halves(Weighting):
    """Every edge weighs a learned value, which starts at one half."""

    reads_features = False

    def __init__(self, topology, channels):
        super().__init__(topology, channels)
        self.value = nn.Parameter(torch.tensor(0.5))

    def shared_alpha(self, node):
        return self.value.expand(len(self.topology.senders(node)))
'''
