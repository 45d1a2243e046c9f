// Functions of several threads: barriers, SIMD-group operations, atomics.
#pragma once
#include "msl_math.h"

namespace metal {
// ---------------------------------------------------------------- barriers
enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2 };
inline mem_flags operator|(mem_flags a, mem_flags b) { return mem_flags(int(a) | int(b)); }
MSL_RAW inline void threadgroup_barrier(mem_flags flags, MSL_SITE) {
  msl_barrier(1, int(flags), file_, line_);
}
MSL_RAW inline void simdgroup_barrier(mem_flags flags, MSL_SITE) {
  msl_barrier(0, int(flags), file_, line_);
}

// ---------------------------------------------------------------- SIMD-group operations
// The values of the active lanes, after they have all arrived.
template <class T> struct exchanged {
  T values[32];
  uint32_t mask, lane;
  const char* file;
  int line;
  MSL_RAW exchanged(T x, const char* f, int l) : file(f), line(l) {
    mask = msl_exchange(&x, values, sizeof(T), f, l);
    lane = msl_lane();
  }
  bool active(uint32_t i) const { return i < 32 && (mask >> i & 1); }
  T from(uint32_t i, const char* what) const {
    if (active(i)) return values[i];
    msl_inactive_lane(what, i, file, line);
    return values[lane];
  }
};
#define MSL_SIMD                                                                       \
  template <class T, enable_if_t<is_scalar_v<T> || is_vec<T>, int> = 0> MSL_RAW inline
// Reductions go over the active lanes in butterfly order.
#define MSL_REDUCE(name, expression)                                                   \
  MSL_SIMD T name(T x, MSL_SITE) {                                                     \
    exchanged<T> e(x, file_, line_);                                                   \
    uint32_t has = e.mask;                                                             \
    for (int d = 1; d < 32; d *= 2)                                                    \
      for (int i = 0; i < 32; i += 2 * d) {                                            \
        if (!(has >> (i + d) & 1)) continue;                                           \
        T a = e.values[i], b = e.values[i + d];                                        \
        e.values[i] = has >> i & 1 ? T(expression) : b;                                \
        has |= 1u << i;                                                                \
      }                                                                                \
    return e.values[0];                                                                \
  }
MSL_REDUCE(simd_sum, a + b) MSL_REDUCE(simd_product, a * b) MSL_REDUCE(simd_max, max(a, b))
MSL_REDUCE(simd_min, min(a, b)) MSL_REDUCE(simd_and, a & b) MSL_REDUCE(simd_or, a | b)
MSL_REDUCE(simd_xor, a ^ b)
#undef MSL_REDUCE
#define MSL_PREFIX(name, limit)                                                        \
  MSL_SIMD T name(T x, MSL_SITE) {                                                     \
    exchanged<T> e(x, file_, line_);                                                   \
    T s = T(0);                                                                        \
    for (uint32_t i = 0; i < limit; i++)                                               \
      if (e.active(i)) s = T(s + e.values[i]);                                         \
    return s;                                                                          \
  }
MSL_PREFIX(simd_prefix_inclusive_sum, e.lane + 1) MSL_PREFIX(simd_prefix_exclusive_sum, e.lane)
#undef MSL_PREFIX
#define MSL_SHUFFLE(name, source)                                                      \
  MSL_SIMD T name(T x, ushort n, MSL_SITE) {                                           \
    exchanged<T> e(x, file_, line_);                                                   \
    return e.from(source, #name);                                                      \
  }
MSL_SHUFFLE(simd_shuffle, n) MSL_SHUFFLE(simd_broadcast, n)
MSL_SHUFFLE(simd_shuffle_xor, e.lane ^ n)
// Past the end Metal leaves the value undefined; the lane gets its own, as on hardware.
MSL_SHUFFLE(simd_shuffle_down, e.lane + n > 31 ? e.lane : e.lane + n)
MSL_SHUFFLE(simd_shuffle_up, e.lane < n ? e.lane : e.lane - n)
#undef MSL_SHUFFLE
MSL_SIMD T simd_shuffle_and_fill_up(T x, T fill, ushort n, MSL_SITE) {
  exchanged<T> e(x, file_, line_), f(fill, file_, line_);
  return e.lane < n ? f.from(32 + e.lane - n, "simd_shuffle_and_fill_up")
                    : e.from(e.lane - n, "simd_shuffle_and_fill_up");
}
MSL_SIMD T simd_broadcast_first(T x, MSL_SITE) {
  exchanged<T> e(x, file_, line_);
  return e.values[__builtin_ctz(e.mask)];
}
struct simd_vote {
  typedef uint64_t vote_t;
  vote_t bits;
  explicit operator vote_t() const { return bits; }
};
MSL_RAW inline uint32_t msl_ballot(bool x, const char* file, int line) {
  exchanged<uint32_t> e(x, file, line);
  uint32_t bits = 0;
  for (uint32_t i = 0; i < 32; i++)
    if (e.active(i) && e.values[i]) bits |= 1u << i;
  return bits;
}
inline simd_vote simd_ballot(bool x, MSL_SITE) { return {msl_ballot(x, file_, line_)}; }
inline bool simd_any(bool x, MSL_SITE) { return msl_ballot(x, file_, line_) != 0; }
inline bool simd_all(bool x, MSL_SITE) { return msl_ballot(!x, file_, line_) == 0; }
#undef MSL_SIMD

// ---------------------------------------------------------------- atomics
// Plain operations: one thread runs at a time. The checker is told that they are atomic.
enum memory_order { memory_order_relaxed };
template <class T> struct atomic { T value; };
typedef atomic<int> atomic_int;
typedef atomic<uint> atomic_uint;
typedef atomic<float> atomic_float;
template <class T> struct identity { typedef T type; };
template <class T> using given = typename identity<T>::type;  // no deduction from it
#define MSL_NOTE(kind) msl_note_atomic((const void*)p, sizeof(T), kind, __builtin_return_address(0))
template <class T> MSL_RAW inline T atomic_load_explicit(const volatile atomic<T>* p, memory_order) {
  MSL_NOTE(0);
  return p->value;
}
template <class T>
MSL_RAW inline void atomic_store_explicit(volatile atomic<T>* p, given<T> x, memory_order) {
  MSL_NOTE(1);
  p->value = x;
}
#define MSL_FETCH(name, expression)                                                    \
  template <class T> MSL_RAW inline T name(volatile atomic<T>* p, given<T> b, memory_order) { \
    MSL_NOTE(2);                                                                       \
    T a = p->value;                                                                    \
    p->value = T(expression);                                                          \
    return a;                                                                          \
  }
MSL_FETCH(atomic_exchange_explicit, b) MSL_FETCH(atomic_fetch_add_explicit, a + b)
MSL_FETCH(atomic_fetch_sub_explicit, a - b) MSL_FETCH(atomic_fetch_max_explicit, max(a, b))
MSL_FETCH(atomic_fetch_min_explicit, min(a, b)) MSL_FETCH(atomic_fetch_or_explicit, a | b)
MSL_FETCH(atomic_fetch_and_explicit, a & b)
#undef MSL_FETCH
#undef MSL_NOTE
}  // namespace metal
