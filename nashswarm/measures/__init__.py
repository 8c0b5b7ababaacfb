"""Measures: what a run writes into its record about a model and its compressed copy.

``measure`` says what a measure is and what it is given.  The measures themselves: ``quality`` (distance from the full
model on text, and ``Official`` scores of GLUE, computed in ``glue``), ``size`` (bytes), ``speed`` (decoding and
prefill against the ``contestants``), ``load`` (a server under load), ``layers`` (each matrix compressed alone),
``generation`` (BLEU and tasks, scored by the evaluators in ``harness``), ``prototype`` (the protocol of the earlier
prototype), and the package ``moe`` (mixtures of experts).  ``timing`` is the timer of all of them.
"""
