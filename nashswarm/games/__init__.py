"""TODO-PACKAGE games."""
