"""Training of classifiers, on Lightning."""

from dgnet.training._checkpointing import Interrupted as Interrupted
from dgnet.training._config import TrainConfig as TrainConfig
from dgnet.training._run import is_main_process as is_main_process
from dgnet.training._run import join_processes as join_processes
from dgnet.training._run import read_run as read_run
from dgnet.training._train import train as train
