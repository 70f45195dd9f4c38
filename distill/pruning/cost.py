"""What a detector of given widths costs: floating-point operations and parameters, without building it."""

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from layers.channel_groups import STAYS, ChannelGroups
from layers.widths import axis_parts


def flops_of_widths(
    state: Mapping[str, Tensor], groups: ChannelGroups, *, image_size: int, regions: int = 0
) -> Callable[[Mapping[str, int]], float]:
    """The function: widths of the groups -> FLOPs for one image of image_size x image_size pixels.

    Convolutions and linear layers count, a multiplication with its addition as two, as torch.utils.flop_counter has it:

        FLOPs = sum over weights w of 2 * (cells of the layer) * (entries of w)

    regions: in the second stage of a detector. The count is exact for sizes that are a multiple of the coarsest stride.
    """
    parts = axis_parts(groups)
    weights = []
    for entry, (per_pixel, per_region) in groups.cells.items():
        dims = []
        for dim, size in enumerate(state[entry].shape):
            if (entry, dim) in parts:
                stays = int((groups.axes[entry, dim] == STAYS).sum())
                dims.append((stays, parts[entry, dim]))
            else:
                dims.append((size, {}))
        weights.append((2 * (per_pixel * image_size**2 + per_region * regions), dims))

    def flops(widths: Mapping[str, int]) -> float:
        total = 0.0
        for product, dims in weights:
            for stays, own in dims:
                product *= stays + sum(times * widths[name] for name, times in own.items())
            total += product
        return total

    return flops


def count_regions(model: nn.Module) -> int:
    """The regions of the second stage in evaluation; 0 for a detector of one stage."""
    selection = getattr(model, "eval_selection", None)
    return 0 if selection is None else selection["proposals"]
