"""RT-DETR, a detector of queries without non-maximum suppression (arXiv:2304.08069).

rtdetr                    the model: backbone, encoder, decoder; sizes
encoder, decoder          its parts; attention and conv_bn, their layers
hgnetv2, resnet_vd        its backbones
matching, losses          which query learns which object, and what
denoising                 the queries that training makes from the objects themselves
names                     the names of its released weights
"""
