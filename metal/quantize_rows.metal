// quantize_rows: tokens in the form in which they travel, 8 bits a value and their scales.
//
//   words[m] = (codes of x[m], 4 a word) (scales of x[m], a word for 128 values)
//
// x      [M, D]  device, row-contiguous, float / half / bfloat
// words  [M, W]  device, uint; W = ceil(D / 4) + ceil(D / 128); value i is byte i % 4 of
//                word i / 4, from the low end; bytes past D are 0
// width  D
//
// FORMAT (row_formats.h) INT8: one float scale for 128 values. MXFP8: e4m3, and for each 32
// values the exponent of a power of two, 4 of them in a word.
//
// Grid: one SIMD group per (128 values of a row, row); threads (32 * ceil(D / 128), M).
// A lane owns 4 neighbouring values, which are one word of codes, so that the largest value
// of a group of 128 (or 32) is found by 5 (or 3) shuffles and x is read once. A SIMD group's
// scales are one word, whatever the form.
// Numerics: largest values are compared as the bits of their magnitudes, which NaN and
// infinity are above of: a group with one of them decodes to NaN. A group in which nothing
// is as large as 2^-100 is zero: nothing here depends on subnormal numbers. Codes round to
// nearest, ties to even.
// Alignment: the element's only. D need not divide by anything.
#include "row_formats.h"

// The code of a number of at most 448, and its sign.
METAL_FUNC uint e4m3_code(float value) {
  uint bits = as_type<uint>(value);
  uint size = bits & 0x7fffffffu;
  uint code;
  if (size >= 0x3c800000u) {  // 2^-6 and more: 3 of 23 bits of the mantissa stay
    code = ((size + 0x7ffffu + ((size >> 20) & 1u)) >> 20) - (120u << 3);
  } else {  // steps of 2^-9
    code = uint(rint(as_type<float>(size) * 512.0f));
  }
  return code | ((bits >> 31) << 7);
}

template <int FORMAT, typename T>
METAL_FUNC void quantize_rows(
    const device T* x, device uint* words, int width, uint lane, uint3 position) {
  int segment = position.x / 32;
  int code_words = (width + 3) / 4;
  size_t row = position.y;
  device uint* to = words + row * (code_words + (width + 127) / 128);
  int start = segment * 128 + int(lane) * 4;
  float values[4];
  load_run<4>(x + row * width + start, width - start, values);
  uint largest = 0;
  UNROLL
  for (int i = 0; i < 4; i++) largest = max(largest, as_type<uint>(values[i]) & 0x7fffffffu);
  largest = max(largest, simd_shuffle_xor(largest, ushort(1)));
  largest = max(largest, simd_shuffle_xor(largest, ushort(2)));
  largest = max(largest, simd_shuffle_xor(largest, ushort(4)));
  if (FORMAT == INT8) {
    largest = max(largest, simd_shuffle_xor(largest, ushort(8)));
    largest = max(largest, simd_shuffle_xor(largest, ushort(16)));
  }
  bool is_zero = largest < SMALLEST;
  bool is_finite = largest < INFINITE;
  uint codes = 0;
  uint scale;
  if (FORMAT == INT8) {
    float step = is_zero ? 0.0f : as_type<float>(largest) / 127.0f;
    scale = is_finite ? as_type<uint>(step) : NOT_A_NUMBER;
    UNROLL
    for (int i = 0; i < 4; i++) {
      int code = is_zero || !is_finite ? 0 : int(rint(values[i] / step));
      codes |= (uint(code) & 0xffu) << (8 * i);
    }
  } else {
    // The smallest power of two that leaves no value above 448, which is 1.75 * 2^8.
    uint exponent = is_zero ? 0u : (is_finite ? ((largest + 0x1fffffu) >> 23) - 8u : 255u);
    float inverse = as_type<float>((254u - exponent) << 23);
    UNROLL
    for (int i = 0; i < 4; i++) {
      uint code = is_zero || !is_finite ? 0u : e4m3_code(values[i] * inverse);
      codes |= code << (8 * i);
    }
    scale = exponent << (8 * (lane / 8));
    scale |= simd_shuffle_xor(scale, ushort(8));
    scale |= simd_shuffle_xor(scale, ushort(16));
  }
  if (start < width) to[segment * 32 + int(lane)] = codes;
  if (lane == 0) to[code_words + segment] = scale;
}
