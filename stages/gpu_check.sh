#!/bin/sh
# The check of a GPU from a bare checkout, without a network: `logit-cache gpu-check` with the python that is there.
#   stages/gpu_check.sh --json gpu.json
# WHEELS (by default the folder wheels of the checkout) holds what this python lacks of the dependencies in
# pyproject.toml and of theirs, as wheels (`pip download --no-deps`, for that machine); PYTHON names another
# python. torch, triton and transformers are those of the machine.
set -e
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
wheels=${WHEELS:-$root/wheels}
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
if ls "$wheels"/*.whl >/dev/null 2>&1; then
  "$python" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --target "$site" "$wheels"/*.whl
fi
PYTHONPATH="$root/.src:$site${PYTHONPATH:+:$PYTHONPATH}" "$python" -m logit_cache gpu-check "$@"
