"""Quantization of weight matrices, from codes to bytes.

``grid`` rounds groups of weights to b-bit codes with a scale and a zero point, tile by tile; ``pack`` stores them.
``lattice`` puts a matrix on a grid of integers with one step per row and column; ``entropy`` stores such codes, and
grouped ones, with an entropy coder, in the checksummed bytes of ``container``; ``integer_code`` is for integers with a
table of their own.  ``curvature`` holds the second
derivatives of the loss.  ``error_feedback`` is one pass of GPTQ, ``coordinate_descent`` improves its codes until no
weight can, ``lattice_codes`` does both on a lattice, ``lattice_paths`` finds codes that follow paths down the columns
of a lattice and ``path_entropy`` stores these, and ``trainable_codes`` trains codes by gradient descent.
``trellis_arrangement`` weights, groups and rotates a matrix for trellis tiles, ``trellis`` encodes it, and
``codebooks`` trains the tables of its values.  ``prototype`` is the quantizer of the published prototype, and
``ggml`` rounds to the block types of llama.cpp.  ``signed_groups`` rounds to the groups of compressed-tensors.
"""
