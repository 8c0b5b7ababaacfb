"""TODO-PACKAGE methods."""
