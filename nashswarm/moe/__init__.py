"""Mixtures of experts that are trained here: a language model whose feed-forward layers route tokens to experts.

``router`` is a package with one file per router, ``routing`` holds what a router returns, ``loss`` the training loss
and ``load`` how evenly experts are used.  ``price_window`` solves for prices
on the tokens just read.  ``model`` is the language model as transformers knows it, with ``attention``, ``fine_grained``
the same with experts in parts, some of them shared; ``training`` trains
and caches it, and ``store`` serves its experts from a file.  The experts themselves are in
``nashswarm.models.experts``, because compression treats those of other models too.
"""
