"""Compression methods: each maps what it may know of a model to packed bytes and the weights that they decode to.

``method`` defines the protocol ``Method`` and its result.  ``uniform`` (rounding to nearest), ``gptq``, ``prototype``
(the quantizer of the earlier prototype) and ``fixed_width`` (bit allocation among tiles) hold one method each;
``nash_swarm``, ``nash_lattice``, ``nash_archive``, ``peers`` and ``streaming`` are packages; ``nash_mixture`` lets
routers of a mixture of experts answer to the first of these; ``compressed_tensors`` and
``gguf_types`` write files for other runtimes, whose types matrices choose in the game of ``type_game``;
``bit_allocation`` holds the bit game and its baselines; ``swarm`` the settings of the flock; ``distillation``
fine-tunes what a method has compressed, and ``stored_state`` is what it stores.
"""
