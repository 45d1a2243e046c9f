// Scalars and vectors of the Metal Shading Language.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <type_traits>

// ---------------------------------------------------------------- the runner's interface
extern "C" {
struct msl_thread {  // ThreadPosition of runner/findings.h
  uint32_t thread_position_in_grid[3], thread_position_in_threadgroup[3],
      threadgroup_position_in_grid[3], threads_per_threadgroup[3],
      dispatch_threads_per_threadgroup[3], threads_per_grid[3], threadgroups_per_grid[3];
  uint32_t thread_index_in_threadgroup, thread_index_in_simdgroup,
      simdgroup_index_in_threadgroup, simdgroups_per_threadgroup,
      dispatch_simdgroups_per_threadgroup;
};
uint32_t msl_lane();
void msl_note_atomic(const void* p, size_t bytes, int kind, void* pc);
void msl_fail(const char* what, const char* file, int line);
void msl_inactive_lane(const char* what, uint32_t lane, const char* file, int line);
void msl_barrier(int threadgroup, int flags, const char* file, int line);
// Waits for the active lanes of the SIMD group: values[l] is lane l's; returns their mask.
uint32_t msl_exchange(const void* value, void* values, size_t n, const char* file, int line);
void* msl_group_array(const char* name, unsigned line, size_t size, size_t element);
}

// For functions that touch the memory of other threads on purpose.
#define MSL_RAW __attribute__((no_sanitize("thread"), no_sanitize("undefined"), noinline))
// Call sites of blocking functions are told apart by file and line.
#define MSL_SITE const char *file_ = __builtin_FILE(), int line_ = __builtin_LINE()
#define METAL_FUNC inline __attribute__((always_inline))
#define __METAL__ 1
#define __METAL_VERSION__ 310
#define __HAVE_BFLOAT__ 1

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef _Float16 half;

// bf16 storage; every operation rounds to nearest even, as one instruction would.
struct bfloat {
  uint16_t bits;
  bfloat() = default;
  static constexpr uint16_t rounded(float f) {
    uint32_t u = __builtin_bit_cast(uint32_t, f);
    if ((u & 0x7fffffffu) > 0x7f800000u) return uint16_t((u >> 16) | 0x40);
    return uint16_t((u + 0x7fffu + ((u >> 16) & 1)) >> 16);
  }
  // Metal has no implicit conversion from float or half to bfloat: explicit here too.
  template <class U, std::enable_if_t<std::is_arithmetic<U>::value ||
                                          std::is_same<U, half>::value, int> = 0>
  explicit constexpr bfloat(U v) : bits(rounded(float(v))) {}
  constexpr operator float() const {
    return __builtin_bit_cast(float, uint32_t(bits) << 16);
  }
};
#define MSL_BFLOAT_OPERATOR(op)                                                        \
  inline constexpr bfloat operator op(bfloat a, bfloat b) {                            \
    return bfloat(float(a) op float(b));                                               \
  }                                                                                    \
  inline bfloat& operator op##=(bfloat& a, bfloat b) { return a = a op b; }
MSL_BFLOAT_OPERATOR(+) MSL_BFLOAT_OPERATOR(-) MSL_BFLOAT_OPERATOR(*) MSL_BFLOAT_OPERATOR(/)
#undef MSL_BFLOAT_OPERATOR
inline constexpr bfloat operator-(bfloat a) { return bfloat(-float(a)); }
#pragma GCC diagnostic push
#pragma GCC system_header  // literal suffixes without an underscore
inline constexpr half operator""h(long double v) { return half(v); }
inline constexpr bfloat operator""bf(long double v) { return bfloat(float(v)); }
#pragma GCC diagnostic pop

#define M_PI_F 3.14159265358979323846f
#define M_LOG2E_F 1.44269504088896340736f

