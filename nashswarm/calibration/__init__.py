"""What calibration text says about a model.

``moments`` computes second moments of the inputs of each matrix and of the gradients of its outputs.  ``context`` is
all that a compression method may ask for, and ``session`` answers it from a model and its text.  ``cache`` keeps
tensors on disk, and ``prefix_replay`` skips the blocks of a forward pass that come before a changed one.
"""
