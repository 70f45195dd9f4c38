"""A detector measured on a dataset, for train.py and eval.py; the protocols themselves are in metrics/.

measuring      a model on an index, detections against ground truth
class_names    which classes of two lists mean the same
cross_dataset  a detector on a dataset of other classes
"""
