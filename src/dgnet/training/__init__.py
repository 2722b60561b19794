"""Training of classifiers, with Lightning."""

from typing import TYPE_CHECKING

from dgnet._lazy import lazy_names

if TYPE_CHECKING:
    from dgnet.training._checkpointing import Interrupted as Interrupted
    from dgnet.training._config import TrainConfig as TrainConfig
    from dgnet.training._processes import is_main_process as is_main_process
    from dgnet.training._processes import join_processes as join_processes
    from dgnet.training._run import read_run as read_run
    from dgnet.training._train import train as train
else:
    __getattr__, __dir__, __all__ = lazy_names(__name__)
