"""What predict.py is made of: it reads, detects and writes.

predictor  a detector for pictures of any size, answers in their pixels
sources    pictures, folders, patterns, video files and webcams, found and named
video      frames in and out
files      predictions.json and YOLO's text files
"""
