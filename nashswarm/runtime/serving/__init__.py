"""Serve a model to many at once.

``engine`` computes many answers, each an ``answer``, in one batch, which texts join and leave between steps; ``steps``
are those of a model, ``sampling`` chooses tokens, ``text`` turns them into text as they come.  ``server`` is HTTP in
the words of OpenAI's API, whose requests are in ``protocol`` and whose replies in ``replies``; ``host`` runs it in a
thread or a process.  ``chat`` talks in a terminal.
"""
