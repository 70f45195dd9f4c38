"""What train.py is made of, in the order a run meets it.

checks        what a config and the files it names show before a picture is listed
student       the detector that is trained, and where it starts
building      from a config to data splits, student, teachers, criterion, optimizer, EMA
teaching      the teachers: from the config to frozen models, and what they say of a batch
batch_norms   batches too small for a BatchNorm, found before the run
optimization  parameter groups, optimizers, schedules, the running mean of the weights
dry_run       what a run would do, from one batch
balance       the distillation terms beside the detection loss
state         where a run is, and what may differ when it is resumed
steps         what stands around a training step
saving        last.pt, written and read back
reporting     the row of an epoch, best.pt, the final test
exits         exit codes, and the errors they stand for
run_pictures  what the model finds, and what the maps hold
"""
