"""The parts of predict.py: it reads, detects and writes.

predictor  a detector for pictures of any size, with boxes in their pixels
sources    finds and names pictures, videos and webcams
video      reads and writes video frames
window     shows video as it is predicted
files      writes predictions.json and YOLO's text files
"""
