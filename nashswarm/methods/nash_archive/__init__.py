"""Method ``nash_archive``: lattice paths under one price of a bit, entropy-coded; the smallest file, for archives.

``settings``: the fields of a config and ``compress``.  ``quantizer``: from a base step to paths and their tables.
"""
