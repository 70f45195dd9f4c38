"""Models that only ever teach: DINOv2, CLIP, RT-DETR, and what remembers their answers."""
