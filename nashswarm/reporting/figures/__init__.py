"""Figures: each function takes records or a data frame and returns a matplotlib figure in the style that is in force.

``style`` holds what all figures share: colours, markers, labels that do not overlap, and ``save``.  ``quality`` draws
KL, perplexity and agreement against file size (``pareto``, ``accuracy``), the cost of each ablation (``ablation``) and
predicted against measured damage (``sensitivity``).  ``games`` draws how the games converge (``convergence``,
``settling``) and what they decide (``bit_map``, ``layer_bits``, ``decisions``).  ``speed`` draws the time and memory of
running models (``speed``, ``memory``, ``roofline``) and the latency of a server (``latency``).  ``moe`` draws expert
load (``crowding``) and the loss of routers (``routing``).  ``flock`` draws the flock in feature space, as a still and
as an animation.
"""
