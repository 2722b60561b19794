"""Run networks as they are deployed: sparse mode, folding, compilation, export, measured speed."""

from dgnet.inference._compile import compile_network as compile_network
from dgnet.inference._compile import without_gradients as without_gradients
from dgnet.inference._export import FORMATS as FORMATS
from dgnet.inference._export import check_export as check_export
from dgnet.inference._export import export_network as export_network
from dgnet.inference._export import require_packages as require_packages
from dgnet.inference._export import save_export as save_export
from dgnet.inference._fold import fold_batch_norms as fold_batch_norms
from dgnet.inference._native import EXECUTORS as EXECUTORS
from dgnet.inference._native import Executor as Executor
from dgnet.inference._native import find_executor as find_executor
from dgnet.inference._native import set_sparse as set_sparse
from dgnet.inference._sparse import MODES as MODES
from dgnet.inference._sparse import can_skip as can_skip
from dgnet.inference._sparse import find_threshold_offset as find_threshold_offset
from dgnet.inference._sparse import set_mode as set_mode
from dgnet.inference._sparse import set_threshold_offset as set_threshold_offset
from dgnet.inference._speed import deploy as deploy
from dgnet.inference._speed import measure_speed as measure_speed
from dgnet.inference._timing import Step as Step
from dgnet.inference._timing import quartiles as quartiles
from dgnet.inference._timing import synchronize as synchronize
from dgnet.inference._timing import time_alternating as time_alternating
from dgnet.inference._timing import time_step as time_step
