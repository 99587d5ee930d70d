#!/usr/bin/env bash
# wheel_test.sh WHEEL [PYTEST ARGUMENTS]: tests a wheel as a user's machine would run it: installed into
# an environment of its own, in a folder with a copy of tests/ and nothing else of the repository, with
# neither compiler nor CUDA on the PATH. Without arguments: extension, kernels, cache, transformers.
#
#   PYTHON=python3.12      whose wheel it is
#   TORCH=torch==2.13.0    installed first, as may be others: 'torch==2.4.1 transformers==5.7.0';
#                          empty: use PYTHON's own torch and packages, install nothing else
set -euo pipefail
wheel=$(realpath "${1:?a wheel}")
shift
python=${PYTHON:-python3}
read -ra torch <<<"${TORCH-torch==2.13.0}"
repository=$(realpath "$(dirname "$0")/..")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

cp -r "$repository/tests" "$work/tests"
sed -n '/^\[tool.pytest.ini_options\]/,/^$/p' "$repository/pyproject.toml" >"$work/pyproject.toml"
python=$("$python" -c 'import sys; print(sys.executable)')
cd "$work"
if [ ${#torch[@]} -gt 0 ]; then
  "$python" -m venv env
  env/bin/python -m pip --disable-pip-version-check install --quiet "${torch[@]}"
  env/bin/python -m pip --disable-pip-version-check install --quiet "$wheel[test]"
else
  "$python" -m venv --system-site-packages env
  # PYTHON may be of a virtual environment itself, whose packages another one does not see
  "$python" -c 'import site; print(*site.getsitepackages(), sep="\n")' >packages
  mv packages "$(env/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/packages.pth"
  env/bin/python -m pip --disable-pip-version-check install --quiet --no-index --no-deps --force-reinstall "$wheel"
fi

# LD_LIBRARY_PATH: in containers the driver is found by it
run=(env -i HOME="$work" PATH="$work/env/bin" LD_LIBRARY_PATH="${LD_LIBRARY_PATH:-}" OMP_NUM_THREADS=2)
"${run[@]}" env/bin/python - <<'END'
import pathlib, shutil, sys, torch, kvquant
assert pathlib.Path(kvquant.__file__).is_relative_to(sys.prefix), kvquant.__file__
assert not any(map(shutil.which, ("gcc", "cc", "g++", "c++", "clang", "nvcc", "ld"))), "a compiler"
print(f"kvquant {kvquant.__version__}, torch {torch.__version__}, Python {sys.version.split()[0]}")
END
"${run[@]}" env/bin/kvquant info
if [ $# = 0 ]; then
  set -- tests/kernels tests/cache/test_{cache,cache_paged,serialize}.py tests/package/test_{build,typing,vendoring}.py \
    tests/integrations/test_transformers.py
fi
"${run[@]}" env/bin/python -m pytest -q -p no:cacheprovider -n auto "$@"
