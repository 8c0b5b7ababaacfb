"""TODO-PACKAGE data."""
