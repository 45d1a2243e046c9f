// Declarations for `clang++ -fsyntax-only`: real address spaces and clang's own vectors.
// Nothing here is executed.
#pragma once
#include <cstddef>
#include <cstdint>
#include <limits>
#include <type_traits>

#define METAL_FUNC inline
#define __METAL__ 1
#define __METAL_VERSION__ 310
typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef _Float16 half;
typedef __bf16 bfloat;
#define device __attribute__((address_space(1)))
#define constant const __attribute__((address_space(2)))
#define threadgroup __attribute__((address_space(3)))
#define thread
inline constexpr half operator""h(long double v) { return half(v); }
inline constexpr bfloat operator""bf(long double v) { return bfloat(float(v)); }
#define M_PI_F 3.14159265358979323846f
#define M_LOG2E_F 1.44269504088896340736f

namespace metal {
using std::size_t; using std::enable_if; using std::enable_if_t; using std::is_same;
using std::is_same_v; using std::conditional; using std::conditional_t;
using std::is_integral; using std::is_integral_v; using std::true_type;
using std::false_type;
template <class T> constexpr bool is_floating_point_v =
    is_same_v<T, float> || is_same_v<T, half> || is_same_v<T, bfloat>;

template <class T, int N> using vec = T __attribute__((ext_vector_type(N)));
template <class T> struct components { static constexpr int N = 1; };
template <class T, int n> struct components<T __attribute__((ext_vector_type(n)))> {
  static constexpr int N = n;
};
template <class T, int N, class... A> vec<T, N> msl_make(A...) {
  static_assert((0 + ... + components<A>::N) == N ||
                    (sizeof...(A) == 1 && (1 * ... * components<A>::N) == 1),
                "wrong number of components");
  return vec<T, N>(T(0));
}

#define UNARY(n) template <class T> T n(T x);
UNARY(exp) UNARY(exp2) UNARY(log) UNARY(log2) UNARY(sqrt) UNARY(rsqrt) UNARY(sin) UNARY(cos)
UNARY(tanh) UNARY(floor) UNARY(ceil) UNARY(round) UNARY(rint) UNARY(trunc) UNARY(fabs)
UNARY(abs) UNARY(popcount) UNARY(clz) UNARY(ctz)
UNARY(simd_sum) UNARY(simd_product) UNARY(simd_max) UNARY(simd_min) UNARY(simd_and)
UNARY(simd_or) UNARY(simd_xor) UNARY(simd_prefix_inclusive_sum)
UNARY(simd_prefix_exclusive_sum) UNARY(simd_broadcast_first)
#undef UNARY
#define BINARY(n) template <class T> T n(T x, T y);
BINARY(fmin) BINARY(fmax) BINARY(pow) BINARY(atan2) BINARY(min) BINARY(max) BINARY(dot)
#undef BINARY
#define SHUFFLE(n) template <class T> T n(T x, ushort k);
SHUFFLE(simd_shuffle) SHUFFLE(simd_broadcast) SHUFFLE(simd_shuffle_xor)
SHUFFLE(simd_shuffle_down) SHUFFLE(simd_shuffle_up)
#undef SHUFFLE
template <class T> T fma(T x, T y, T z);
template <class T> T clamp(T x, T low, T high);
template <class T> bool isnan(T);
template <class T> bool isinf(T);
template <class T> bool isfinite(T);
template <class T, class C> T select(T a, T b, C c);
template <class T> T extract_bits(T, uint, uint);
struct simd_vote {
  typedef uint64_t vote_t;
  vote_t bits;
  explicit operator vote_t() const { return bits; }
};
simd_vote simd_ballot(bool);
bool simd_any(bool);
bool simd_all(bool);

enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2 };
mem_flags operator|(mem_flags, mem_flags);
void threadgroup_barrier(mem_flags);
void simdgroup_barrier(mem_flags);

enum memory_order { memory_order_relaxed };
template <class T> struct atomic { T value; };
typedef atomic<int> atomic_int;
typedef atomic<uint> atomic_uint;
typedef atomic<float> atomic_float;
template <class T> struct identity { typedef T type; };
template <class T> using given = typename identity<T>::type;
#define ATOMIC(space)                                                                  \
  template <class T> T atomic_load_explicit(const volatile space atomic<T>*, memory_order); \
  template <class T>                                                                   \
  void atomic_store_explicit(volatile space atomic<T>*, given<T>, memory_order);       \
  FETCH(space, exchange) FETCH(space, fetch_add) FETCH(space, fetch_sub)               \
  FETCH(space, fetch_max) FETCH(space, fetch_min) FETCH(space, fetch_or)
#define FETCH(space, n)                                                                \
  template <class T> T atomic_##n##_explicit(volatile space atomic<T>*, given<T>, memory_order);
ATOMIC(device) ATOMIC(threadgroup)
#undef FETCH
#undef ATOMIC
}  // namespace metal

template <class T, class U> T as_type(U u) {
  static_assert(sizeof(T) == sizeof(U), "as_type: sizes differ");
  return __builtin_bit_cast(T, u);
}
#define VECTORS(t)                                                                     \
  typedef metal::vec<t, 2> t##2; typedef metal::vec<t, 3> t##3; typedef metal::vec<t, 4> t##4;
VECTORS(float) VECTORS(half) VECTORS(bfloat) VECTORS(int) VECTORS(uint) VECTORS(short)
VECTORS(ushort) VECTORS(char) VECTORS(uchar) VECTORS(long) VECTORS(ulong) VECTORS(bool)
#undef VECTORS

// What MLX's utils.h offers, which itself does not parse here.
typedef half float16_t;
typedef bfloat bfloat16_t;
using namespace metal;
