"""GGUF files whose tensors choose their types of ggml under one price of a byte.

``settings`` holds the method: it measures what each type costs each tensor, and rounds tensors into the types that the
game gives them.  ``certificate`` counts their bytes, writes that game into the file, and reads it back.
"""
