// dequantize_rows: rows that arrived in 8 bits a value, as numbers again.
//
//   out[m, i] = code[m, i] * scale of its group
//
// words  [M, W]  uint, as quantize_rows writes them; may be few, so their type is deduced
// widths [1]     int, D, which W does not tell
// out    [M, D]  device, float / half / bfloat
//
// Grid: one SIMD group per (128 values of a row, row); threads (32 * ceil(D / 128), M).
// A lane reads one word of codes and writes its 4 values; the word of scales and D are
// read by one lane, then broadcast.
// Numerics: one float product, rounded once to the type of out. half takes no more than
// 65504, which a code may round up from: larger values stop there, NaN stays NaN.
// Alignment: the element's only. D need not divide by anything.
#include "row_formats.h"

template <typename T>
METAL_FUNC void put(device T* to, float value) {
  *to = T(value);
}

METAL_FUNC void put(device half* to, float value) {
  value = value > 65504.0f ? 65504.0f : value;
  *to = half(value < -65504.0f ? -65504.0f : value);
}

METAL_FUNC float e4m3_value(uint code) {
  uint size = code & 0x7fu;
  float value = size < 8u ? float(size) * 0.001953125f : as_type<float>((size + (120u << 3)) << 20);
  return code & 0x80u ? -value : value;
}

template <int FORMAT, typename Words, typename Width, typename T>
METAL_FUNC void dequantize_rows(
    Words words, Width widths, device T* out, uint lane, uint3 position) {
  int width = 0;
  if (lane == 0) width = widths[0];
  width = simd_broadcast_first(width);
  int segment = position.x / 32;
  int code_words = (width + 3) / 4;
  size_t row = position.y;
  size_t from = row * (code_words + (width + 127) / 128);
  int start = segment * 128 + int(lane) * 4;
  uint scale = 0;
  if (lane == 0) scale = words[from + code_words + segment];
  scale = simd_broadcast_first(scale);
  if (start >= width) return;
  uint codes = words[from + segment * 32 + lane];
  if (FORMAT == MXFP8) {
    uint exponent = (scale >> (8 * (lane / 8))) & 0xffu;
    scale = exponent == 255u ? NOT_A_NUMBER : exponent << 23;
  }
  device T* to = out + row * width + start;
  UNROLL
  for (int i = 0; i < 4; i++) {
    uint code = (codes >> (8 * i)) & 0xffu;
    float value = FORMAT == INT8 ? float(int(code << 24) >> 24) : e4m3_value(code);
    if (start + i < width) put(to + i, value * as_type<float>(scale));
  }
}
