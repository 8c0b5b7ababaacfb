"""TODO-PACKAGE peers."""
