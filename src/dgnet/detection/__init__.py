"""Object detection: COCO data, Faster R-CNN on any registered network, and its evaluation."""

from dgnet.detection.backbone import Backbone as Backbone
from dgnet.detection.batching import AspectRatioOrder as AspectRatioOrder
from dgnet.detection.batching import DetectionItems as DetectionItems
from dgnet.detection.batching import collate as collate
from dgnet.detection.checkpoint import DetectorCheckpoint as DetectorCheckpoint
from dgnet.detection.checkpoint import load_detector as load_detector
from dgnet.detection.coco import AnnotationCounts as AnnotationCounts
from dgnet.detection.coco import CocoAnnotations as CocoAnnotations
from dgnet.detection.coco import CocoDetection as CocoDetection
from dgnet.detection.coco import CocoImage as CocoImage
from dgnet.detection.coco import Target as Target
from dgnet.detection.coco import flip as flip
from dgnet.detection.coco import read_annotations as read_annotations
from dgnet.detection.config import DetectConfig as DetectConfig
from dgnet.detection.detector import Detector as Detector
from dgnet.detection.draw import draw_detections as draw_detections
from dgnet.detection.evaluate import DetectorEvaluation as DetectorEvaluation
from dgnet.detection.evaluate import evaluate_detector as evaluate_detector
from dgnet.detection.evaluation import BACKENDS as BACKENDS
from dgnet.detection.evaluation import CocoEvaluation as CocoEvaluation
from dgnet.detection.evaluation import DetectionResult as DetectionResult
from dgnet.detection.evaluation import evaluate_results as evaluate_results
from dgnet.detection.evaluation import read_results as read_results
from dgnet.detection.evaluation import write_results as write_results
from dgnet.detection.predict import predict_detections as predict_detections
from dgnet.detection.train import train_detector as train_detector
