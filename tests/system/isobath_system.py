"""What the system tests share: a tiny random Llama, token files, and the real program under mpirun.

Each script is run as `python script.py <isobath binary>` (or with ISOBATH_BINARY set) and ends with 0 or an AssertionError.
"""
import copy
import hashlib
import json
import os
import pathlib
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time

import numpy

BLOCKS, HIDDEN, HEADS, KV_HEADS, D_FF, VOCAB = 4, 64, 4, 2, 128, 256
SEQUENCES, LENGTH = 8, 32
# A run of the tiny model takes a few seconds; far beyond that it hangs.
TIME_LIMIT_S = 120
# mpirun ends a job about 1 s after a rank died; the rest is for a busy machine.
END_AFTER_DEATH_S = 20
# ISOBATH_TEST_DEVICE=cuda runs the same tests on a GPU, which all ranks may share.
DEVICE = os.environ.get("ISOBATH_TEST_DEVICE", "cpu")

ENVIRONMENT = dict(
    os.environ,
    OMPI_ALLOW_RUN_AS_ROOT="1",
    OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1",
    OMPI_MCA_rmaps_base_oversubscribe="1",
    OMPI_MCA_hwloc_base_binding_policy="none",
    OMP_NUM_THREADS="1",
)


def binary():
    found = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("ISOBATH_BINARY")
    assert found, "name the isobath binary as the argument or in ISOBATH_BINARY"
    return found


def seeded_random():
    """Random moments differ from run to run; ISOBATH_TEST_SEED repeats those of a failed one."""
    seed = int(os.environ.get("ISOBATH_TEST_SEED", time.time_ns() % 1_000_000))
    print(f"ISOBATH_TEST_SEED={seed}", flush=True)
    return random.Random(seed)


