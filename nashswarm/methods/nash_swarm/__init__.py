"""The method ``nash_swarm``: trellis tiles that choose their rates under one price, grouped and rotated by the flock.

``settings`` holds the method and its settings.  ``prices`` finds the price at which rates meet a budget of bytes.
``solver`` encodes the layers, plays the rate game, and certifies its end; ``workers`` lets layers be computed at a
time, one a thread; ``report`` assembles the compressed model.
"""
