// Compiles the file named by BERTOPS_PER_ISA once for every instruction set of this architecture, each time in
// a namespace of its own (bertops::baseline, bertops::avx2, bertops::avx512), with these macros set:
//   BERTOPS_ISA        the namespace
//   BERTOPS_VEC_BYTES  bytes of a vector register
//   BERTOPS_ISA_LEVEL  0 baseline, 1 AVX2 + FMA + F16C, 2 AVX-512 F/BW/DQ/VL
// Code inside uses no templates of the standard library: the linker would merge their instances across
// instruction sets, and the one that it keeps might not run here.
#ifdef __x86_64__
#include <immintrin.h>
#endif

#define BERTOPS_INLINE __attribute__((always_inline)) inline

#ifdef __clang__
#define BERTOPS_PRAGMA(text) _Pragma(#text)
#define BERTOPS_TARGET(features) \
  BERTOPS_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define BERTOPS_TARGET_END _Pragma("clang attribute pop")
#else
#define BERTOPS_PRAGMA(text) _Pragma(#text)
#define BERTOPS_TARGET(features) _Pragma("GCC push_options") BERTOPS_PRAGMA(GCC target(features))
#define BERTOPS_TARGET_END _Pragma("GCC pop_options")
#endif

#define BERTOPS_ISA baseline
#define BERTOPS_VEC_BYTES 16
#define BERTOPS_ISA_LEVEL 0
#include BERTOPS_PER_ISA
#undef BERTOPS_ISA
#undef BERTOPS_VEC_BYTES
#undef BERTOPS_ISA_LEVEL

#ifdef __x86_64__
BERTOPS_TARGET("avx2,fma,f16c")
#define BERTOPS_ISA avx2
#define BERTOPS_VEC_BYTES 32
#define BERTOPS_ISA_LEVEL 1
#include BERTOPS_PER_ISA
#undef BERTOPS_ISA
#undef BERTOPS_VEC_BYTES
#undef BERTOPS_ISA_LEVEL
BERTOPS_TARGET_END

BERTOPS_TARGET("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#define BERTOPS_ISA avx512
#define BERTOPS_VEC_BYTES 64
#define BERTOPS_ISA_LEVEL 2
#include BERTOPS_PER_ISA
#undef BERTOPS_ISA
#undef BERTOPS_VEC_BYTES
#undef BERTOPS_ISA_LEVEL
BERTOPS_TARGET_END
#endif
