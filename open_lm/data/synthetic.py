"""Random tokens in place of data, to time a model."""

import numpy as np

from open_lm.data.randomness import philox


def draw_tokens(seed: int, step: int, first: int, end: int, length: int, vocab_size: int) -> np.ndarray:
    """Uniform token ids of the slots first … end-1 of a step's global batch: (end - first, length) int32."""
    rows = [
        philox(seed, "synthetic", step, slot).random_raw(length) % vocab_size for slot in range(first, end)
    ]
    return np.stack(rows).astype(np.int32)
