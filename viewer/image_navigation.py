"""`ImageNavigation`: which part of an image fills the viewport."""

from __future__ import annotations

from nrc.viewer.session import ImageWindow

MOST_ZOOM = 256.0  # viewport pixels per image pixel
MARGIN = 0.95  # of the viewport that the whole image fills at first
WHEEL = 1.15  # zoom of one notch


class ImageNavigation:
    """Moves and zooms over an image of `width` × `height` [px]. Positions are viewport pixels from its upper left."""

    def __init__(self, width: float, height: float) -> None:
        self._width, self._height = width, height
        self._viewport = (1, 1)
        self._fitted = True  # follow the viewport's size until somebody moves
        self.window = ImageWindow(width / 2.0, height / 2.0, 1.0)

    def resize(self, width: int, height: int) -> None:
        """Tell the viewport's size [px]."""
        if (width, height) != self._viewport:
            self._viewport = (max(width, 1), max(height, 1))
            if self._fitted:
                self.fit()

    def fit(self) -> None:
        """Show the whole image."""
        zoom = MARGIN * min(self._viewport[0] / self._width, self._viewport[1] / self._height)
        self.window = ImageWindow(self._width / 2.0, self._height / 2.0, zoom)
        self._fitted = True

    def pan(self, dx: float, dy: float) -> None:
        """Drag the image by viewport pixels, y down."""
        window = self.window
        self._move(window.x - dx / window.zoom, window.y - dy / window.zoom, window.zoom)

    def zoom(self, notches: float, x: float, y: float) -> None:
        """Zoom by wheel notches about a point of the viewport, which stays where it is."""
        window = self.window
        least = 0.25 * min(self._viewport[0] / self._width, self._viewport[1] / self._height, 1.0)
        zoom = min(max(window.zoom * WHEEL**notches, least), MOST_ZOOM)
        aside, below = x - self._viewport[0] / 2.0, y - self._viewport[1] / 2.0
        change = 1.0 / window.zoom - 1.0 / zoom
        self._move(window.x + aside * change, window.y + below * change, zoom)

    def set_zoom(self, zoom: float) -> None:
        """Zoom about the centre to so many viewport pixels per image pixel."""
        self._move(self.window.x, self.window.y, min(zoom, MOST_ZOOM))

    def _move(self, x: float, y: float, zoom: float) -> None:
        self._fitted = False
        self.window = ImageWindow(min(max(x, 0.0), self._width), min(max(y, 0.0), self._height), zoom)
