"""Training and evaluation of classifiers, on Lightning."""

from dgnet.training.checkpointing import Interrupted as Interrupted
from dgnet.training.config import TrainConfig as TrainConfig
from dgnet.training.evaluate import Evaluation as Evaluation
from dgnet.training.evaluate import describe_source as describe_source
from dgnet.training.evaluate import evaluate as evaluate
from dgnet.training.evaluate import open_evaluation_data as open_evaluation_data
from dgnet.training.run import is_main_process as is_main_process
from dgnet.training.run import join_processes as join_processes
from dgnet.training.run import read_run as read_run
from dgnet.training.train import train as train
