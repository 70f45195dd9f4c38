"""The parts of train.py, in the order in which a run uses them.

idle_terms    leaves out terms of weight 0, and says so
checks        mistakes in a config and its files that are found before any picture is listed
student       the detector that is trained, with its start weights
splits        the pictures to train on, with and without labels, and those to measure on
pseudo_boxes  a teacher's detections as boxes of pictures without labels
building      builds student, teachers, criterion, optimizer and EMA from a config and its pictures
inputs        digests of the labels and weights that a run reads
teaching      builds the frozen teachers, and computes their outputs for a batch
batch_norms   finds batches that are too small for BatchNorm
optimization  parameter groups, the choice of an optimizer, schedules, the running mean of the weights
optimizers    SGD and AdamW
starting      a new run in its folder, or one that is restored from last.pt
step          augmentation, the student's own losses, learning rates
int8          a student that is fine-tuned for int8
dry_run       the losses and gradients of one batch, printed
flops         what a training step costs, counted from a config
balance       the distillation terms compared with the detection loss
state         how far a run is, and which keys may differ when it is resumed
saving        writes last.pt and the weights to hand on
reporting     the row of an epoch, the best weights, the final test
exits         errors of PyTorch and numbers not finite, which end a run
run_pictures  pictures of detections and of the compared maps
"""
