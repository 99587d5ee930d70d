# Makes kvquant_C run on a glibc older than the building machine's: the compiler's own libstdc++ and
# libgcc pieces, and stubs of the older libc in place of the system's.
function(kvquant_file_of name out)
  execute_process(COMMAND ${CMAKE_CXX_COMPILER} -print-file-name=${name}
    OUTPUT_VARIABLE path OUTPUT_STRIP_TRAILING_WHITESPACE)
  set(${out} "${path}" PARENT_SCOPE)
endfunction()

kvquant_file_of(crtbeginS.o crt_begin)
kvquant_file_of(crtendS.o crt_end)
kvquant_file_of(libc_nonshared.a nonshared)
kvquant_file_of(libstdc++.a stdcxx)
target_sources(kvquant_C PRIVATE csrc/glibc_compat.cpp)
target_link_options(kvquant_C PRIVATE -nodefaultlibs -nostartfiles LINKER:--gc-sections LINKER:--allow-shlib-undefined)
set(stubs libpthread.so.0 libdl.so.2 librt.so.1 libm.so.6 libc.so.6 libld.so.2)
list(TRANSFORM stubs PREPEND "${KVQUANT_GLIBC_STUBS}/")
set(cudart "")
if(KVQUANT_WITH_CUDA)  # not where CMake adds it, behind the stubs: gcc may drop those that nothing before them needs
  set(cudart cudart_static)
  set_target_properties(kvquant_C PROPERTIES CUDA_RUNTIME_LIBRARY None)
endif()
target_link_libraries(kvquant_C PRIVATE
  ${crt_begin} ${stdcxx} ${cudart} gcc -l:libgcc_s.so.1 ${nonshared} ${stubs} ${crt_end})
