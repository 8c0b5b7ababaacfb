"""TODO-PACKAGE packed."""
