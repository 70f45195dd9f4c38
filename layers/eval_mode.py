"""A module that is in eval mode for a while, such as for a pass that finds the shapes of its maps."""

import contextlib
from collections.abc import Iterator

from torch import nn


@contextlib.contextmanager
def in_eval_mode(module: nn.Module) -> Iterator[None]:
    """Inside, the module is in eval mode; afterwards, after an error too, in the mode that it was in before."""
    was_training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was_training)
