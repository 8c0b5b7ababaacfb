"""TODO-PACKAGE streaming."""
