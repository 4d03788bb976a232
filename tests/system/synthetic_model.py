"""A synthetic checkpoint of a real shape passes check, plan, run and inspect; the run tells its predicted and measured cost."""
import json
import pathlib
import shutil
import subprocess
import sys
import tempfile

import numpy

from isobath_system import DEVICE, ENVIRONMENT, TIME_LIMIT_S, binary

TOOL = pathlib.Path(__file__).resolve().parents[2] / "tools/python/make_synthetic.py"
BLOCKS, VOCAB, LENGTH = 2, 96, 16
# A small Llama with grouped queries, of the keys that a published config.json has.
SHAPE = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 128,
         "num_hidden_layers": 8, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 128256,
         "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "hidden_act": "silu",
         "tie_word_embeddings": False, "torch_dtype": "bfloat16", "bos_token_id": 128000, "eos_token_id": [128001, 128008]}


def call(*words, ranks=1, code=0):
    line = (["mpirun", "--quiet", "-n", str(ranks)] if ranks > 1 else []) + [str(word) for word in words]
    job = subprocess.run(line, env=ENVIRONMENT, capture_output=True, text=True, timeout=TIME_LIMIT_S)
    assert job.returncode == code, f"exit code {job.returncode}, not {code}: {' '.join(line)}\n{job.stdout}\n{job.stderr}"
    return job


def read_safetensors(path):
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:8 + size])
    header.pop("__metadata__")
    return {name: (entry, raw[8 + size + entry["data_offsets"][0]:8 + size + entry["data_offsets"][1]])
            for name, entry in header.items()}


def values(entry, raw):
    assert entry["dtype"] == "BF16"
    return (numpy.frombuffer(raw, "<u2").astype("<u4") << 16).view("<f4").reshape(entry["shape"])


def check_model(directory):
    """Shards, index and scales are what the tool promises."""
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    tensors = {}
    for shard in set(index["weight_map"].values()):
        tensors.update(read_safetensors(directory / shard))
    assert set(index["weight_map"]) == set(tensors) and len(tensors) == 3 + 9 * BLOCKS, sorted(tensors)
    assert len(set(index["weight_map"].values())) > 1, "one shard: the limit was not kept"
    # 4096 and more draws: the sample deviation is within 5 % of the true one beyond any doubt.
    for name, expected in (("model.embed_tokens", 0.02), ("model.layers.1.mlp.gate_proj", 64 ** -0.5),
                           ("model.layers.1.mlp.down_proj", 128 ** -0.5 * (2 * BLOCKS) ** -0.5),
                           ("model.layers.0.self_attn.o_proj", 64 ** -0.5 * (2 * BLOCKS) ** -0.5)):
        found = values(*tensors[name + ".weight"]).std()
        assert abs(found / expected - 1) < 0.05, f"{name}: deviation {found}, not {expected}"
    assert (values(*tensors["model.norm.weight"]) == 1).all()


def main():
    isobath = binary()
    space = pathlib.Path(tempfile.mkdtemp(prefix="isobath-synthetic-"))
    try:
        (space / "shape").mkdir()
        (space / "shape/config.json").write_text(json.dumps(SHAPE))
        make = [sys.executable, TOOL, "--shape", space / "shape/config.json", "--blocks", BLOCKS, "--vocab", VOCAB,
                "--shard-gib", 1e-4]
        call(*make, "--output", space / "model", "--tokens", space / "tokens.safetensors", "--sequences", 4, "--length", LENGTH)
        check_model(space / "model")
        call(*make, "--output", space / "again")
        for path in (space / "model").iterdir():
            assert path.read_bytes() == (space / "again" / path.name).read_bytes(), f"{path.name} differs when made again"
        call(*make, "--output", space / "model", code=1)  # never over something

        call(isobath, "plan", "--calibrate", "--output", space / "cluster.yaml")
        config = space / "run.yaml"
        config.write_text(json.dumps({
            "model": str(space / "model"), "output": str(space / "run"), "ranks": {"threads": 1, "device": DEVICE, "watchdog_s": 60},
            "calibration": {"tokens": str(space / "tokens.safetensors"), "sequences": 4, "length": LENGTH, "logical_shards": 2},
            "quantization": {"bits": 3, "group": 32},
            "evaluation": {"tokens": str(space / "tokens.safetensors"), "window": LENGTH, "windows": 2},
            "plan": {"cluster": str(space / "cluster.yaml")}}))
        call(isobath, "check", config, "--ranks", 2)
        call(isobath, "plan", config, "--ranks", 2, "--json", space / "plan.json")
        plan = json.loads((space / "plan.json").read_text())
        assert plan["stages"] * plan["replicas"] == 2 and plan["seconds"] > 0, plan

        # A description that is not there is known before the run directory is made.
        missing = f"plan.cluster={space / 'nowhere.yaml'}"
        for command in ("check", "run"):
            refused = call(isobath, command, config, "--set", missing, code=2)
            assert "nowhere.yaml" in refused.stderr, refused.stderr
        assert not (space / "run").exists()

        job = call(isobath, "run", config, "--set", "ranks.stages=2", ranks=2)
        for word in ("predicted s", "measured s", "load", "measure", "quantize", "evaluate"):
            assert word in job.stdout, f"no {word} in the closing summary:\n{job.stdout}"
        events = [json.loads(line) for line in (space / "run/events.jsonl").read_text().splitlines()]
        costs = {event["stage"]: event for event in events if event["event"] == "cost"}
        assert list(costs) == ["load", "measure", "quantize", "evaluate"], list(costs)
        for stage, cost in costs.items():
            assert cost["predicted_s"] > 0 and cost["measured_s"] > 0 and cost["measured_peak_bytes"] > 0, (stage, cost)
        assert not list((space / "run/model").glob("tokenizer*")), "a tokenizer that nobody gave"
        table = call(isobath, "inspect", space / "run/measure", "--top", 3).stdout
        call(isobath, "inspect", space / "run/measure", "--by", "block")
        assert f"{7 * BLOCKS} modules of {BLOCKS} blocks" in table, table

        # A machine that is too small is refused before anything starts, as a configuration.
        small = (space / "cluster.yaml").read_text().replace("node_gib:", "node_gib: 0.1  #")
        (space / "small.yaml").write_text(small)
        refused = call(isobath, "plan", config, "--cluster", space / "small.yaml", code=2)
        assert "smallest that would do" in refused.stderr, refused.stderr
    finally:
        shutil.rmtree(space, ignore_errors=True)


if __name__ == "__main__":
    main()
