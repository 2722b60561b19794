"""From a source string to labelled images, and from an image to a tensor."""

from dgnet.data.images import IGNORED as IGNORED
from dgnet.data.images import BadImages as BadImages
from dgnet.data.images import ImageDataset as ImageDataset
from dgnet.data.images import TrainingItems as TrainingItems
from dgnet.data.images import decode as decode
from dgnet.data.images import fold as fold
from dgnet.data.images import hold_out as hold_out
from dgnet.data.images import read_image as read_image
from dgnet.data.preprocessing import Preprocessing as Preprocessing
from dgnet.data.shards import ShardStream as ShardStream
from dgnet.data.shards import expand_shards as expand_shards
from dgnet.data.shards import is_stream as is_stream
from dgnet.data.sources import EVALUATION as EVALUATION
from dgnet.data.sources import TRAIN as TRAIN
from dgnet.data.sources import open_dataset as open_dataset
from dgnet.data.sources import open_train_and_evaluation as open_train_and_evaluation
