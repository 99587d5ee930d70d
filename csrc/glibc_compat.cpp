// Linked only into builds for an older glibc (KVQUANT_GLIBC_STUBS): names that newer headers use.
#define KVQUANT_HIDDEN __attribute__((visibility("hidden")))

// glibc 2.38's headers rename strtol and its kin; __asm__ reaches the functions of the old names.
#define KVQUANT_OLD_NAME(type, name)                                            \
  type kvquant_##name(const char*, char**, int) __asm__(#name);                 \
  KVQUANT_HIDDEN type __isoc23_##name(const char* text, char** end, int base) { \
    return kvquant_##name(text, end, base);                                     \
  }

extern "C" {

KVQUANT_HIDDEN char __libc_single_threaded = 0;  // "threads may run", which is always safe

KVQUANT_OLD_NAME(long, strtol)
KVQUANT_OLD_NAME(long long, strtoll)
KVQUANT_OLD_NAME(unsigned long, strtoul)
KVQUANT_OLD_NAME(unsigned long long, strtoull)

}  // extern "C"
