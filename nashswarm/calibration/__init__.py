"""TODO-PACKAGE calibration."""
