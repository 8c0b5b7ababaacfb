"""What calibration text says about a model.

``moments`` computes second moments of the inputs of each matrix and of the gradients of its outputs, which
``moment_sums`` adds up by hooks; ``nll`` is the negative log-likelihood whose gradients these are,
``token_frequencies`` says how often rare tokens count, and ``moments_table`` keeps the moments of a model in little
memory, as ``recomputation`` does with activations.
``context`` is all that a compression method may ask for, and ``session`` answers it from a model and its text, which
``texts`` chooses; ``reach`` tries out which matrices the text reaches, ``missing_moments`` speaks for experts
without tokens, and ``expert_traffic`` counts the tokens of the others and sets their prices.  ``cache`` keeps tensors
on disk, and ``prefix_replay`` skips the blocks of a forward pass that come before a changed one.
"""
