"""TODO-PACKAGE bit_allocation."""