namespace metal {
using std::size_t; using std::enable_if; using std::enable_if_t; using std::is_same;
using std::is_same_v; using std::conditional; using std::conditional_t;
using std::is_integral; using std::is_integral_v; using std::is_convertible;
using std::is_convertible_v; using std::integral_constant; using std::true_type;
using std::false_type; using std::is_signed; using std::is_signed_v;
using std::is_unsigned; using std::is_unsigned_v; using std::make_unsigned_t;

template <class T> constexpr bool is_floating_point_v =
    is_same_v<T, float> || is_same_v<T, half> || is_same_v<T, bfloat>;
template <class T> struct is_floating_point : integral_constant<bool, is_floating_point_v<T>> {};
template <class T> constexpr bool is_scalar_v = is_floating_point_v<T> || is_integral_v<T>;

template <class T> struct numeric_limits : std::numeric_limits<T> {};
template <class T, uint16_t MAX, uint16_t MIN, uint16_t LOWEST, uint16_t EPSILON, uint16_t INF,
          uint16_t NAN_>
struct limits16 {
  static constexpr T of(uint16_t bits) { return __builtin_bit_cast(T, bits); }
  static constexpr T max() { return of(MAX); }
  static constexpr T min() { return of(MIN); }
  static constexpr T lowest() { return of(LOWEST); }
  static constexpr T epsilon() { return of(EPSILON); }
  static constexpr T infinity() { return of(INF); }
  static constexpr T quiet_NaN() { return of(NAN_); }
};
template <> struct numeric_limits<half>
    : limits16<half, 0x7bff, 0x0400, 0xfbff, 0x1400, 0x7c00, 0x7e00> {};
template <> struct numeric_limits<bfloat>
    : limits16<bfloat, 0x7f7f, 0x0080, 0xff7f, 0x3c00, 0x7f80, 0x7fc0> {};

// ---------------------------------------------------------------- vectors
template <class T, int N> struct vec;
// A swizzle: some components of a vector, in some order; readable and assignable.
template <class T, int N, int... I> struct swizzle {
  T data[N];
  typedef vec<T, sizeof...(I)> V;
  operator V() const { return V(data[I]...); }
  swizzle& operator=(const V& v) {
    int k = 0;
    ((data[I] = v.data[k++]), ...);
    return *this;
  }
  swizzle& operator=(const swizzle& o) { return *this = V(o); }
};
template <class A> struct shape_of { static constexpr int N = 0; typedef A S; };  // scalar
template <class T, int n> struct shape_of<vec<T, n>> { static constexpr int N = n; typedef T S; };
template <class T, int n, int... I> struct shape_of<swizzle<T, n, I...>> {
  static constexpr int N = sizeof...(I);
  typedef T S;
};
template <class A> constexpr bool is_vec = shape_of<A>::N != 0;
template <class A> using vec_of = vec<typename shape_of<A>::S, shape_of<A>::N>;

template <class T, int N> struct components;
template <class T> struct components<T, 2> {
  union { T data[2]; struct { T x, y; }; swizzle<T, 2, 1, 0> yx; };
};
template <class T> struct components<T, 3> {
  union { T data[3]; struct { T x, y, z; }; swizzle<T, 3, 0, 1> xy; swizzle<T, 3, 1, 2> yz; };
};
template <class T> struct components<T, 4> {
  union {
    T data[4]; struct { T x, y, z, w; };
    swizzle<T, 4, 0, 1> xy; swizzle<T, 4, 2, 3> zw; swizzle<T, 4, 0, 2> xz;
    swizzle<T, 4, 1, 3> yw; swizzle<T, 4, 0, 1, 2> xyz; swizzle<T, 4, 3, 2, 1, 0> wzyx;
  };
};

template <class T, int N> struct alignas(sizeof(T) * (N == 3 ? 4 : N)) vec : components<T, N> {
  vec() = default;
  vec(const vec& o) { __builtin_memcpy((void*)this, (const void*)&o, sizeof *this); }
  vec& operator=(const vec& o) {
    __builtin_memcpy((void*)this, (const void*)&o, sizeof *this);
    return *this;
  }
  template <class S, enable_if_t<is_scalar_v<S>, int> = 0> vec(S s) {
    for (T& e : this->data) e = T(s);
  }
  template <class U, enable_if_t<!is_same_v<U, T>, int> = 0> explicit vec(const vec<U, N>& o) {
    for (int i = 0; i < N; i++) this->data[i] = T(o.data[i]);
  }
  template <class A, class B, class... R> vec(A a, B b, R... rest) {
    static_assert(width<A>() + width<B>() + (0 + ... + width<R>()) == N,
                  "wrong number of components");
    int k = 0;
    put(k, a), put(k, b), (put(k, rest), ...);
  }
  T& operator[](int i) { return this->data[checked(i)]; }
  const T& operator[](int i) const { return this->data[checked(i)]; }

 private:
  static int checked(int i) {
    if (unsigned(i) >= unsigned(N)) msl_fail("vector index out of range", "vec", i);
    return i;
  }
  template <class A> static constexpr int width() { return is_vec<A> ? shape_of<A>::N : 1; }
  template <class A> void put(int& k, const A& a) {
    if constexpr (is_vec<A>) {
      vec_of<A> v(a);
      for (auto e : v.data) this->data[k++] = T(e);
    } else {
      this->data[k++] = T(a);
    }
  }
};

// The vector type of an operation on A and B, of which at least one is a vector.
template <class A, class B, bool = is_vec<A>, bool = is_vec<B>> struct common {};
template <class A, class B> struct common<A, B, true, true> {
  static_assert(is_same_v<vec_of<A>, vec_of<B>>,
                "Metal has no implicit conversion between vector types");
  typedef vec_of<A> type;
};
template <class A, class B> struct common<A, B, true, false> { typedef vec_of<A> type; };
template <class A, class B> struct common<A, B, false, true> { typedef vec_of<B> type; };
template <class A, class B> using common_t = typename common<A, B>::type;

#define MSL_OPERATOR(op)                                                               \
  template <class A, class B, class V = common_t<A, B>>                                \
  inline V operator op(const A& a, const B& b) {                                       \
    V x(a), y(b), r;                                                                   \
    for (int i = 0; i < shape_of<V>::N; i++)                                           \
      r.data[i] = typename shape_of<V>::S(x.data[i] op y.data[i]);                     \
    return r;                                                                          \
  }                                                                                    \
  template <class T, int N, class B>                                                   \
  inline vec<T, N>& operator op##=(vec<T, N>& a, const B& b) { return a = a op b; }
MSL_OPERATOR(+) MSL_OPERATOR(-) MSL_OPERATOR(*) MSL_OPERATOR(/) MSL_OPERATOR(%)
MSL_OPERATOR(&) MSL_OPERATOR(|) MSL_OPERATOR(^) MSL_OPERATOR(<<) MSL_OPERATOR(>>)
#undef MSL_OPERATOR
#define MSL_COMPARE(op)                                                                \
  template <class A, class B, class V = common_t<A, B>>                                \
  inline vec<bool, shape_of<V>::N> operator op(const A& a, const B& b) {               \
    V x(a), y(b);                                                                      \
    vec<bool, shape_of<V>::N> r;                                                       \
    for (int i = 0; i < shape_of<V>::N; i++) r.data[i] = x.data[i] op y.data[i];       \
    return r;                                                                          \
  }
MSL_COMPARE(==) MSL_COMPARE(!=) MSL_COMPARE(<) MSL_COMPARE(>) MSL_COMPARE(<=) MSL_COMPARE(>=)
#undef MSL_COMPARE
}  // namespace metal

template <class T, class U> inline T as_type(const U& u) {
  static_assert(sizeof(T) == sizeof(U), "as_type: sizes differ");
  T r;
  __builtin_memcpy((void*)&r, (const void*)&u, sizeof(T));
  return r;
}

#define MSL_VECTORS(t)                                                                 \
  typedef metal::vec<t, 2> t##2; typedef metal::vec<t, 3> t##3; typedef metal::vec<t, 4> t##4;
MSL_VECTORS(float) MSL_VECTORS(half) MSL_VECTORS(bfloat) MSL_VECTORS(int) MSL_VECTORS(uint)
MSL_VECTORS(short) MSL_VECTORS(ushort) MSL_VECTORS(char) MSL_VECTORS(uchar)
MSL_VECTORS(long) MSL_VECTORS(ulong) MSL_VECTORS(bool)
#undef MSL_VECTORS
