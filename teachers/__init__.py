"""Models that are only used as teachers, and a cache of their outputs on disk.

dinov2                      DINOv2
clip                        CLIP: images and texts as vectors; clip_tokenizer, clip_prompts, clip_regions
rtdetr                      RT-DETR: rtdetr_encoder, rtdetr_decoder, rtdetr_names
hgnetv2, resnet_vd, conv_bn the backbones of RT-DETR and their common layer
output_cache                outputs on disk
"""
