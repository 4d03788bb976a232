"""What the scripts that run other quantizers have in common: one command line, isobath's token files, one JSON line.

Imports nothing heavy: `arguments()` is called before torch is imported, so that threads are set in time.
"""
import argparse
import json
import os
import time
from importlib.metadata import version


def arguments(description, extend=None):
    """Parses MODEL TOKENS OUTPUT and the options that all peers share; `extend(parser)` adds a peer's own."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="Hugging Face model directory")
    parser.add_argument("tokens", help="isobath's token file (safetensors)")
    parser.add_argument("output", help="directory of the checkpoint, judged by `isobath evaluate --checkpoint`")
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--asymmetric", action="store_true")
    parser.add_argument("--sequences", type=int, default=0, help="rows taken from the start of the file; 0: all")
    parser.add_argument("--length", type=int, default=0, help="tokens taken from the start of each row; 0: all")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16",
                        help="in which the peer computes; float32 is the faster one on CPUs without bf16 units")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    if extend:
        extend(parser)
    found = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(found.threads)
    if found.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # some take a GPU wherever they see one
    return found


def read_tokens(options):
    """Rows of the token file as lists of ids. Only full rows: the peers here are given no padding."""
    from safetensors.torch import load_file
    file = load_file(options.tokens)
    tokens = file["tokens"]
    n_rows, n_tokens = options.sequences or tokens.shape[0], options.length or tokens.shape[1]
    if n_rows > tokens.shape[0] or n_tokens > tokens.shape[1]:
        raise SystemExit(f"{options.tokens}: asked for {n_rows} rows of {n_tokens} tokens, the file has {list(tokens.shape)}")
    if "lengths" in file and int(file["lengths"][:n_rows].min()) < n_tokens:
        raise SystemExit(f"{options.tokens}: rows shorter than {n_tokens} tokens; pack the text (prepare_tokens.py --pack)")
    return tokens[:n_rows, :n_tokens].tolist()


def save_plain(model, tokenizer, output):
    """Writes the weights as a bf16 checkpoint without quantization_config, for peers whose format isobath does not read."""
    import torch
    model.to(torch.bfloat16)
    for holder in (model, model.config):
        if hasattr(holder, "quantization_config"):
            delattr(holder, "quantization_config")
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)


def cpu_seconds():
    """Of all threads of this process and of the children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


class Clock:
    """Times of a peer: the quantization alone (`with clock`) and since the process began (`saved`), on the wall and in CPU
    seconds of all threads, which tell on a busy machine what the wall does not.
    """

    def __init__(self):
        self.quantize_s = self.quantize_cpu_s = self.total_s = self.cpu_s = 0.0

    def __enter__(self):
        self.quantize_s, self.quantize_cpu_s = -time.perf_counter(), -cpu_seconds()
        return self

    def __exit__(self, *_):
        self.quantize_s += time.perf_counter()
        self.quantize_cpu_s += cpu_seconds()

    def saved(self):
        """To be called when the peer's own checkpoint is on disk; what follows (decoding it) is not the peer's work."""
        import psutil
        self.total_s = time.time() - psutil.Process().create_time()
        self.cpu_s = cpu_seconds()


def report(options, peer, packages, clock, n_rows, n_tokens, **more):
    """Prints one JSON object on a line of its own, the last of the output."""
    import resource
    print(json.dumps({
        "peer": peer, "versions": {name: version(name) for name in [*packages, "torch", "transformers"]},
        "bits": options.bits, "group": options.group, "symmetric": not options.asymmetric, "dtype": options.dtype,
        "device": options.device,
        "sequences": n_rows, "length": n_tokens, "threads": options.threads, **more,
        "quantize_s": round(clock.quantize_s, 1), "quantize_cpu_s": round(clock.quantize_cpu_s, 1),
        "total_s": round(clock.total_s, 1), "cpu_s": round(clock.cpu_s, 1),
        "peak_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 3)}), flush=True)
