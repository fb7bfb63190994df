#!/usr/bin/env bash
# One node, one process, every GPU that it has.
#
#   launch/gpu_node.sh --config=configs/pretrain.py:qwen2_5_vl_7b --workdir=DIR [--config.a.b=value ...]
#
# Environment: PYTHON (python), DRY_RUN=1 prints the command and starts nothing; XLA_FLAGS is added to.
set -euo pipefail

if [[ $# -eq 0 ]]; then
  echo "error: usage: launch/gpu_node.sh --config=FILE --workdir=DIR [--config.a.b=value ...]" >&2
  exit 2
fi
# jax takes 90 % of the memory at once; collectives are combined up to about one layer of a 7B in bfloat16.
layer=$((512 * 1024 * 1024))
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.9}
flags="--xla_gpu_all_gather_combine_threshold_bytes=$layer --xla_gpu_reduce_scatter_combine_threshold_bytes=$layer"
export XLA_FLAGS="${XLA_FLAGS:-} $flags"

command=("${PYTHON:-python}" -m latent_jax.main "$@")
if [[ ${DRY_RUN:-} ]]; then
  printf 'XLA_PYTHON_CLIENT_MEM_FRACTION=%q XLA_FLAGS=%q ' "$XLA_PYTHON_CLIENT_MEM_FRACTION" "$XLA_FLAGS"
  printf '%q ' "${command[@]}"
  echo
  exit 0
fi
# Without its CUDA plugin jax would train on the CPU, which is meant where JAX_PLATFORMS says so alone.
if [[ -z ${JAX_PLATFORMS:-} ]] && ! "${PYTHON:-python}" -c '
import importlib.util, sys
sys.exit(not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)))'; then
  echo "error: jax has no CUDA plugin here; expected pip install -c constraints.txt -e '.[cuda12]', or JAX_PLATFORMS=cpu" >&2
  exit 2
fi
exec "${command[@]}"
