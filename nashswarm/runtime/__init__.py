"""Run compressed models: profile them, export them to other runtimes, and serve them.

``machine`` reads cores, caches and instruction sets.  ``memory_limit`` measures the memory of generation and finds the
longest text within a limit.  ``profile`` times matrices and batch sizes.  ``cache_misses`` counts cache misses of
products, which ``products`` runs in a process without torch.  ``export`` writes a model for ONNX runtimes or
torch.export, with the layouts of ``portable`` and ``qdq``.  ``type_table`` prints the types of files for other
runtimes, ``folder_table`` what is in the folder of a compressed model.  ``serving`` answers many requests at once, over
HTTP and in a terminal; ``load`` sends them.
"""
