"""The learning rate, a function of the step alone: a resumed run needs nothing to go on with it."""

import math


def warmup_cosine(step: int, *, steps: int, warmup: int, peak: float) -> float:
    """Linear warm-up, then a cosine down to a tenth.

    Args:
        step: counted from 0.
        steps: of the whole training.
        warmup: steps until the peak.
        peak: the highest rate.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))
