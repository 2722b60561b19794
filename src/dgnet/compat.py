"""Private names of other libraries."""

from __future__ import annotations

import torch
import torch._dynamo.source

DYNAMO_READS_CONTEXT_VARS = hasattr(torch._dynamo.source, "ContextVarGetSource")
"""Whether code under `torch.compile` may read a `ContextVar`."""


def is_in_backward() -> bool:
    """Whether the backward pass runs now, as where a checkpointed forward is computed again."""
    return torch._C._current_graph_task_id() != -1


BATCH_NORMS = (torch.nn.modules.batchnorm._BatchNorm,)
"""All kinds of batch normalisation."""
