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
case $first in
  address)
    preload=(asan stdc++)
    export ASAN_OPTIONS=detect_leaks=0  # Python's own
    ;;
  thread)
    preload=(tsan)
    # ignore_noninstrumented_modules: what torch's threads do looks like races, because its OpenMP is
    # not built for the sanitizer; the calls of our extension are checked.
    # intercept_tls_get_addr=0: GCC 12's runtime sometimes takes what lies before a new thread's
    # variables for their size, and ends the process over mapping that much.
    export TSAN_OPTIONS="ignore_noninstrumented_modules=1 intercept_tls_get_addr=0"
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
  # --capture=sys: a report goes past Python, which may not live to show it
  LD_PRELOAD=$libraries "${run[@]}" -m pytest -q -p no:cacheprovider --capture=sys -k 'not cuda' \
    tests/kernels/test_{threads,append,attention,gather,matmul,quantize}.py "$@"
done
