"""Method ``nash_lattice``: row blocks choose their quantization steps in a potential game under one price of a bit.

Read in this order.  ``settings``: the fields of a config and ``compress``.  ``step_choices``: what the game decides, a
multiplier of every row's sensitivity and an offset of every block's step.  ``quantizer``: from choices and a base step
to codes.  ``budget``: the search for the base step at which the model takes a given number of bytes.  ``solver``: the
game itself.  ``selection``: what held-out calibration text decides, once for all budgets.  ``certificate``: what no
player can gain by deviating, and the tensors by which a saved model proves it.  ``report``: the compressed model with
its metrics.
"""
