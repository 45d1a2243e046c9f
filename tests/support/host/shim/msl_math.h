// Functions of one thread. Half and bfloat are computed in float and rounded once.
#pragma once
#include "msl_types.h"

namespace metal {
#define MSL_EACH(V, expression)                                                        \
  V r;                                                                                 \
  for (int i = 0; i < shape_of<V>::N; i++) r.data[i] = expression;                     \
  return r;
template <class T> using if_float = enable_if_t<is_floating_point_v<T>, int>;
template <class T> using if_scalar = enable_if_t<is_scalar_v<T>, int>;
template <class T> using if_vec = enable_if_t<is_vec<T>, int>;

#define MSL_UNARY(name, expression)                                                    \
  template <class T, if_float<T> = 0> inline T name(T v) {                             \
    float x = float(v);                                                                \
    return T(expression);                                                              \
  }                                                                                    \
  template <class A, if_vec<A> = 0> inline vec_of<A> name(const A& v) {                \
    vec_of<A> a(v);                                                                    \
    MSL_EACH(vec_of<A>, name(a.data[i]))                                               \
  }
MSL_UNARY(exp, std::exp(x)) MSL_UNARY(exp2, std::exp2(x)) MSL_UNARY(log, std::log(x))
MSL_UNARY(log2, std::log2(x)) MSL_UNARY(sqrt, std::sqrt(x)) MSL_UNARY(rsqrt, 1.0f / std::sqrt(x))
MSL_UNARY(sin, std::sin(x)) MSL_UNARY(cos, std::cos(x)) MSL_UNARY(tanh, std::tanh(x))
MSL_UNARY(floor, std::floor(x)) MSL_UNARY(ceil, std::ceil(x)) MSL_UNARY(round, std::round(x))
MSL_UNARY(rint, std::nearbyint(x)) MSL_UNARY(trunc, std::trunc(x)) MSL_UNARY(fabs, std::fabs(x))
#undef MSL_UNARY

#define MSL_BINARY(name, expression)                                                   \
  template <class T, if_float<T> = 0> inline T name(T a, T b) {                        \
    float x = float(a), y = float(b);                                                  \
    return T(expression);                                                              \
  }                                                                                    \
  template <class A, class B, class V = common_t<A, B>>                                \
  inline V name(const A& p, const B& q) {                                              \
    V a(p), b(q);                                                                      \
    MSL_EACH(V, name(a.data[i], b.data[i]))                                            \
  }
MSL_BINARY(fmin, std::fmin(x, y)) MSL_BINARY(fmax, std::fmax(x, y)) MSL_BINARY(pow, std::pow(x, y))
MSL_BINARY(atan2, std::atan2(x, y))
#undef MSL_BINARY

#define MSL_EXTREME(name, of_floats, op)                                               \
  template <class T, if_scalar<T> = 0> inline T name(T a, T b) {                       \
    if constexpr (is_floating_point_v<T>) return of_floats(a, b);                      \
    else return a op b ? a : b;                                                        \
  }                                                                                    \
  template <class A, class B, class V = common_t<A, B>>                                \
  inline V name(const A& p, const B& q) {                                              \
    V a(p), b(q);                                                                      \
    MSL_EACH(V, name(a.data[i], b.data[i]))                                            \
  }
MSL_EXTREME(min, fmin, <) MSL_EXTREME(max, fmax, >)
#undef MSL_EXTREME

template <class T, if_float<T> = 0> inline T fma(T a, T b, T c) {
  return T(std::fma(float(a), float(b), float(c)));
}
template <class T, int N>
inline vec<T, N> fma(const vec<T, N>& a, const vec<T, N>& b, const vec<T, N>& c) {
  typedef vec<T, N> V;
  MSL_EACH(V, fma(a.data[i], b.data[i], c.data[i]))
}
template <class T, if_scalar<T> = 0> inline T abs(T x) { return x < T(0) ? T(-x) : x; }
template <class T, if_float<T> = 0> inline bool isnan(T x) { return std::isnan(float(x)); }
template <class T, if_float<T> = 0> inline bool isinf(T x) { return std::isinf(float(x)); }
template <class T, if_float<T> = 0> inline bool isfinite(T x) { return std::isfinite(float(x)); }
template <class T, if_scalar<T> = 0> inline T clamp(T x, T low, T high) {
  return min(max(x, low), high);
}
template <class T, if_scalar<T> = 0> inline T select(T a, T b, bool c) { return c ? b : a; }
template <class A, class B, class V = common_t<A, B>>
inline typename shape_of<V>::S dot(const A& p, const B& q) {
  typename shape_of<V>::S s(0);
  V a(p), b(q);
  for (int i = 0; i < shape_of<V>::N; i++) s += a.data[i] * b.data[i];
  return s;
}
template <class T> inline T popcount(T x) {
  return T(__builtin_popcountll((unsigned long long)(make_unsigned_t<T>(x))));
}
template <class T> inline T ctz(T x) {
  unsigned long long u = make_unsigned_t<T>(x);
  return T(u ? __builtin_ctzll(u) : 8 * int(sizeof(T)));
}
template <class T> inline T clz(T x) {
  unsigned long long u = make_unsigned_t<T>(x);
  return T(u ? __builtin_clzll(u) - (64 - 8 * int(sizeof(T))) : 8 * int(sizeof(T)));
}
template <class T> inline T extract_bits(T x, uint offset, uint bits) {
  if (bits == 0) return T(0);
  uint width = 8 * sizeof(T);
  return T(T(x << (width - offset - bits)) >> (width - bits));
}
#undef MSL_EACH
namespace precise = ::metal;
namespace fast = ::metal;
}  // namespace metal
