"""The parts of the commands at the root, and one command. Models, losses and datasets import nothing from here.

training      from a config to its run: data, student, teachers, steps, checkpoints, reports
evaluation    measures a model on a dataset
prediction    pictures, folders and video -> detections
comparison    studies: rows, tables, plots
condensing    synthetic sets and their files
pruning       the command that makes a detector narrower
search        the command that searches widths and depths
onnx_files    export and its checks
web_demo      the views of app.py
command_line  what train.py prints before it trains: lists, a first config
from_python   the parts of retort.py
runtime       processes, signals, progress, the folder of a run
drawing       boxes, maps, plots
"""
