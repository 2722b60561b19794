"""Networks as they are deployed."""

from dgnet.inference.fold import fold_batch_norms as fold_batch_norms
