"""Fast paths of single operations, each beside the plain PyTorch function that specifies it."""
