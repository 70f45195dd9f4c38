"""Fast kernels of single operations, each beside its specification in plain PyTorch.

backend                                              which of the two runs
nms, nms_triton                                      non-maximum suppression
roi_align, roi_align_triton                          RoIAlign
deformable_attention                                 attention to a few points of a pyramid
channel_wise_kl, temperature_kl, sigmoid_kl          fused losses of logits and maps; rows: what they share
masked_mse                                           squared difference of two maps under a mask
precomputed_gradient                                 autograd for a loss that computes its gradient in the forward pass
"""
