// Regions of a file compiled for instructions that the rest of the library must not use. Headers with inline
// functions are included before a region begins, never inside: the linker keeps one copy of an inline
// function for all files, and it must be one that runs everywhere.
#pragma once

#if defined(__x86_64__)
#pragma GCC diagnostic push
// GCC 12 says this of its own intrinsics, which leave lanes undefined on purpose.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

#if defined(__clang__)
#define MODEPROBE_TARGET_AVX512                                                                              \
  _Pragma(                                                                                                   \
      "clang attribute push(__attribute__((target(\"avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c\"))), " \
      "apply_to = function)")
#define MODEPROBE_TARGET_AVX2 \
  _Pragma("clang attribute push(__attribute__((target(\"avx2,fma,f16c\"))), apply_to = function)")
#define MODEPROBE_TARGET_END _Pragma("clang attribute pop")
#else
#define MODEPROBE_TARGET_AVX512 \
  _Pragma("GCC push_options")   \
      _Pragma("GCC target(\"avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512\")")
#define MODEPROBE_TARGET_AVX2 _Pragma("GCC push_options") _Pragma("GCC target(\"avx2,fma,f16c\")")
// The region lasts to the end of the file, where templates are instantiated.
#define MODEPROBE_TARGET_END
#endif
