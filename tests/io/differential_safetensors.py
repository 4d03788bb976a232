"""Mutates safetensors files and compares our verdict with that of the safetensors package.

Both must accept or both reject. Ours may be stricter for a reason of STRICTER, never laxer.
usage: differential_safetensors.py <io_probe> [count] [seed]
"""
import collections
import json
import pathlib
import random
import subprocess
import sys
import tempfile

import safetensors

# Part of our message -> why the package accepts what we refuse.
STRICTER = {
    "does not begin with '{'": "the specification demands it, the package skips white space",
    "duplicate": "the specification forbids duplicate keys, the package keeps the last",
    "control character": "a name is printed and becomes a file-like key",
    "is empty": "a tensor without a name",
    "longer than 1024": "cap on names",
    "not supported": "dtypes the package knows and isobath does not read",
    "expected an object": "the package takes a list for an object, and null for no metadata",
    "dtype is not a string": "the package takes {\"F32\": null} for the name of a dtype",
    "nested too deeply": "the package allows 127 levels in unknown fields, isobath 32",
    "more than 16 fields": "cap on unknown fields",
    "more than 64 dimensions": "the limit of ATen",
    "63 bits": "ATen counts in int64",
    "overflows": "the package multiplies up to 2^64 and lets a zero hide an overflow",
}
ALPHABET = '{}[]",:0123456789-+.eE \\u\t\n\x00abnrtlFDtypeshapdata_offsetsIUBOL\x7f\x80\xc3\xff'


def accepted_by_package(data: bytes) -> bool:
    try:
        safetensors.deserialize(data)
        return True
    except Exception:  # the package raises its own type for every fault
        return False


def encode(header: str | bytes, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else header.encode("utf-8", "surrogatepass")
    return len(text).to_bytes(8, "little") + text + data


def seed_header(rng: random.Random) -> tuple[dict, bytes]:
    sizes = {"F32": 4, "BF16": 2, "U8": 1, "I64": 8, "BOOL": 1, "F8_E4M3": 1, "F64": 8, "U16": 2}
    header, offset = {}, 0
    if rng.random() < 0.5:
        header["__metadata__"] = {"format": "pt", "note": "ü"}
    for i in range(rng.randrange(4)):
        dtype = rng.choice(list(sizes))
        shape = [rng.randrange(4) for _ in range(rng.randrange(3))]
        size = sizes[dtype]
        for extent in shape:
            size *= extent
        header[f"layer.{i}.w"] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    return header, bytes(offset)


def mutate_tree(rng: random.Random, header: dict) -> dict:
    """One change to the meaning: a value replaced, removed, added or moved."""
    values = [0, 1, -1, 4, 2**31, 2**62, 2**63, 2**64 - 1, 2**64, 1.0, 4.5, 1e300, None, True, "", "F32", "F4", "F31",
              "C64", [], [0], [1, 1], [0, 4], {}, {"F32": None}, [[1]]]
    names = [name for name in header if name != "__metadata__"]
    choice = rng.randrange(7)
    if choice == 0 or not names:
        header[rng.choice(["", "x", "__metadata__", "\x1b", "n" * 1025])] = rng.choice(values)
        return header
    entry = header[rng.choice(names)]
    field = rng.choice(["dtype", "shape", "data_offsets"])
    if choice == 1:
        entry[field] = rng.choice(values)
    elif choice == 2:
        del entry[field]
    elif choice == 3:
        entry["extra"] = rng.choice(values)
    elif choice == 4:
        entry["shape"] = entry["shape"] + [rng.choice(values)]
    elif choice == 5:
        entry["data_offsets"][rng.randrange(2)] = rng.choice(values)
    else:
        shift = rng.choice([-4, -1, 1, 4])
        entry["data_offsets"] = [offset + shift for offset in entry["data_offsets"]]
    return header


def mutate_bytes(rng: random.Random, data: bytes) -> bytes:
    """One to three changes to the text, past or within the length."""
    out = bytearray(data)
    for _ in range(rng.randrange(1, 4)):
        at = rng.randrange(len(out) + 1) if rng.random() < 0.9 else rng.randrange(9)
        choice = rng.randrange(4)
        if choice == 0 and at < len(out):
            out[at] ^= 1 << rng.randrange(8)
        elif choice == 1 and at < len(out):
            del out[at]
        elif choice == 2:
            out[at:at] = rng.choice(ALPHABET).encode("latin-1")
        elif at < len(out):
            out[at] = ord(rng.choice(ALPHABET))
    return bytes(out)


def mutant(rng: random.Random) -> bytes:
    header, data = seed_header(rng)
    choice = rng.randrange(10)
    if choice < 4:
        return encode(json.dumps(mutate_tree(rng, header)), data)
    if choice < 8:
        text = mutate_bytes(rng, json.dumps(header, ensure_ascii=rng.random() < 0.5).encode())
        return encode(text, data)
    if choice == 8:
        return mutate_bytes(rng, encode(json.dumps(header), data))
    text = json.dumps(header)
    if len(header) > 0:  # every key once more
        text = text[:-1] + ", " + text[1:]
    return encode(text, data)


def main() -> None:
    probe, count = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 4000
    seed = int(sys.argv[3]) if len(sys.argv) > 3 else 1
    rng = random.Random(seed)
    outcomes, faults = collections.Counter(), []
    with tempfile.TemporaryDirectory() as folder:
        paths, verdicts = [], []
        for i in range(count):
            data = mutant(rng)
            path = pathlib.Path(folder) / f"{i}.safetensors"
            path.write_bytes(data)
            paths.append(path)
            verdicts.append(accepted_by_package(data))
        output = subprocess.run([probe, "judge"], input="\n".join(map(str, paths)) + "\n", capture_output=True,
                                text=True, check=True).stdout.splitlines()
        assert len(output) == count, f"{len(output)} verdicts for {count} files"
        for path, theirs, ours in zip(paths, verdicts, output):
            if ours == "ok":
                outcomes["both accept" if theirs else "ours is laxer"] += 1
                if not theirs:
                    faults.append(f"ours accepts what the package rejects: {path.read_bytes()!r}")
            elif not theirs:
                outcomes["both reject"] += 1
            else:
                reasons = [reason for reason in STRICTER if reason in ours]
                outcomes["stricter: " + reasons[0] if reasons else "unlisted"] += 1
                if not reasons:
                    faults.append(f"{ours}: the package accepts {path.read_bytes()!r}")
    for outcome, number in sorted(outcomes.items()):
        print(f"{number:6} {outcome}")
    # A campaign that exercises one side only proves nothing.
    assert outcomes["both accept"] > count // 50 and outcomes["both reject"] > count // 4, "the mutations are one-sided"
    if faults:
        sys.exit(f"seed {seed}, {len(faults)} disagreements\n" + "\n".join(faults[:10]))


if __name__ == "__main__":
    main()
