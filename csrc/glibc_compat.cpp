// Linked only into builds for an older glibc (KVQUANT_GLIBC_STUBS): a name that newer headers use.
// 0 says "threads may run", which is always safe.
extern "C" __attribute__((visibility("hidden"))) char __libc_single_threaded = 0;
