"""The numbers and tables that the paper includes, every one from committed records and benchmark reports.

``macros`` writes one LaTeX macro for every number of the prose that comes from a record.  ``benchmarks`` does the same
for the reports in ``results/benchmarks``.  ``tables`` has the columns that fit the paper, and the table of budgets.
The audit's parts are in ``nashswarm.reporting.audit``.
"""
