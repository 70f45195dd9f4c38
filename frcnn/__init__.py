"""Faster R-CNN on a feature pyramid.

faster_rcnn             the detector, in the order of the paper's figure
resnet, mobilenet, vit  backbones
pretrained              their weights of image classification
fpn, rpn, heads         pyramid, region proposals, second stage
anchors, matching       boxes as offsets; which box learns which object
losses                  its four losses
norm                    BatchNorm that can be frozen, LayerNorm over channels
"""
