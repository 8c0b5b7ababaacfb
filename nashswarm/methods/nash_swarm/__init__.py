"""TODO-PACKAGE nash_swarm."""
