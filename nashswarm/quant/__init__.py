"""Quantization of weight matrices: the grid, its statistics, its bytes."""
