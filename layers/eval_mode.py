"""Put a module in eval mode for a while, such as for a pass that finds the shapes of its maps."""

import contextlib
from collections.abc import Iterator

from torch import nn


@contextlib.contextmanager
def in_eval_mode(module: nn.Module) -> Iterator[None]:
    """Put the module in eval mode. Afterwards, also after an error, each of its parts is in its earlier mode again.

    Parts of a module in train mode may be in eval mode, such as BatchNorms whose statistics are kept.
    """
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, was_training in modes:
            part.training = was_training
