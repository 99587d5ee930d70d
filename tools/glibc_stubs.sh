#!/usr/bin/env bash
# glibc_stubs.sh FOLDER: stubs of glibc 2.28 for the link step (cmake/KvquantGlibcStubs.cmake).
# zig makes them as a by-product of linking anything for an older glibc; needs `pip install ziglang`.
set -euo pipefail
out=${1:?folder for the stubs}
version=${KVQUANT_GLIBC:-2.28}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
echo 'int main(void) { return 0; }' >"$work/a.c"
ZIG_GLOBAL_CACHE_DIR=$work/cache ZIG_LOCAL_CACHE_DIR=$work/cache \
  "${PYTHON:-python3}" -m ziglang cc -target "$(uname -m)-linux-gnu.$version" -o "$work/a" "$work/a.c"
libc=$(find "$work/cache" -name libc.so.6 | head -n 1)
mkdir -p "$out"
cp "$(dirname "${libc:?zig made no stubs}")"/lib*.so* "$out"
ls "$out"
