"""Compression of a LLaMA that is larger than memory, one decoder block after another (``compress --by-layer``).

``shards`` reads a checkpoint tensor by tensor; ``settings`` holds the settings; ``layout`` says what every file of the
compressed checkpoint will hold; ``block`` compresses one unit: its statistics, its quantized matrices and its outputs;
``compress`` loops over the units and resumes an interrupted run; ``forecast`` predicts bytes, seconds and memory.
"""
