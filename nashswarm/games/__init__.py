"""Finite games, without torch.

``potential`` has potential games, best response and the shadow price of a budget.  ``flock`` builds the graph of
neighbouring blocks and shrinks sensitivities toward the mean of neighbours.  ``optima`` has what equilibria are
compared with: bounds, exact solvers and the price of anarchy.
"""
