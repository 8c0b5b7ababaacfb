"""Quantization libraries that nashswarm is compared with, each run through its own code and counted in its own bytes.

``library`` defines what a library can do.  Each of ``hqq``, ``bitsandbytes``, ``quanto``, ``torchao``, ``onnxruntime``,
``nncf``, ``auto_round`` and ``gguf`` wraps the library of that name; ``peer`` holds the table of all eight and the
method ``Peer``.  ``llama_cpp`` is a method of its own: it quantizes whole models, by the file types of a real
llama.cpp.  The libraries are optional and are imported only when a method uses them.
"""
