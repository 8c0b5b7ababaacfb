"""Bit allocation: which block of a matrix gets how many bits, at a given number of bytes.

``blocks`` defines the blocks (the players of the bit game), their features and their bytes; ``damages`` measures what
each width costs each block; ``game`` solves the bit game under one price per byte; ``baselines`` holds the published
alternatives (BAQ, Radio, EvoPress), quantiles of importance and the lottery; ``rules`` gives all of them one signature
and the names by which ``FixedWidth`` chooses among them.
"""
