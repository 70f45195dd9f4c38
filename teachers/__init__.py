"""Models that are only used as teachers: DINOv2, CLIP, RT-DETR; and a cache of their outputs on disk."""
