#!/usr/bin/env bash
# sanitize_cpu.sh SANITIZERS [PYTEST ARGUMENTS]: the CPU kernels under address,undefined or thread.
# Builds an extension of its own in build/sanitize and runs tools/sanitize.py and the kernels' tests
# on it, once an instruction set. Needs an environment with kvquant's test requirements.
set -euo pipefail
cd "$(dirname "$0")/.."
sanitizers=${1:?address,undefined or thread}
shift
python=${PYTHON:-python3}
first=${sanitizers%%,*}
site=$PWD/build/sanitize/$first
"$python" -m pip --disable-pip-version-check install --quiet --no-build-isolation --no-deps \
  --upgrade --target "$site" -C build-dir="$site-build" -C install.strip=false \
  -C cmake.define.KVQUANT_CUDA=OFF -C cmake.define.KVQUANT_SANITIZE="$sanitizers" .

isas=$("$python" -c 'from kvquant.backends import build_info; print(*build_info()["cpu_isas"])')
# -S: without the path entries of an editable install, which would come before ours.
packages=$("$python" -c 'import os, sys; print(os.pathsep.join(p for p in sys.path if "site-packages" in p))')
export PYTHONPATH=$site:$packages OMP_NUM_THREADS=2
run=("$python" -S)
tests=(tests/test_threads.py)
case $first in
  address)
    preload=(asan stdc++)
    export ASAN_OPTIONS=detect_leaks=0  # Python's own
    tests+=(tests/test_{append,attention,gather,matmul,quantize}.py)
    ;;
  thread)
    preload=(tsan)
    # What torch does in its threads is not ours to judge, and looks like races: its OpenMP is not
    # built for the sanitizer.
    export TSAN_OPTIONS="ignore_noninstrumented_modules=1 ignore_interceptors_accesses=1"
    run=(setarch -R "${run[@]}")  # the sanitizer knows the memory map without randomisation
    ;;
esac
libraries=
for name in "${preload[@]}"; do
  libraries+="$(${CXX:-c++} -print-file-name="lib$name.so") "
done
for isa in ${KVQUANT_CPU_ISA:-$isas}; do
  export KVQUANT_CPU_ISA=$isa
  echo "$sanitizers, $isa"
  LD_PRELOAD=$libraries "${run[@]}" tools/sanitize.py --device cpu | tail -n 1
  LD_PRELOAD=$libraries "${run[@]}" -m pytest -q -p no:cacheprovider -k 'not cuda' "${tests[@]}" "$@"
done
