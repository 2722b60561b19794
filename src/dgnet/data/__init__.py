"""Labelled images from a source string, their preprocessing, and loaders of batches."""

from dgnet.data._images import IGNORED as IGNORED
from dgnet.data._images import BadImages as BadImages
from dgnet.data._images import ImageDataset as ImageDataset
from dgnet.data._images import TrainingItems as TrainingItems
from dgnet.data._images import decode as decode
from dgnet.data._images import hold_out as hold_out
from dgnet.data._images import mix_seed as mix_seed
from dgnet.data._images import read_image as read_image
from dgnet.data._images import seed_generators as seed_generators
from dgnet.data._loading import EvaluationLoader as EvaluationLoader
from dgnet.data._loading import EvaluationOrder as EvaluationOrder
from dgnet.data._loading import build_loader as build_loader
from dgnet.data._loading import worker_options as worker_options
from dgnet.data._preprocessing import Preprocessing as Preprocessing
from dgnet.data._shards import ShardStream as ShardStream
from dgnet.data._shards import expand_shards as expand_shards
from dgnet.data._shards import is_stream as is_stream
from dgnet.data._sources import EVALUATION as EVALUATION
from dgnet.data._sources import TRAIN as TRAIN
from dgnet.data._sources import map_labels as map_labels
from dgnet.data._sources import open_dataset as open_dataset
from dgnet.data._sources import open_train_and_evaluation as open_train_and_evaluation
