"""The longer texts of the demo's page, and its style sheet."""

STYLE = """<style>
.stMainBlockContainer { padding: 1.1rem 1.6rem 2rem; max-width: 1640px; }
.stAppHeader { background: transparent; pointer-events: none; }
.stMainBlockContainer h1 { font-size: 1.5rem; padding: 0; }
.stMainBlockContainer h2 { font-size: 1.15rem; padding: 0.6rem 0 0; }
[data-testid="stImage"] img { border-radius: 6px; }
[data-testid="stImage"], [data-testid="stImage"] > * { width: 100%; }
.st-key-sides p, .st-key-views p, .st-key-controls [data-testid="stPopover"] p { font-size: 0.875rem; }
.st-key-sides strong { white-space: nowrap; }
.chips { display: flex; flex-wrap: wrap; gap: 0.3rem; }
.chip { font-size: 0.8rem; line-height: 1.35rem; padding: 0 0.5rem; border-radius: 0.7rem; white-space: nowrap; }
.chip-none { box-shadow: inset 0 0 0 1px rgba(128, 128, 128, 0.55); opacity: 0.75; }
</style>"""

EXPLANATION = """
A small detector, the **student**, is trained on labelled pictures. With *distillation* it also learns to agree with a
larger or longer-trained **teacher**, whose weights do not change:

    loss = detection losses(student, labels) + sum of weight x loss(student, teacher)

A teacher's outputs hold more than the labels: how certain each class is, which classes are similar, and where its
feature maps are strong. Adapters that bring the student's maps to the teacher's width are trained too and dropped at
the end, so that the student is as large and as fast as one without a teacher. The table shows whether it paid off.
"""

LATENCY = """
Median, and least to most, of {rounds} rounds in which both models take turns, after one that is not counted. From
letterbox to suppression: one picture, float32, device {device}, threads {threads}. An ONNX file runs on the cpu in its
own precision.
"""

SCORE = "Detections below it are not shown."
OVERLAP = "Of two boxes of one class that overlap more, the better one stays."
NO_SUPPRESSION = f"{OVERLAP} RT-DETR needs no such choice: each of its queries looks for an object of its own."
NO_BOXES = "This page shows no boxes."
