#!/usr/bin/env bash
# The CUDA compiler and static runtime inside a manylinux_2_28 container, about 300 MB.
# 12.9, not 13: wheels then run on drivers from 525 on. KVQUANT_CUDA_REPO is the address of the
# .repo file of NVIDIA's packages for rhel8 and this processor.
set -euo pipefail
version=${KVQUANT_CUDA_VERSION:-12-9}
dnf -y install dnf-plugins-core
dnf config-manager --add-repo "${KVQUANT_CUDA_REPO:?address of the .repo file}"
dnf -y install --setopt=install_weak_deps=False \
  "cuda-nvcc-$version" "cuda-cudart-devel-$version" "cuda-cccl-$version"
ln -sfn "/usr/local/cuda-${version/-/.}" /usr/local/cuda
/usr/local/cuda/bin/nvcc --version
