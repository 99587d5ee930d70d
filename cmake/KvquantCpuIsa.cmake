# kvquant_add_isa_variants(target source...): compiles each source once an instruction set.
#
# A source sees KVQUANT_ISA (avx512, avx2, neon or portable; the namespace its code must be in) and
# KVQUANT_ISA_<NAME>=1. Which one runs is decided at run time. The portable objects are linked
# first: a function that the compiler emits in several of them (an inline one of a header, outside
# the namespace) is then the one that runs everywhere.

set(KVQUANT_FLAGS_AVX2 -mavx2 -mfma -mf16c)
set(KVQUANT_FLAGS_AVX512 -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vnni -mfma -mf16c
    -mprefer-vector-width=512)

function(kvquant_add_isa_variants target)
  set(isas portable)
  if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
    target_compile_definitions(kvquant_flags INTERFACE KVQUANT_X86=1)
    list(APPEND isas avx2 avx512)
  elseif(CMAKE_SYSTEM_PROCESSOR MATCHES "aarch64|arm64")
    list(APPEND isas neon)  # every such processor has it
  endif()
  foreach(isa IN LISTS isas)
    if(NOT ARGN)
      break()
    endif()
    string(TOUPPER ${isa} ISA)
    add_library(kvquant_cpu_${isa} OBJECT ${ARGN})
    target_link_libraries(kvquant_cpu_${isa} PRIVATE kvquant_flags)
    target_compile_definitions(kvquant_cpu_${isa} PRIVATE KVQUANT_ISA=${isa} KVQUANT_ISA_${ISA}=1)
    target_compile_options(kvquant_cpu_${isa} PRIVATE ${KVQUANT_FLAGS_${ISA}})
    target_sources(${target} PRIVATE $<TARGET_OBJECTS:kvquant_cpu_${isa}>)
  endforeach()
endfunction()
