"""Run a network once over a data set (`run_pass`), with meters that compute figures from each batch."""

from dgnet.evaluation._accuracy import Accuracy as Accuracy
from dgnet.evaluation._evaluate import Evaluation as Evaluation
from dgnet.evaluation._evaluate import EvaluationMeters as EvaluationMeters
from dgnet.evaluation._evaluate import evaluate as evaluate
from dgnet.evaluation._executed import ExecutedCost as ExecutedCost
from dgnet.evaluation._images import ImageByImage as ImageByImage
from dgnet.evaluation._images import ImageFigures as ImageFigures
from dgnet.evaluation._images import image_figures as image_figures
from dgnet.evaluation._means import Means as Means
from dgnet.evaluation._pass import Batch as Batch
from dgnet.evaluation._pass import Meter as Meter
from dgnet.evaluation._pass import Variant as Variant
from dgnet.evaluation._pass import find_image_size as find_image_size
from dgnet.evaluation._pass import observe_batch as observe_batch
from dgnet.evaluation._pass import run_pass as run_pass
from dgnet.evaluation._ranks import find_ranks as find_ranks
from dgnet.evaluation._source import describe_source as describe_source
from dgnet.evaluation._source import open_evaluation_data as open_evaluation_data
from dgnet.evaluation._wiring import WiringStatistics as WiringStatistics
from dgnet.evaluation._wiring import flatten_edges as flatten_edges
