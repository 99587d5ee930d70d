#!/usr/bin/env bash
# test_aarch64.sh [PYTEST ARGUMENTS]: the CPU kernels cross-compiled for aarch64 and tested under
# qemu-user, on any Debian machine with g++-aarch64-linux-gnu, qemu-user-static and debootstrap.
# Everything lies in build/aarch64: an arm64 Debian with its Python, torch for it, and our build.
#
#   KVQUANT_CPU_ISA=neon    one instruction set instead of each
#   TORCH=torch==2.4.1      another torch (a CPU build for aarch64; numpy<2 comes with versions before 2.5)
#   DEBIAN_MIRROR=http://…  where debootstrap finds Debian
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
torch=${TORCH:-torch==2.9.1}
here=$PWD/build/aarch64
root=$here/root site=$here/$torch package=$here/package
mkdir -p "$here"

if [ ! -e "$root/usr/bin/python3.11" ]; then  # bookworm's; unpacked only, nothing in it runs as root
  debootstrap --foreign --arch=arm64 --variant=minbase --include=python3,libpython3.11-dev,libgomp1 \
    bookworm "$root" ${DEBIAN_MIRROR:+"$DEBIAN_MIRROR"} >"$here/debootstrap.log"
  for package_file in "$root"/var/cache/apt/archives/*.deb; do dpkg -x "$package_file" "$root"; done
fi
if [ ! -e "$site/torch" ]; then  # by name: pip would take this machine's requirements, CUDA's
  case $torch in torch==2.[0-4].*) numpy='numpy<2' ;; *) numpy=numpy ;; esac
  "$python" -m pip --disable-pip-version-check install --quiet --no-deps --target "$site" \
    --platform manylinux_2_28_aarch64 --platform manylinux_2_17_aarch64 --platform manylinux2014_aarch64 \
    --python-version 3.11 --only-binary=:all: "$torch" "$numpy" typing_extensions sympy mpmath networkx \
    jinja2 MarkupSafe filelock fsspec pytest pluggy iniconfig packaging pygments pytest-timeout hypothesis \
    sortedcontainers attrs
fi

cmake -S . -B "$here/cmake" -G Ninja -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
  -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ -DCMAKE_CXX_FLAGS="-idirafter $root/usr/include" \
  -DKVQUANT_CUDA=OFF -DPython_EXECUTABLE="$(command -v "$python")" \
  -DPython_INCLUDE_DIR="$root/usr/include/python3.11" \
  -DPYTHON_MODULE_EXTENSION=.cpython-311-aarch64-linux-gnu.so \
  -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)" >/dev/null
cmake --build "$here/cmake" -- -v >"$here/build.log"
rm -rf "$package"
mkdir "$package"
cp -r src/kvquant "$package"
rm -f "$package"/kvquant/_C*
cp "$here/cmake/"_C.*.so "$package/kvquant"

run=(env PYTHONPATH="$package:$site" OMP_NUM_THREADS=2 qemu-aarch64-static -L "$root" "$root/usr/bin/python3.11")
isas=$("${run[@]}" -c 'from kvquant.backends import build_info; print(*build_info()["cpu_isas"])')
for isa in ${KVQUANT_CPU_ISA:-$isas}; do
  echo "aarch64, $torch, $isa"
  KVQUANT_CPU_ISA=$isa "${run[@]}" -m pytest -q -p no:cacheprovider -o timeout=1200 \
    -k 'not cuda' "${@:-tests/kernels}"
done
