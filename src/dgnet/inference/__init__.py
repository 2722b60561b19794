"""Networks as they are deployed."""

from dgnet.inference.fold import fold_batch_norms as fold_batch_norms
from dgnet.inference.sparse import can_skip as can_skip
from dgnet.inference.sparse import set_mode as set_mode
