"""TODO-PACKAGE reporting."""
