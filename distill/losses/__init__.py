"""Distillation losses: pure functions of tensors, and modules for the few that train something. No models, no configs.

features       maps: MSE, cosine, CWD, PKD, attention, score-weighted L2
masks          where to imitate: boxes, anchors (FGFI), positives, class scores; masked and decoupled MSE in masked
fgd, mgd       focal and global distillation; masked generation
relations      between locations and between objects
logits         classes: KL, quality focal, DKD, DIST, soft targets
localization   distributions of box edges
crosskd        the student's maps through the rest of the teacher's head
box_classes    classes of given boxes, sigmoid or softmax on either side
"""
