// What several kernels use. Runs of elements are read and written one by one, never
// through vector pointers: MLX hands contiguous views to a kernel with their offset, so an
// address is aligned to its element and to nothing more. MLX's own copy and matrix-vector
// kernels are written this way; merging the accesses of a run is the compiler's work.
#pragma once
#include <metal_stdlib>
using namespace metal;

// For loops that index an array of the thread: it stays in registers only if unrolled.
#define UNROLL _Pragma("clang loop unroll(full)")

// At most RUN elements, as float; zero from `count` on.
template <int RUN, typename T>
METAL_FUNC void load_run(const device T* from, int count, thread float* values) {
  if (count >= RUN) {
    UNROLL
    for (int i = 0; i < RUN; i++) values[i] = float(from[i]);
  } else {
    UNROLL
    for (int i = 0; i < RUN; i++) values[i] = i < count ? float(from[i]) : 0.0f;
  }
}

// The lanes for which `x` holds, one bit each.
METAL_FUNC uint lanes_where(bool x) {
  return uint(simd_vote::vote_t(simd_ballot(x)));
}
