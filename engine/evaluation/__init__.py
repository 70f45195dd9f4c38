"""Measures a detector on a dataset, for train.py and eval.py. The protocols themselves are in metrics/.

measuring      a model on an index; detections against ground truth
cross_dataset  a detector on a dataset of other classes
"""
