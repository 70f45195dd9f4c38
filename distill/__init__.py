"""Distillation: from the terms of a config to named losses. Models are passed in, and none is imported.

terms            a config's `loss` -> its function
criterion        all terms of a run, weighted and scheduled; refuses a term that could never act
checks           what a term's keys alone show to be wrong
batch            what both models computed, for all images of a batch or some of them
trained_parts    what a term trains beside the student
probing          tries a term before training
term_inputs      what a term computes from
outputs          parts of a model's output by name
given_boxes      the boxes that both models classify, and their class logits
adapters         layers that bring a student's map to the teacher's width
teacher_weights  weights of several teachers, batch by batch
losses/          pure functions of tensors
condense/        dataset distillation
pruning/         narrower models out of wide ones
"""
