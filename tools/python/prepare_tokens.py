#!/usr/bin/env python3
"""Encodes text with a Hugging Face tokenizer.json into a token file (layout: docs/formats.md).

  prepare_tokens.py --tokenizer models/smollm2-135m/tokenizer.json --length 1024 --sequences 64 \\
      --output data/calibration.safetensors corpus.txt
  prepare_tokens.py --tokenizer … --length 2048 --pad --field text --output data/chat.h5 chat.jsonl

Text is encoded as transformers would do with tok(text): a plain text file in one go, a .jsonl file line by line.
"""
import argparse
import hashlib
import json
import re
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="+", type=Path, help="text files, or .jsonl with one document per line")
    parser.add_argument("--tokenizer", type=Path, required=True, help="tokenizer.json of the model")
    parser.add_argument("--output", type=Path, required=True, help=".safetensors, .h5 or .hdf5")
    parser.add_argument("--length", type=int, required=True, help="tokens per row")
    parser.add_argument("--sequences", type=int, default=0, help="rows to write; 0: all there are")
    parser.add_argument("--skip", type=int, default=0, help="rows to leave out at the beginning")
    parser.add_argument("--bos", choices=["none", "each"], default="none",
                        help="each: every row begins with the beginning-of-sequence token")
    parser.add_argument("--bos-token", help="its text; default: bos_token of the tokenizer_config.json beside the tokenizer")
    parser.add_argument("--field", default="text", help="key of the text in .jsonl files")
    parser.add_argument("--wikitext-detokenize", action="store_true",
                        help="drop <unk> and join ' @-@ ', ' @,@ ', ' @.@ ' of tokenized WikiText")
    layout = parser.add_mutually_exclusive_group()
    layout.add_argument("--pack", action="store_true", help="join all text, cut into windows without overlap (default)")
    layout.add_argument("--pad", action="store_true", help="one row per document, cut to --length or padded with 0")
    arguments = parser.parse_args()
    if arguments.output.suffix not in (".safetensors", ".h5", ".hdf5"):
        parser.error(f"--output {arguments.output}: expected .safetensors, .h5 or .hdf5")
    if arguments.length < 2 or arguments.sequences < 0 or arguments.skip < 0:
        parser.error("--length must be at least 2, --sequences and --skip not negative")
    return arguments


def read_documents(path, field, detokenize):
    text = path.read_text(encoding="utf-8")
    documents = [text]
    if path.suffix == ".jsonl":
        documents = [json.loads(line)[field] for line in text.split("\n") if line.strip()]
    if detokenize:
        documents = [re.sub(r" @([-,.])@ ", r"\1", d.replace("<unk>", "")) for d in documents]
    return documents


def bos_id(arguments, tokenizer):
    if arguments.bos == "none":
        return []
    token = arguments.bos_token
    config = arguments.tokenizer.with_name("tokenizer_config.json")
    if token is None and config.exists():
        token = json.loads(config.read_text(encoding="utf-8")).get("bos_token")
        token = token["content"] if isinstance(token, dict) else token
    number = tokenizer.token_to_id(token) if token else None
    if number is None:
        raise SystemExit(f"prepare_tokens.py: --bos each: the tokenizer knows no token {token!r}; name it with --bos-token")
    return [number]


def pack(documents, length, bos):
    """[n, length], lengths: windows of the joined tokens; what is left over at the end is dropped."""
    flat = np.concatenate([np.asarray(d, np.int32) for d in documents])
    step = length - len(bos)
    n_rows = len(flat) // step
    rows = flat[:n_rows * step].reshape(n_rows, step)
    rows = np.concatenate([np.tile(np.asarray(bos, np.int32), (n_rows, 1)), rows], axis=1)
    return rows, np.full(n_rows, length, np.int32)


def pad(documents, length, bos):
    """[n, length], lengths: one document per row; documents of fewer than two tokens predict nothing and are left out."""
    cut = [(bos + list(d))[:length] for d in documents]
    cut = [row for row in cut if len(row) >= 2]
    rows = np.zeros((len(cut), length), np.int32)
    for row, tokens in zip(rows, cut):
        row[:len(tokens)] = tokens
    return rows, np.asarray([len(row) for row in cut], np.int32)


def write(path, rows, lengths, attributes):
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    if path.suffix == ".safetensors":
        # By hand: the safetensors library writes metadata in random order, and the same text must give the same bytes.
        header, offset = {"__metadata__": {key: str(value) for key, value in attributes.items()}}, 0
        for name, array in (("tokens", rows), ("lengths", lengths)):
            header[name] = {"dtype": "I32", "shape": list(array.shape), "data_offsets": [offset, offset + array.nbytes]}
            offset += array.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        temporary.write_bytes(len(text).to_bytes(8, "little") + text + rows.tobytes() + lengths.tobytes())
    else:
        import h5py  # only for this format
        with h5py.File(temporary, "w") as file:
            file["tokens"], file["lengths"] = rows, lengths
            file.attrs.update(attributes)
    temporary.rename(path)


def main():
    arguments = parse_arguments()
    tokenizer = Tokenizer.from_file(str(arguments.tokenizer))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    bos = bos_id(arguments, tokenizer)
    texts = [text for path in arguments.sources
             for text in read_documents(path, arguments.field, arguments.wikitext_detokenize)]
    # With --bos the row begins with it; a tokenizer that adds its own to each text would double it.
    documents = [tokenizer.encode(text, add_special_tokens=not bos).ids for text in texts]
    rows, lengths = (pad if arguments.pad else pack)(documents, arguments.length, bos)

    end = arguments.skip + arguments.sequences if arguments.sequences else len(rows)
    if len(rows) < end or len(rows) <= arguments.skip:
        raise SystemExit(f"prepare_tokens.py: asked for rows {arguments.skip} to {end}, the text gives {len(rows)} rows of "
                         f"{arguments.length} tokens; add text or lower --sequences, --skip or --length")
    rows, lengths = np.ascontiguousarray(rows[arguments.skip:end]), np.ascontiguousarray(lengths[arguments.skip:end])
    write(arguments.output, rows, lengths, {
        "tokenizer_sha256": hashlib.sha256(arguments.tokenizer.read_bytes()).hexdigest(),
        "vocab_size": tokenizer.get_vocab_size(with_added_tokens=True),
        "bos_policy": arguments.bos,
        "sources": json.dumps([{"name": p.name, "sha256": hashlib.sha256(p.read_bytes()).hexdigest()}
                               for p in arguments.sources]),
    })
    print(f"{arguments.output}: {rows.shape[0]} sequences of {rows.shape[1]}, {int(lengths.sum())} tokens "
          f"({sum(map(len, documents))} in the text)")


if __name__ == "__main__":
    main()
