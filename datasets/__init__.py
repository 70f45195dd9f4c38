"""Pascal VOC, COCO, YOLO text, KITTI and generated shapes, read into one DatasetIndex."""

from datasets.index import ANY_CLASS, DatasetIndex, Fault, Sample
from datasets.open import open_dataset

__all__ = ["ANY_CLASS", "DatasetIndex", "Fault", "Sample", "open_dataset"]
