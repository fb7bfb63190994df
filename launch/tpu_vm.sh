#!/usr/bin/env bash
# Every worker of a Cloud TPU slice, from a machine with gcloud; jax finds the others through the TPU's metadata.
#
#   TPU=NAME ZONE=ZONE launch/tpu_vm.sh --config=configs/pretrain.py:qwen2_5_vl_7b --workdir=DIR [--config.a.b=value ...]
#
# Once before: gcloud compute tpus tpu-vm ssh NAME --zone=ZONE --worker=all \
#   --command='git clone URL latent_jax && cd latent_jax && python3 -m venv .venv && \
#   .venv/bin/pip install -c constraints.txt -e .[tpu]'
# DIR must be on a file system that all workers see (a mounted bucket or Filestore).
# Environment: CHECKOUT (latent_jax) and PYTHON (.venv/bin/python), as seen on the workers; DRY_RUN=1 prints the command.
set -euo pipefail

if [[ $# -eq 0 || -z ${TPU:-} || -z ${ZONE:-} ]]; then
  echo "error: usage: TPU=NAME ZONE=ZONE launch/tpu_vm.sh --config=FILE --workdir=DIR [--config.a.b=value ...]" >&2
  exit 2
fi
remote=$(printf '%q ' "${PYTHON:-.venv/bin/python}" -m latent_jax.main "$@" --config.hosts.cluster=tpu)
command=(gcloud compute tpus tpu-vm ssh "$TPU" "--zone=$ZONE" --worker=all
  "--command=cd $(printf '%q' "${CHECKOUT:-latent_jax}") && exec $remote")
if [[ ${DRY_RUN:-} ]]; then
  printf '%q ' "${command[@]}"
  echo
  exit 0
fi
exec "${command[@]}"
