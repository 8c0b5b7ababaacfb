"""Compress language models by game theory and swarm behaviour.

Weight blocks are players that compete for bits under one price per byte until nobody gains by changing alone; each
minds about seven neighbours, as starlings do.  Start reading at ``bit_game`` (the game), ``methods`` (what is compared)
and ``run`` (one run, from config to record).
"""

__version__ = "0.1.0a0"
