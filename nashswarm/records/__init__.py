"""TODO-PACKAGE records."""
