"""The size of the images that a detector with strides 8, 16 and 32 takes."""

from torch import Tensor


def check_image_size(images: Tensor) -> tuple[int, int]:
    """(H, W) of images (B, 3, H, W); ValueError unless both are positive multiples of 32, the coarsest stride."""
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images have shape {tuple(images.shape)}, expected (B, 3, H, W)")
    height, width = images.shape[2:]
    if height % 32 or width % 32 or not height or not width:
        raise ValueError(f"images are {height}x{width} pixels (height x width), expected multiples of 32")
    return height, width
