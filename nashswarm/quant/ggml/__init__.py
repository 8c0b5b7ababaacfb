"""The block types of ggml that llama.cpp reads from GGUF files: their grids, their bytes, and rounding into them.

``types`` has the grid of every type, ``packing`` the bytes of its blocks, ``scales`` the choice of steps and offsets,
and ``rounding`` the codes: error feedback, then descent over codes, steps and offsets together.
"""
