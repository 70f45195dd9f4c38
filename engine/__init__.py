"""What the commands at the root are made of; nothing here is imported by the models, the losses or the datasets.

training      from a config to its run: data, student, teachers, steps, checkpoints, reports
evaluation    a model on a dataset
prediction    pictures, folders, video -> detections
comparison    studies: rows, tables, plots
condensing    synthetic sets and their files
onnx_files    export and its checks
web_demo      the views of app.py
runtime       processes, signals, progress, the folder of a run
drawing       boxes, maps, plots
"""
