"""Tables, figures, pages and the numbers of the paper, all derived from records.

``frame`` turns records into one data frame, with means over seeds and tests, after
``distinction`` has told runs of one label apart; ``tables`` and ``balance`` build the tables beside the
main one.  ``labels`` (what identifies a row, the order of methods), ``formats`` (how a number is written), ``typeset``
(terminal, Markdown, CSV) and ``latex`` write them.  ``figures`` draws, ``page`` puts an experiment into one HTML file
with the pictures of ``page_figures``, ``paper`` has what the paper includes, ``audit`` the verdicts on the earlier
prototype's claims.  ``resources`` has the cost of compression and of experiments, ``reproduction`` compares repeated
runs with committed records.  ``quickstart`` runs the ablation and reports it.
"""
