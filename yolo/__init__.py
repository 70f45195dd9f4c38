"""YOLOv8, YOLOv5 and YOLOv5u.

yolov8          the anchor-free detector, top to bottom
yolov5          the detector with anchors; YOLOv5u
layers          blocks of both
assigners       which location learns which object
losses          the terms of both heads, and the decoding of their boxes
taps            what distillation takes besides the predictions
released_names  names of the released weights -> ours
"""
