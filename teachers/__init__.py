"""Models that are only used as teachers, and a cache of their outputs on disk.

dinov2                      DINOv2
clip                        CLIP: images and texts as vectors; clip_tokenizer, clip_prompts, clip_regions
output_cache                outputs on disk
"""
