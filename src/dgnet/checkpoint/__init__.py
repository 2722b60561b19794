"""Checkpoints, and files of bare weights: what they hold, and how it is fitted to a network."""

from typing import TYPE_CHECKING

from dgnet._lazy import lazy_names

if TYPE_CHECKING:
    from dgnet.checkpoint._bare_weights import create_pretrained as create_pretrained
    from dgnet.checkpoint._bare_weights import find_class_names as find_class_names
    from dgnet.checkpoint._bare_weights import open_model as open_model
    from dgnet.checkpoint._bare_weights import read_static as read_static
    from dgnet.checkpoint._bare_weights import read_weights as read_weights
    from dgnet.checkpoint._checkpoint import CLASSIFY as CLASSIFY
    from dgnet.checkpoint._checkpoint import DETECT as DETECT
    from dgnet.checkpoint._checkpoint import IMPORTS as IMPORTS
    from dgnet.checkpoint._checkpoint import NOT_STORED as NOT_STORED
    from dgnet.checkpoint._checkpoint import Checkpoint as Checkpoint
    from dgnet.checkpoint._checkpoint import Described as Described
    from dgnet.checkpoint._checkpoint import RunData as RunData
    from dgnet.checkpoint._checkpoint import describe_network as describe_network
    from dgnet.checkpoint._checkpoint import load_checkpoint as load_checkpoint
    from dgnet.checkpoint._checkpoint import read_run_data as read_run_data
    from dgnet.checkpoint._files import DESCRIPTION as DESCRIPTION
    from dgnet.checkpoint._files import STEPS as STEPS
    from dgnet.checkpoint._files import damaged as damaged
    from dgnet.checkpoint._files import find_checkpoint as find_checkpoint
    from dgnet.checkpoint._files import read_tensors as read_tensors
    from dgnet.checkpoint._files import save_tensors as save_tensors
    from dgnet.checkpoint._fit import Loaded as Loaded
    from dgnet.checkpoint._fit import find_resized as find_resized
    from dgnet.checkpoint._fit import fit_weights as fit_weights
    from dgnet.checkpoint._fit import load_state as load_state
    from dgnet.checkpoint._fit import load_weights as load_weights
else:
    __getattr__, __dir__, __all__ = lazy_names(__name__)
