"""Makes tokens_h5py.h5: a token file as a user of h5py writes it (chunked, compressed, variable-length attributes).

Read exactly, no tolerance. Made with h5py 3.16.0 (HDF5 of its wheel), numpy as of the torch 2.15 environment.
"""
import pathlib

import h5py
import numpy as np

with h5py.File(pathlib.Path(__file__).parent / "tokens_h5py.h5", "w") as file:
    file.create_dataset("tokens", data=np.arange(12, dtype=np.int32).reshape(3, 4), compression="gzip", chunks=(2, 4))
    file.create_dataset("lengths", data=np.array([4, 2, 3], dtype=np.int32))
    file.attrs["tokenizer_sha256"] = "abc"
    file.attrs["vocab_size"] = 100
    file.attrs["bos_policy"] = "each"
