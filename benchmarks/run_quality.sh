#!/usr/bin/env bash
# Everything behind benchmarks/results/quality-smollm2.json in one run on one GPU, all arms at once after the dense one:
#
#   benchmarks/run_quality.sh MODEL OUT     # then here: python benchmarks/quality_tables.py OUT/report.json
#
# MODEL is SmolLM2-135M-Instruct as tools/smollm2.py makes it.  OUT gets report.json, report.md and the pictures.
# TABLES=FILE for tables of your own making.  Paths count from the repository's root.
# JOBS=4 for a GPU with less memory: an engine takes about 5 GiB.  TASKS=loss,passkey:24 for less.  PYTHON=... for
# another interpreter.  Which of our ops run, CUDA or reference, is in the rows; HIERASPARSE_OPS=reference asks for those.
set -euo pipefail
cd "$(dirname "$0")/.."
model=${1:?usage: run_quality.sh MODEL OUT} out=${2:?usage: run_quality.sh MODEL OUT}
# All engines share the host's cores; their threads would only get in each other's way.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2} NUMBA_NUM_THREADS=${NUMBA_NUM_THREADS:-2} TOKENIZERS_PARALLELISM=false
exec "${PYTHON:-python3}" -c "import sys; from hierasparse_vllm.cli import main; sys.exit(main())" evaluate "$model" --out "$out" \
  --tables "${TABLES:-benchmarks/results/smollm2-tables.safetensors}" --seed 0 \
  --tasks "${TASKS:-loss,passkey:24,needles,multikey:8,key_value:8,variable_tracking:8,common_words:8}" \
  --max-num-batched-tokens 8192 --jobs "${JOBS:-11}" --kv-cache-gib 3
