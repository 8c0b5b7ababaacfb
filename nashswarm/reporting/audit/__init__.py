"""The audit: what the earlier prototype claimed, its own protocol run again, and an honest measurement beside it.

Every number comes from a record (``experiment=audit``, ``experiment=ablation``) or is exact from shapes; every verdict
follows from them by the rule in its row.  ``evidence`` gathers the records.  ``claim`` defines a row and how its
sentences are put together.  ``quality_claims`` has the claims on size and loss (C1, C2, C4, C10, C12), ``time_claims``
those on time and memory (C3, C5, C6, C9), ``game_claims`` those on the game and its components (C7, C8, C11).
``document`` writes all twelve in Markdown and LaTeX, with the table of sizes.
"""
