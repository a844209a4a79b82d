"""Which experts the tokens of each MoE layer went to, over the run, as one picture a layer.

Shapes: E experts, C columns; a picture is (height, width, 3) of uint8.
"""

from collections.abc import Sequence

import numpy as np

MAX_COLUMNS = 500
UNDER, EVEN, OVER = np.array([47, 111, 219]), np.array([255, 255, 255]), np.array([217, 115, 13])


class ShareHistory:
    """Shares of one layer over the whole run in at most MAX_COLUMNS columns, each a mean of equally many lines."""

    def __init__(self) -> None:
        self.columns: list[np.ndarray] = []
        self.lines = 0
        self._waiting: list[np.ndarray] = []
        self._lines_in_a_column = 1

    def add(self, shares: Sequence[float]) -> None:
        self.lines += 1
        self._waiting.append(np.asarray(shares, dtype=np.float64))
        if len(self._waiting) < self._lines_in_a_column:
            return
        self.columns.append(np.mean(self._waiting, axis=0))
        self._waiting = []
        if len(self.columns) == MAX_COLUMNS:
            pairs = zip(self.columns[::2], self.columns[1::2], strict=True)
            self.columns = [(a + b) / 2 for a, b in pairs]
            self._lines_in_a_column *= 2

    def picture(self) -> np.ndarray:
        """`draw` of all columns, those of the last lines too."""
        last = [np.mean(self._waiting, axis=0)] if self._waiting else []
        return draw(np.stack([*self.columns, *last], axis=1))


def draw(share_EC: np.ndarray) -> np.ndarray:
    """Rows are experts, 0 on top, columns are time. White: the even share 1/E; orange deepens up to twice
    it, blue down to half of it (log2 scale). Few cells are drawn large, so that they can be seen."""
    experts, columns = share_EC.shape
    depth_EC = np.clip(np.log2(np.maximum(share_EC, 1e-9) * experts), -1, 1)[..., None]
    ends = np.where(depth_EC > 0, OVER, UNDER)
    pixels = (EVEN + np.abs(depth_EC) * (ends - EVEN)).round().astype(np.uint8)
    return pixels.repeat(max(1, 160 // experts), axis=0).repeat(max(1, MAX_COLUMNS // columns), axis=1)
