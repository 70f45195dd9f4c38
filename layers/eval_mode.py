"""Put a module in eval mode for a while, such as for a pass that finds the shapes of its maps."""

import contextlib
from collections.abc import Iterator

from torch import nn


@contextlib.contextmanager
def in_eval_mode(module: nn.Module) -> Iterator[None]:
    """Put the module in eval mode. Afterwards, also after an error, it is in its earlier mode again."""
    was_training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was_training)
