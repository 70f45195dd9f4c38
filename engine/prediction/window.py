"""A window that shows video as it is predicted, by OpenCV."""

import os
import sys

import numpy as np

from errors import UserError, require

LARGEST = 1280, 800  # width and height in pixels that a window opens with at most

INSTALL = (
    "a window (--show) needs OpenCV with its windows: pip install '.[window]', and no opencv-python-headless beside it"
)


class Window:
    """A context with a window of this title. UserError, with what to install, where none can be opened."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.has_size = False
        self.cv2 = require("cv2", "window", "a window (--show)")
        if sys.platform == "linux" and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
            raise UserError("--show: there is no display (DISPLAY is not set), expected one, or --show left out")
        try:
            flags = self.cv2.WINDOW_NORMAL | self.cv2.WINDOW_KEEPRATIO | self.cv2.WINDOW_GUI_NORMAL  # no toolbar
            self.cv2.namedWindow(title, flags)
        except self.cv2.error:  # the headless build has the function, but not what it does
            raise UserError(INSTALL) from None

    def __enter__(self) -> "Window":
        return self

    def __exit__(self, *error: object) -> None:
        self.cv2.destroyAllWindows()

    def show(self, pixels: np.ndarray) -> bool:
        """Show pixels (H, W, 3), RGB uint8. Returns False once q was pressed or the window was closed."""
        if not self.has_size:  # OpenCV opens every window with 400 x 300
            scale = min(1.0, LARGEST[0] / pixels.shape[1], LARGEST[1] / pixels.shape[0])
            self.cv2.resizeWindow(self.title, round(scale * pixels.shape[1]), round(scale * pixels.shape[0]))
            self.has_size = True
        self.cv2.imshow(self.title, np.ascontiguousarray(pixels[:, :, ::-1]))  # OpenCV wants BGR
        is_quit = self.cv2.waitKey(1) & 0xFF == ord("q")
        return not is_quit and self.cv2.getWindowProperty(self.title, self.cv2.WND_PROP_VISIBLE) >= 1
