"""Mixture of experts: routing as a congestion game (``router``), experts that are executed in groups (``experts``) or
kept by their bytes (``store``), the loss (``loss``), the load (``load``), and a language model (``model``)."""
