"""Compression of a decoder that is larger than memory, one decoder block after another (``compress --by-layer``).

``shards`` reads a checkpoint tensor by tensor, and ``conversion`` turns its names and layouts into those of modules;
``skeleton`` finds the blocks of a model without memory and what is stored together; ``surroundings`` runs everything
of a model but its blocks; ``settings`` holds the settings; ``layout`` says what every file of the compressed checkpoint
will hold; ``moments`` gathers the statistics of a block; ``block`` compresses one unit: its matrices and its outputs;
``compress`` loops over the units and resumes an interrupted run; ``forecast`` predicts bytes, seconds and memory.
"""
