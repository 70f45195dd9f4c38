"""What predict.py reads and writes.

sources  pictures, folders, patterns, video files and webcams, found and named
video    frames in and out
files    predictions.json and YOLO's text files
"""
