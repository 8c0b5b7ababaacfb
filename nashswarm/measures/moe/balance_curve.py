"""What even load costs: loss and MaxVio of a trained mixture of experts, for every way in which prices follow."""

import copy
import dataclasses
import functools
from collections.abc import Sequence

from nashswarm.measures.measure import MeasureResult
from nashswarm.measures.moe.routed import FOLLOWED, evaluate
from nashswarm.measures.moe.target import MoeMeasure, MoeTarget, check_sizes
from nashswarm.moe.price_window import PriceWindow, follow_windows
from nashswarm.moe.router.nash_swarm import CongestionRouter

AT_A_POINT = ("nll", "max_violation", "max_violation_worst")


@dataclasses.dataclass(frozen=True)
class BalanceCurve(MoeMeasure):
    """Loss against load, a point for every way in which prices follow the text; each point starts at trained prices.

    ``nll`` (nats per token), ``max_violation`` and ``max_violation_worst`` are those at the prices that training left.
    ``<metric>_rate_<rate>``: prices move by this rate (``follow`` of ``moe_nash_swarm``) after every few windows.
    ``<metric>_window_<tokens>``: prices are solved on the last tokens read (``PriceWindow``).  A router has the points
    that it can follow.  ``windows``: number of test windows; None: all.
    """

    batch_size: int = 16
    windows: int | None = None
    rates: Sequence[float] = (0.01, 0.03, 0.1)
    price_windows: Sequence[int] = (2048, 8192, 32768)

    def __post_init__(self) -> None:
        check_sizes(self, "batch_size", "windows")
        if min(self.price_windows, default=1) < 1 or min(self.rates, default=1) <= 0:
            raise ValueError(
                f"measure.price_windows=[{','.join(map(str, self.price_windows))}] must be at least 1, "
                f"measure.rates=[{','.join(map(str, self.rates))}] positive"
            )

    def measure(self, target: MoeTarget) -> MeasureResult:
        windows = target.windows[: self.windows]
        metrics, series = evaluate(target.model, windows, self.batch_size, target.track)
        routers = target.model.routers()
        if any(isinstance(router, CongestionRouter) and router.follows for router in routers):
            for rate in self.rates:
                model = copy.deepcopy(target.model)
                for router in model.routers():
                    assert isinstance(router, CongestionRouter)
                    router.settings = dataclasses.replace(router.settings, follow=rate)
                point, _ = evaluate(model, windows, FOLLOWED, target.track, model.follow)
                metrics |= {f"{name}_rate_{rate:g}": point[name] for name in AT_A_POINT}
        if any(router.solves for router in routers):
            for tokens in self.price_windows:
                model = copy.deepcopy(target.model)
                follow = functools.partial(follow_windows, [PriceWindow(router, tokens) for router in model.routers()])
                point, _ = evaluate(model, windows, FOLLOWED, target.track, follow)
                metrics |= {f"{name}_window_{tokens}": point[name] for name in AT_A_POINT}
        metrics["looks_ahead"] = float(target.model.config.settings().looks_ahead)
        return metrics, series
