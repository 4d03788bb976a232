#!/usr/bin/env bash
# Makes the model and the token files that configs/quickstart.yaml and configs/smollm2-w3.yaml name, unless they exist.
# Everything comes from Python packages that launch/setup.sh installed; nothing is downloaded.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=.venv/bin/python
model=models/smollm2-135m
data=data/quickstart

"$python" tools/python/prepare_smollm2.py --output "$model"
if [[ ! -f $data/calibration.txt || ! -f $data/test.txt ]]; then
  "$python" tools/python/real_text.py --output "$data"
fi
tokens() { # name, length, sequences
  if [[ ! -f $data/$1.safetensors || $model/tokenizer.json -nt $data/$1.safetensors ]]; then
    "$python" tools/python/prepare_tokens.py --tokenizer "$model/tokenizer.json" --length "$2" --sequences "$3" \
      --output "$data/$1.safetensors" "$data/$1.txt"
  fi
}
tokens calibration 1024 128
tokens test 2048 40
