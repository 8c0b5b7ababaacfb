"""Routers: which experts compute which tokens.

One file holds one router, its settings (a frozen dataclass that a config names) and the module that ``build`` makes of
them: ``dense`` (no routing), ``top_k``, ``loss_free``, ``quantile``, ``expert_choice`` and ``nash_swarm``.  ``router``
holds what all of them share, ``equilibrium`` the prices of ``nash_swarm``, and ``kinds`` the names of routers in saved
models.
"""
