"""TODO-PACKAGE models."""
