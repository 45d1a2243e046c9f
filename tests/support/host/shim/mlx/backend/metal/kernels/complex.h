#pragma once  // instead of MLX's header, whose members are overloaded on address spaces
struct complex64_t {
  float real, imag;
  complex64_t() = default;
  constexpr complex64_t(float r, float i = 0) : real(r), imag(i) {}
};
template <class T> struct complex_t;
