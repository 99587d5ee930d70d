#!/usr/bin/env bash
# wheel_smoke.sh WHEEL: a wheel with nothing but torch, in an environment of its own: `kvquant info`, and
# a user's module. PYTHON and TORCH as for wheel_test.sh.
set -euo pipefail
wheel=$(realpath "${1:?a wheel}")
sample=$(realpath "$(dirname "$0")/../tests/package/sample.py")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cp "$sample" "$work"
cd "$work"
"${PYTHON:-python3}" -m venv env
env/bin/python -m pip --disable-pip-version-check install --quiet "${TORCH:-torch==2.13.0}"
env/bin/python -m pip --disable-pip-version-check install --quiet "$wheel"
env/bin/kvquant info
env/bin/python -W error::UserWarning:kvquant sample.py
