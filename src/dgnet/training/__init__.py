"""Training of classifiers, with Lightning."""

from typing import TYPE_CHECKING

from dgnet._lazy import lazy_names

if TYPE_CHECKING:
    from dgnet.training._budget import Budget as Budget
    from dgnet.training._checkpointing import Interrupted as Interrupted
    from dgnet.training._config import RunConfig as RunConfig
    from dgnet.training._config import TrainConfig as TrainConfig
    from dgnet.training._data_module import RunDataModule as RunDataModule
    from dgnet.training._head import describe_untrained as describe_untrained
    from dgnet.training._head import settle_head as settle_head
    from dgnet.training._history import read_history as read_history
    from dgnet.training._launcher import check_launcher as check_launcher
    from dgnet.training._loading import EndlessOrder as EndlessOrder
    from dgnet.training._loading import TrainingLoader as TrainingLoader
    from dgnet.training._loading import TrainingOrder as TrainingOrder
    from dgnet.training._module import RunModule as RunModule
    from dgnet.training._module import take_figures as take_figures
    from dgnet.training._processes import is_main_process as is_main_process
    from dgnet.training._processes import join_processes as join_processes
    from dgnet.training._run import Run as Run
    from dgnet.training._run import RunResult as RunResult
    from dgnet.training._run import open_run as open_run
    from dgnet.training._run import read_run as read_run
    from dgnet.training._run import with_absolute_paths as with_absolute_paths
    from dgnet.training._train import train as train
else:
    __getattr__, __dir__, __all__ = lazy_names(__name__)
