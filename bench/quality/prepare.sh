#!/usr/bin/env bash
# Makes what the matrices of bench/quality name, unless it exists: the two models, and for each a token file that calibration
# samples are drawn from and one for evaluation. Everything comes from installed Python packages (launch/setup.sh test).
# The small model is trained, EPOCHS passes over 2.6 MB of text (default 3: 15 min on two cores). With WIKITEXT=FOLDER, which
# holds valid-tokens.txt and wiki.test.raw of WikiText-2, token files of that text are made as well (`wikitext` in the matrices).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python=.venv/bin/python
data=data/quality
mkdir -p "$data"

if [[ ! -f $data/calibration.txt || ! -f $data/test.txt ]]; then
  "$python" tools/python/real_text.py --output "$data" --packages numpy torch transformers sympy networkx
fi
"$python" tools/python/prepare_smollm2.py --output models/smollm2-135m
if [[ ! -f models/small/tokenizer_config.json ]]; then
  "$python" tools/python/train_small.py --output models/small --epochs "${EPOCHS:-3}" --threads 2 "$data/calibration.txt"
fi
tokens() { # name, model, tokens of a row
  local part
  for part in calibration test; do
    if [[ ! -f $data/$1-$part.safetensors || $2/tokenizer.json -nt $data/$1-$part.safetensors ]]; then
      "$python" tools/python/prepare_tokens.py --tokenizer "$2/tokenizer.json" --length "$3" \
        --output "$data/$1-$part.safetensors" "$data/$part.txt"
    fi
  done
}
tokens small models/small 512
tokens smollm2 models/smollm2-135m 1024
if [[ -n ${WIKITEXT:-} ]]; then
  wikitext() { # part, text, options
    [[ -f $data/wikitext-$1.safetensors ]] && return
    "$python" tools/python/prepare_tokens.py --tokenizer models/smollm2-135m/tokenizer.json --length 1024 "${@:3}" \
      --output "$data/wikitext-$1.safetensors" "$WIKITEXT/$2"
  }
  wikitext calibration valid-tokens.txt --wikitext-detokenize
  wikitext test wiki.test.raw
fi
