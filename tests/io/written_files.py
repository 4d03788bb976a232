"""What isobath writes, read by the Python packages: safetensors byte for byte as its own writer, HDF5 by h5py."""
import pathlib
import subprocess
import sys
import tempfile

import h5py
import numpy as np
import torch
from safetensors.torch import load_file, save_file

EXPECTED = {
    "f32": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "bf16": torch.arange(4, dtype=torch.bfloat16),
    "f16": torch.arange(3, dtype=torch.float16),
    "i64": torch.arange(2, dtype=torch.int64),
    "i32": torch.arange(3, dtype=torch.int32),
    "i8": torch.arange(-2, 2, dtype=torch.int8),
    "u8": torch.arange(5, dtype=torch.uint8),
    "f8": torch.arange(4, dtype=torch.float32).to(torch.float8_e4m3fn),
    "e5m2": torch.arange(4, dtype=torch.float32).to(torch.float8_e5m2),
    "bool": torch.ones(2, dtype=torch.bool),
    "scalar": torch.tensor(2.5, dtype=torch.float64),
    "empty": torch.empty(0, 3),
    'name "ü"': torch.zeros(1),
}


def check_safetensors(folder: pathlib.Path) -> None:
    ours, theirs = folder / "sample.safetensors", folder / "reference.safetensors"
    loaded = load_file(ours)
    assert loaded.keys() == EXPECTED.keys(), loaded.keys()
    for name, tensor in EXPECTED.items():
        assert loaded[name].dtype == tensor.dtype and loaded[name].shape == tensor.shape, name
        assert torch.equal(loaded[name].float(), tensor.float()), name
    save_file(EXPECTED, theirs, metadata={"format": "pt"})
    assert ours.read_bytes() == theirs.read_bytes(), "the bytes differ from those of the reference writer"


def check_hdf5(folder: pathlib.Path) -> None:
    with h5py.File(folder / "sample.h5") as file:
        for name, tensor in EXPECTED.items():
            if tensor.dtype in (torch.float16, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2):
                continue
            dataset = file["g"][name]
            assert dataset.shape == tuple(tensor.shape), name
            if name == "bf16":
                assert dataset.dtype == np.uint16 and dataset.attrs["dtype"] in ("bfloat16", b"bfloat16")
                assert np.array_equal(dataset[()], tensor.view(torch.uint16).numpy())
            else:
                assert dataset.dtype == tensor.numpy().dtype and np.array_equal(dataset[()], tensor.numpy()), name
        assert file.attrs["integer"] == -5 and file.attrs["real"] == 0.5
        text = file["g"].attrs["text"]
        assert (text.decode() if isinstance(text, bytes) else text) == "ü", text
        assert [t.decode() for t in file["g/f32"].attrs["texts"]] == ["one", "three"]


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        subprocess.run([sys.argv[1], "write", name], check=True)
        check_safetensors(folder)
        check_hdf5(folder)
    print("safetensors: same bytes as the reference writer; HDF5: read by h5py")


if __name__ == "__main__":
    main()
