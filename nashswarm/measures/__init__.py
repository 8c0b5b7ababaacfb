"""TODO-PACKAGE measures."""
