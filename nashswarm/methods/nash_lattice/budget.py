"""Search for the base step at which a quantized model takes a given number of bytes.

Nothing here knows what is quantized: a caller gives a function from a step to a result, and one from a result to bytes.
"""

import math
from collections.abc import Callable
from typing import TypeVar

BUDGET_TOLERANCE = 1e-3  # share of the budget that may stay unused
COARSE_TOLERANCE = 1e-2  # the same before the offsets are chosen
TRIALS = 12  # steps to try before the best one is taken

Result = TypeVar("Result")


class ByteSlope:
    """How many bytes a model loses when its base step doubles (one octave).

    It starts at the high-rate value, one bit a weight, and follows what the latest pair of trials measured.
    """

    def __init__(self, at_high_rate: float) -> None:
        self.at_high_rate = self.latest = at_high_rate

    def update(self, octaves: float, bytes_saved: int) -> None:
        """Measure the slope anew: a step coarser by ``octaves`` took ``bytes_saved`` fewer bytes."""
        if abs(octaves) > 0.01:  # closer steps differ by rounding ties more than by the slope
            self.latest = min(max(bytes_saved / octaves, self.at_high_rate / 20), 2 * self.at_high_rate)


def step_for_budget(
    quantize: Callable[[float], Result],
    bytes_of: Callable[[Result], int],
    budget: int,
    first_step: float,
    slope: ByteSlope,
    tolerance: float = BUDGET_TOLERANCE,
) -> Result:
    """Return the result of the finest base step found that takes at most ``budget`` bytes.

    The search follows secants inside the bracket of steps that fitted and steps that did not.  It stops at the first
    result of at least (1 − ``tolerance``) times the budget, or returns the largest that fitted after ``TRIALS`` steps.
    ``slope`` predicts the first secant and is updated by every trial.

    Raises ValueError if no step fits.
    """
    target = (1 - tolerance / 2) * budget
    best: Result | None = None
    trials: list[tuple[float, int]] = []
    log_step = math.log2(first_step)
    too_fine, fine_enough = -math.inf, math.inf
    while len(trials) < TRIALS or (best is None and len(trials) < 4 * TRIALS):
        result = quantize(2.0**log_step)
        size = bytes_of(result)
        if size > budget:
            too_fine = max(too_fine, log_step)
        else:
            fine_enough = min(fine_enough, log_step)
        trials.append((log_step, size))
        if size <= budget and (best is None or size > bytes_of(best)):
            best = result
        del result  # a result may be as large as the model
        if best is not None and bytes_of(best) >= (1 - tolerance) * budget:
            return best
        if len(trials) > 1:
            slope.update(trials[-1][0] - trials[-2][0], trials[-2][1] - trials[-1][1])
        log_step += min(max((size - target) / slope.latest, -8.0), 8.0)
        if not too_fine < log_step < fine_enough:
            log_step = (too_fine + fine_enough) / 2 if math.isfinite(too_fine + fine_enough) else log_step
    if best is None:
        raise ValueError(f"no step was found at which the layers take {budget} bytes; raise method.bits")
    return best
