#!/usr/bin/env bash
# The stages of `make test`, in order, each with its wall time. Stops at the first that fails.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 JAX_PLATFORMS=cpu

times=""
stage() {
  local name="$1" start
  shift
  echo "== $name"
  start=$(date +%s)
  "$@" || { status=$?; echo "== $name failed with status $status"; exit "$status"; }
  times+=$(printf '%-14s %4d s' "$name" "$(($(date +%s) - start))")$'\n'
}

bin=.venv/bin
stage install make --no-print-directory install-dev
stage lint "$bin/ruff" check .
stage types "$bin/mypy"
stage contract "$bin/python" tools/contract.py --check
stage sample "$bin/core" fetch-sample
stage tests "$bin/pytest" -q -n 2 --dist loadfile -m "not slow"
printf '== time of each stage\n%s' "$times"
