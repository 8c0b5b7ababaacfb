"""Compression of a decoder that is larger than memory, one decoder block after another (``compress --by-layer``).

``shards`` reads a checkpoint tensor by tensor, and ``conversion`` turns its names and layouts into those of modules;
``skeleton`` finds the blocks of a model without memory and what is stored together; ``surroundings`` runs everything
of a model but its blocks; ``settings`` holds the settings; ``layout`` says what every file of the compressed checkpoint
will hold.  At one width: ``moments`` gathers the statistics of a block; ``block`` compresses one unit: its matrices and
its outputs; ``compress`` loops over the units and resumes an interrupted run, as ``priced`` does at one price:
``gradients`` gathers statistics by backward passes through one block, ``tiles`` weighs and encodes matrices, ``budget``
says how many bytes they may take, and ``steps`` joins these.  ``forecast`` predicts bytes, seconds and memory.
"""
