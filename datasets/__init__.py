"""Pascal VOC, COCO, YOLO text, KITTI and generated shapes, read into one DatasetIndex.

open                        open_dataset; index: what it returns
voc, coco, yolo_txt, kitti  the readers (voc_xml, yolo_rows); shapes draws its pictures
kept_index                  the index of a COCO set in a file, for a second start
rows, values, text_lines    what the readers share: usable objects, flags and numbers, lines
text_table                  tables of plain text
folders, images, letterbox  files of a folder; pixels of a picture; the square that a model gets
unlabelled                  few labelled pictures and many without labels
class_names, subset         classes of two lists by name; some classes of a set
loader, augment             batches; their augmentation
scan, overlap               faults of a set; pictures that two splits share
split, near_duplicates      disjoint splits of one set
convert, download           other formats; public sets and weights
enhance                     better images before detection
"""

from datasets.index import ANY_CLASS, DatasetIndex, Fault, Sample
from datasets.open import open_dataset

__all__ = ["ANY_CLASS", "DatasetIndex", "Fault", "Sample", "open_dataset"]
