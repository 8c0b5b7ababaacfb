"""Generic code tables: geometrically distributed magnitudes, with the mean of each level."""

import numpy as np

from nashswarm.quant.entropy import ESCAPE, HIGHEST, LOWEST, TOTAL, fit_tables

_MEANS = 2.0 ** (np.arange(LOWEST, HIGHEST + 1)[:, None] / 2)
_RATIOS = _MEANS / (1 + _MEANS)
LAPLACE = fit_tables((1 - _RATIOS) * _RATIOS ** np.arange(ESCAPE + 1) * TOTAL)
