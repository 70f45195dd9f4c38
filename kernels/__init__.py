"""Fast kernels of single operations, each beside its specification in plain PyTorch."""