def encode(array, dtype):
    """Little-endian bytes; bf16 is rounded to nearest even, as numpy has no such type."""
    if dtype == "F32":
        return numpy.ascontiguousarray(array, "<f4").tobytes()
    if dtype == "I32":
        return numpy.ascontiguousarray(array, "<i4").tobytes()
    bits = numpy.ascontiguousarray(array, "<f4").view("<u4")
    rounded = (bits.astype("u8") + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return numpy.where(numpy.isnan(array), 0x7FC0, rounded).astype("<u2").tobytes()


def write_safetensors(path, tensors, metadata=None):
    """tensors: name -> (array, dtype name)."""
    header, data = {"__metadata__": metadata or {"format": "pt"}}, b""
    for name, (array, dtype) in tensors.items():
        raw = encode(array, dtype)
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def model_weights(seed):
    generator = numpy.random.default_rng(seed)

    def normal(*shape):
        return generator.normal(0.0, 0.6 / numpy.sqrt(shape[-1]), shape)

    head_dim = HIDDEN // HEADS
    weights = {"model.embed_tokens.weight": generator.normal(0.0, 1.0, (VOCAB, HIDDEN))}
    for block in range(BLOCKS):
        prefix = f"model.layers.{block}"
        for name, rows, columns in (
            ("self_attn.q_proj", HEADS * head_dim, HIDDEN),
            ("self_attn.k_proj", KV_HEADS * head_dim, HIDDEN),
            ("self_attn.v_proj", KV_HEADS * head_dim, HIDDEN),
            ("self_attn.o_proj", HIDDEN, HEADS * head_dim),
            ("mlp.gate_proj", D_FF, HIDDEN),
            ("mlp.up_proj", D_FF, HIDDEN),
            ("mlp.down_proj", HIDDEN, D_FF),
        ):
            weights[f"{prefix}.{name}.weight"] = normal(rows, columns)
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{prefix}.{name}.weight"] = generator.uniform(0.8, 1.2, HIDDEN)
    weights["model.norm.weight"] = generator.uniform(0.8, 1.2, HIDDEN)
    weights["lm_head.weight"] = normal(VOCAB, HIDDEN)
    return weights


def write_model(directory, dtype="bfloat16", seed=1, weights=None, changes=None):
    """A Llama checkpoint of two shards with an index. changes: keys of config.json that differ."""
    directory.mkdir(parents=True)
    weights = model_weights(seed) if weights is None else weights
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": D_FF,
        "num_hidden_layers": BLOCKS, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS,
        "head_dim": HIDDEN // HEADS, "vocab_size": VOCAB, "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "rope_scaling": None, "hidden_act": "silu", "attention_bias": False, "mlp_bias": False,
        "tie_word_embeddings": False, "torch_dtype": dtype, "bos_token_id": 1, "eos_token_id": 2,
    }
    config.update(changes or {})
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    (directory / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": {"type": "WordLevel", "vocab": {}}}))
    stored = "BF16" if dtype == "bfloat16" else "F32"
    names, weight_map = list(weights), {}
    for index, share in enumerate((names[: len(names) // 2], names[len(names) // 2:])):
        shard = f"model-{index + 1:05}-of-00002.safetensors"
        write_safetensors(directory / shard, {name: (weights[name], stored) for name in share})
        weight_map.update({name: shard for name in share})
    size = sum(w.size * (2 if stored == "BF16" else 4) for w in weights.values())
    (directory / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map}, indent=2))
    return directory


def write_tokens(path, sequences=SEQUENCES, length=LENGTH, seed=2, tokens=None, lengths=None):
    if tokens is None:
        # Runs of equal tokens give the random model something to be more or less certain about.
        tokens = numpy.random.default_rng(seed).integers(0, VOCAB, (sequences, length // 2)).repeat(2, axis=1)
    tensors = {"tokens": (tokens, "I32")} | ({} if lengths is None else {"lengths": (numpy.array(lengths), "I32")})
    write_safetensors(path, tensors, {"format": "pt", "vocab_size": str(VOCAB)})
    return path


# Everything that carries more state through the quantize pass: token weights measured again, the stream of the original
# model, refined codes, shrunk weights.
EVERYTHING_ON = ("quantization.reestimate={policy: every, blocks: 2}", "quantization.asymmetric={correction: qep}",
                 "quantization.refinement={sweeps: 2}", "sensitivity.shrinkage=auto")
# Before some blocks D is measured again, before others the one in use is kept (same_bytes.py looks); by the divergence from
# the original, whose last hidden states no generation holds; row groups of whole heads.
# GPTQ alone: without what the defaults add to it.
PLAIN = ("quantization.asymmetric={correction: none}", "quantization.refinement={sweeps: 0}", "sensitivity.shrinkage=0")
DRIFTING = ("quantization.reestimate={policy: drift, blocks: 1, threshold: 0.94, probe_sequences: 3, loss: kl, track: true}",
            "sensitivity.row_groups=2", "sensitivity.grouping=head")

# What the others leave out: gptaq, drawn labels, exact sums of sequences, H of the original model, zero points, act-order,
# refinement until nothing is gained, two widths; divergences are tracked and D is never measured again.
OTHERWISE = ("sensitivity={loss: fisher, samples: 2, per_sequence: exact, covariance: true}", "quantization.symmetric=false",
             "quantization.asymmetric={correction: gptaq, strength: 0.25}", "quantization.act_order=static",
             "quantization.refinement.sweeps=1000", "quantization.overrides=[{match: 're:.*down_proj', bits: 2}]",
             "quantization.reestimate={track: true, probe_sequences: 3}")

# Scales tuned with fewer steps than logical shards; with more row groups than it needs.
TUNED = ("quantization.tuning={epochs: 2, steps: 3, rate: 0.01}", "sensitivity.row_groups=2")

# Row groups that are measured, kept while D is measured again, and whose rows the solver takes out of their places.
CLUSTERED = ("sensitivity.row_groups=2", "sensitivity.grouping=cluster", "sensitivity.grouping_sequences=3",
             "quantization.reestimate={policy: every, blocks: 2}", "quantization.asymmetric={correction: qep}",
             "quantization.refinement={sweeps: 1}")


class Workspace:
    """A temporary directory with a model, tokens and a configuration; removed at the end unless ISOBATH_TEST_KEEP is set."""

    def __init__(self, dtype="bfloat16"):
        self.path = pathlib.Path(tempfile.mkdtemp(prefix="isobath-system-"))
        self.model = write_model(self.path / "model", dtype)
        self.calibration = write_tokens(self.path / "calibration.safetensors", seed=2)
        self.test = write_tokens(self.path / "test.safetensors", seed=3)

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if os.environ.get("ISOBATH_TEST_KEEP"):
            print(f"kept {self.path}")
        else:
            shutil.rmtree(self.path, ignore_errors=True)

    def config(self, output, **sections):
        """Path of a configuration file; JSON is YAML. sections are merged over the tiny default."""
        values = {
            "model": str(self.model), "output": str(self.path / output),
            "ranks": {"threads": 1, "device": DEVICE, "watchdog_s": 60},
            "calibration": {"tokens": str(self.calibration), "sequences": SEQUENCES, "length": LENGTH, "microbatch": 1,
                            "logical_shards": 4},
            "quantization": {"bits": 3, "group": 32},
            "evaluation": {"tokens": str(self.test), "window": LENGTH, "windows": 4},
            "checkpoint": {"every_blocks": 1},
        }
        values = copy.deepcopy(values)
        for name, section in sections.items():
            if isinstance(section, dict):
                values.setdefault(name, {}).update(section)
            else:
                values[name] = section
        path = self.path / f"{output}.yaml"
        path.write_text(json.dumps(values, indent=2))
        return path


def command(config, stages=1, replicas=1, settings=(), resume=False, ranks=None):
    line = [os.environ.get("ISOBATH_MPIEXEC", "mpirun"), "--quiet", "-n", str(ranks or stages * replicas), binary(), "run",
            str(config)]
    for setting in (f"ranks.stages={stages}", f"ranks.replicas={replicas}", *settings):
        line += ["--set", setting]
    return line + ([] if not resume else ["--resume" if resume is True else f"--resume-{resume}"])


class Job:
    """A running isobath; use `wait`."""

    def __init__(self, config, environment=None, **arguments):
        self.line = command(config, **arguments)
        self.process = subprocess.Popen(self.line, env=ENVIRONMENT | (environment or {}), stdout=subprocess.PIPE,
                                        stderr=subprocess.PIPE, text=True, start_new_session=True)
        self.began = time.monotonic()

    def wait(self, limit_s=TIME_LIMIT_S):
        try:
            self.stdout, self.stderr = self.process.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.stdout, self.stderr = self.process.communicate()
            raise AssertionError(f"still running after {limit_s} s: {' '.join(self.line)}\n{self.stderr}")
        self.seconds = time.monotonic() - self.began
        self.code = self.process.returncode
        return self

    def running(self):
        return self.process.poll() is None

    def wait_for(self, condition, limit_s=60):
        """Whether the condition came true while the job was running."""
        deadline = time.monotonic() + limit_s
        while self.running() and time.monotonic() < deadline:
            if condition():
                return True
            time.sleep(0.005)
        return False

    def ranks(self):
        """Process ids of the ranks, in rank order."""
        children = pathlib.Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        try:
            pids = [int(pid) for pid in children.read_text().split()]
        except FileNotFoundError:
            return []
        of_rank = {}
        for pid in pids:
            try:
                found = re.search(rb"OMPI_COMM_WORLD_RANK=(\d+)", pathlib.Path(f"/proc/{pid}/environ").read_bytes())
            except (FileNotFoundError, ProcessLookupError):
                continue
            if found:
                of_rank[int(found.group(1))] = pid
        return [of_rank[rank] for rank in sorted(of_rank)]

    def errors(self):
        """The error messages that were printed."""
        return re.findall(r"\berror: .*", self.stderr)


def run(config, **arguments):
    return Job(config, **arguments).wait()


def run_well(config, **arguments):
    job = run(config, **arguments)
    assert job.code == 0, f"exit code {job.code}: {' '.join(job.line)}\n{job.stderr}"
    return job


def digests_of(output, files):
    return {str(path.relative_to(output)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(files)}


def result_digests(output):
    """SHA-256 of every file that the promise of equal bytes speaks of."""
    output = pathlib.Path(output)
    files = [path for folder in ("model", "measure") for path in (output / folder).rglob("*") if path.is_file()]
    files += [output / "evaluation.json", output / "modules.json", output / "blocks.json"]
    digests = digests_of(output, files)
    for needed in ("model/config.json", "evaluation.json"):
        assert needed in digests, f"{output} lacks {needed}"
    assert any(name.startswith("measure/") for name in digests), f"{output} lacks statistics"
    return digests


def reestimations(output):
    """What was decided about measuring D again, without the times."""
    path = pathlib.Path(output) / "reestimations.json"
    if not path.exists():
        return []
    return [{key: value for key, value in record.items() if not key.startswith("seconds")}
            for record in json.loads(path.read_text())]


def assert_same_bytes(expected, found, what):
    assert expected.keys() == found.keys(), f"{what}: other files: {sorted(expected.keys() ^ found.keys())}"
    different = [name for name in expected if expected[name] != found[name]]
    assert not different, f"{what}: these files differ: {different}"
