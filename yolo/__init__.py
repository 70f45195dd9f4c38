"""YOLOv8, YOLOv5, YOLOv5u and YOLOv7-tiny.

yolov8          the anchor-free detector, top to bottom
yolov5          the detector with anchors; YOLOv5u
yolov7          YOLOv7-tiny: another backbone and neck for the detector with anchors
layers          blocks that they share
assigners       which location learns which object
simota          the same for YOLOv7
losses          the terms of both heads, and the decoding of their boxes
taps            what distillation takes besides the predictions
released_names  names of the released weights -> ours
"""
