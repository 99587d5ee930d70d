# Decides whether there are CUDA kernels and for which GPUs. Sets KVQUANT_WITH_CUDA,
# KVQUANT_CUDA_ARCHS and KVQUANT_CUDA_OPTIONS.
#
# The compiler: CMAKE_CUDA_COMPILER, CUDACXX, PATH, CUDA_HOME, /usr/local/cuda, and last the nvcc
# of NVIDIA's Python packages, which _build_backend asks for where there is no other.

function(kvquant_find_nvcc out)
  if(CMAKE_CUDA_COMPILER)
    set(${out} "${CMAKE_CUDA_COMPILER}" PARENT_SCOPE)
    return()
  elseif(DEFINED ENV{CUDACXX})
    set(${out} "$ENV{CUDACXX}" PARENT_SCOPE)
    return()
  endif()
  find_program(nvcc nvcc HINTS ENV CUDA_HOME ENV CUDA_PATH PATHS /usr/local/cuda PATH_SUFFIXES bin NO_CACHE)
  if(NOT nvcc)
    execute_process(
      COMMAND "${Python_EXECUTABLE}" -c
        "import glob, sys; print(*[n for p in sys.path for n in glob.glob(p + '/nvidia/cu*/bin/nvcc')][:1])"
      OUTPUT_VARIABLE nvcc OUTPUT_STRIP_TRAILING_WHITESPACE)
    if(nvcc)
      # CMake looks for cudart in lib64; the packages have lib.
      cmake_path(GET nvcc PARENT_PATH root)
      cmake_path(GET root PARENT_PATH root)
      if(NOT EXISTS "${root}/lib64")
        file(CREATE_LINK "${root}/lib" "${root}/lib64" SYMBOLIC RESULT ignored)
      endif()
      set(CUDAToolkit_ROOT "${root}" CACHE PATH "" FORCE)
    endif()
  endif()
  set(${out} "${nvcc}" PARENT_SCOPE)
endfunction()

set(KVQUANT_WITH_CUDA OFF)
if(KVQUANT_CUDA STREQUAL "AUTO" OR KVQUANT_CUDA)
  kvquant_find_nvcc(nvcc)
  if(nvcc)
    set(CMAKE_CUDA_COMPILER "${nvcc}")
    set(CMAKE_CUDA_ARCHITECTURES 75)  # for CMake's check of the compiler
    enable_language(CUDA)
    set(KVQUANT_WITH_CUDA ON)
  elseif(NOT KVQUANT_CUDA STREQUAL "AUTO")
    message(FATAL_ERROR "KVQUANT_CUDA=${KVQUANT_CUDA}, but there is no nvcc: set CUDACXX or CUDA_HOME")
  endif()
endif()

if(KVQUANT_WITH_CUDA)
  if(NOT KVQUANT_CUDA_ARCHS)
    # Not 89: its machine code would be that of 86, bit for bit, which its GPUs run.
    set(KVQUANT_CUDA_ARCHS 75-real 80-real 86-real 90-real)
    if(CMAKE_CUDA_COMPILER_VERSION VERSION_GREATER_EQUAL 12.8)
      list(APPEND KVQUANT_CUDA_ARCHS 100-real 120-real)
    endif()
    # PTX of 90, not of 120: every later GPU's driver translates it.
    list(APPEND KVQUANT_CUDA_ARCHS 90-virtual)
  endif()
  set(KVQUANT_CUDA_OPTIONS --expt-relaxed-constexpr -Xcompiler=-Wall)
  if(CMAKE_CUDA_COMPILER_VERSION VERSION_GREATER_EQUAL 12.8)
    list(APPEND KVQUANT_CUDA_OPTIONS --compress-mode=size)  # to a fourteenth
  endif()
endif()
