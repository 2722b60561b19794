"""Object detection: data in COCO's format, Faster R-CNN on any registered network, and its evaluation."""

from typing import TYPE_CHECKING

from dgnet._lazy import lazy_names

if TYPE_CHECKING:
    from dgnet.detection._average_precision import BACKENDS as BACKENDS
    from dgnet.detection._average_precision import CocoEvaluation as CocoEvaluation
    from dgnet.detection._average_precision import DetectionResult as DetectionResult
    from dgnet.detection._average_precision import evaluate_results as evaluate_results
    from dgnet.detection._average_precision import read_results as read_results
    from dgnet.detection._average_precision import write_results as write_results
    from dgnet.detection._backbone import Backbone as Backbone
    from dgnet.detection._batching import AspectRatioOrder as AspectRatioOrder
    from dgnet.detection._batching import DetectionItems as DetectionItems
    from dgnet.detection._batching import collate as collate
    from dgnet.detection._checkpoint import DetectorCheckpoint as DetectorCheckpoint
    from dgnet.detection._checkpoint import describe_detector as describe_detector
    from dgnet.detection._checkpoint import load_detector as load_detector
    from dgnet.detection._coco import AnnotationCounts as AnnotationCounts
    from dgnet.detection._coco import CocoAnnotations as CocoAnnotations
    from dgnet.detection._coco import CocoDetection as CocoDetection
    from dgnet.detection._coco import CocoImage as CocoImage
    from dgnet.detection._coco import Target as Target
    from dgnet.detection._coco import flip as flip
    from dgnet.detection._coco import read_annotations as read_annotations
    from dgnet.detection._config import DetectConfig as DetectConfig
    from dgnet.detection._detector import Detector as Detector
    from dgnet.detection._draw import draw_detections as draw_detections
    from dgnet.detection._evaluate import DetectorEvaluation as DetectorEvaluation
    from dgnet.detection._evaluate import evaluate_detector as evaluate_detector
    from dgnet.detection._predict import predict_detections as predict_detections
    from dgnet.detection._train import train_detector as train_detector
else:
    __getattr__, __dir__, __all__ = lazy_names(__name__)
