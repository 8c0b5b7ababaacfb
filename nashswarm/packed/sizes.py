"""The size of a compressed model, counted once for every road that compresses one."""


def sizes_of(file_bytes: int, packed_bytes: int, packed_weights: int, parameters: int) -> dict[str, float]:
    """Return the size metrics of a record.

    ``bytes_file``: bytes of weights and config on disk, ``file_bytes``.  ``bits_per_weight``: stored bits per weight of
    the compressed matrices, from ``packed_bytes`` and ``packed_weights``.  ``bits_per_weight_model``: bits on disk per
    parameter of the whole model, everything counted.  ``compression``: the share that is saved of 32-bit floats.

    >>> sizes_of(file_bytes=100, packed_bytes=75, packed_weights=200, parameters=250)
    {'bytes_file': 100, 'bits_per_weight': 3.0, 'bits_per_weight_model': 3.2, 'compression': 0.9}
    """
    return {
        "bytes_file": file_bytes,
        "bits_per_weight": 8 * packed_bytes / packed_weights,
        "bits_per_weight_model": 8 * file_bytes / parameters,
        "compression": 1 - file_bytes / (4 * parameters),
    }
