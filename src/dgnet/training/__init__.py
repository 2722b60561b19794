"""Training and evaluation of classifiers, on Lightning."""

from dgnet.training.config import TrainConfig as TrainConfig
from dgnet.training.evaluate import Evaluation as Evaluation
from dgnet.training.evaluate import evaluate as evaluate
from dgnet.training.train import train as train
