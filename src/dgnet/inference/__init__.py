"""Networks as they are deployed."""

from dgnet.inference.compile import compile_network as compile_network
from dgnet.inference.export import export_network as export_network
from dgnet.inference.fold import fold_batch_norms as fold_batch_norms
from dgnet.inference.sparse import can_skip as can_skip
from dgnet.inference.sparse import find_threshold_offset as find_threshold_offset
from dgnet.inference.sparse import set_mode as set_mode
from dgnet.inference.sparse import set_threshold_offset as set_threshold_offset
from dgnet.inference.speed import measure_speed as measure_speed
from dgnet.inference.speed import time_alternating as time_alternating
