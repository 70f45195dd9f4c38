"""Measure detections against ground truth: numpy on flat arrays, no model.

tables    the two inputs, GroundTruth and DetectionTable
coco      the COCO protocol: 12 numbers, per class, per area, at each IoU
voc       Pascal VOC average precision, 11-point (2007) and area (2010 and later)
report    precision, recall and F1 at a threshold, curves, confusion matrix, the printed tables
matching  shared by them: overlapping pairs, and the greedy assignment of the COCO protocol
files     ground truth and detections from COCO JSON, VOC XML and text files (coco_files, text_files), by the readers of
          datasets/; picture_names and annotations find the image and the class of a detection
"""
