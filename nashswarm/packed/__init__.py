"""Compressed models, in memory and in files.

``matrix`` holds weight matrices in the layouts that kernels read; ``tiles`` converts quantized matrices to one of these
layouts, and back.  ``modules`` holds the linear layer and the embedding that compute on them.  ``file_format`` converts
matrices and other tensors to the bytes of a checkpoint and back, and counts their size.  ``checkpoint`` registers that
format with transformers, so that ``save_pretrained`` and ``from_pretrained`` work.  ``native_forward`` lets the C++
library compute whole passes of models that ``blocks`` can describe to it, with keys and values in the layers of
``cache``; ``watch`` notices that a model was changed since.  ``model_folder`` writes and reads the folder of a saved
model with its config, record and ``card``; ``reload`` opens it in a new process and compares; ``account`` says what
became of every tensor.
"""
