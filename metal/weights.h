// Expert weights in their packings, and the product of some of their rows with vectors.
//
//   DENSE   float / half / bfloat, row-contiguous
//   AFFINE  MLX's affine packing: 32 / BITS integers in a word, the first in the lowest bits;
//           w = scale * q + offset, with one scale and offset for every GROUP columns
//   MXFP4   4-bit floats (sign, 2 exponent bits, 1 mantissa bit), 8 in a word;
//           w = 2^(scale - 127) * q with one byte of scale for every 32 columns
#pragma once
#include "common.h"

enum WeightMode { DENSE = 0, AFFINE = 1, MXFP4 = 2 };

// One linear map per slot. Parts that a packing lacks are null.
template <typename W, typename S, typename B>
struct Projection {
  const device W* weight;   // [L, rows, columns], or words
  const device S* scales;   // [L, rows, columns / GROUP]
  const device S* offsets;  // [L, rows, columns / GROUP], AFFINE only
  const device B* bias;     // [L, rows]
};

// Columns that one lane takes at a time: 16 bytes of a dense row; of a packed one 8 bytes
// for a single vector, and 4 for several, whose accumulators need the registers.
template <typename W, int MODE, int BITS, int VECTORS>
METAL_FUNC constexpr int lane_columns() {
  return MODE == DENSE ? 16 / int(sizeof(W)) : (VECTORS == 1 ? 2 : 1) * 32 / BITS;
}

// The value of a 4-bit float over 2^14: its three bits are the top of a half's.
METAL_FUNC float small_fp4(uint q) {
  return float(as_type<half>(ushort((q & 7) << 9 | (q & 8) << 12)));
}

// COLUMNS weights of a row, those of a packing without scale and offset.
template <int MODE, int BITS, int COLUMNS, typename W>
METAL_FUNC void load_weights(
    const device W* row, int column, int count, thread float* values) {
  if constexpr (MODE == DENSE) {
    load_run<COLUMNS>(row + column, count, values);
  } else {
    constexpr int PER_WORD = 32 / BITS;
    UNROLL
    for (int w = 0; w < COLUMNS / PER_WORD; w++) {
      uint word = count > 0 ? row[column / PER_WORD + w] : 0;
      UNROLL
      for (int i = 0; i < PER_WORD; i++) {
        uint q = (word >> (BITS * i)) & ((1u << BITS) - 1);
        values[w * PER_WORD + i] = MODE == AFFINE ? float(q) : small_fp4(q);
      }
    }
  }
}

// (scale, offset) of one lane's columns. The lanes of a group get them from the first of
// them, so that each is read once.
template <int MODE, int GROUP, int COLUMNS, typename W, typename S, typename B>
METAL_FUNC float2 load_scale(
    Projection<W, S, B> p, size_t row, int columns, int column, int count, uint lane) {
  if constexpr (MODE == DENSE) {
    return float2(1.0f, 0.0f);
  } else {
    constexpr uint LANES = GROUP / COLUMNS;
    float2 pair = float2(0.0f, 0.0f);
    if (count > 0 && lane % LANES == 0) {
      size_t group = row * (columns / GROUP) + column / GROUP;
      if constexpr (MODE == AFFINE) {
        pair = float2(float(p.scales[group]), float(p.offsets[group]));
      } else {
        // 2^(scale - 127), which is subnormal for 0, times the 2^14 of small_fp4.
        uint exponent = p.scales[group];
        uint bits = exponent == 0 ? 1u << 22 : exponent << 23;
        pair.x = as_type<float>(bits) * 16384.0f;
      }
    }
    return simd_shuffle(pair, ushort(lane - lane % LANES));
  }
}

// sums[v * BLOCK + b] += this lane's share of (row b of the block) . (vector v)
//
// A block is ROWS rows of each of MATRICES projections of one slot, from first_row on; rows
// past `rows` count as zero. Vector v is vectors[ids[v], :], v < num_vectors <= VECTORS.
// Weights are loaded once for all vectors, and a loaded piece of a vector serves the whole
// block. Lanes take turns of 32 * COLUMNS columns, neighbouring lanes neighbouring columns.
template <
    int MODE,
    int BITS,
    int GROUP,
    int MATRICES,
    int ROWS,
    int VECTORS,
    typename W,
    typename S,
    typename B,
    typename T>
METAL_FUNC void multiply_rows(
    const thread Projection<W, S, B>* projections,
    int slot,
    int first_row,
    int rows,
    int columns,
    const device T* vectors,
    const thread int* ids,
    int num_vectors,
    uint lane,
    thread float* sums) {
  constexpr int BLOCK = MATRICES * ROWS;
  constexpr int COLUMNS = lane_columns<W, MODE, BITS, VECTORS>();
  constexpr int PER_ITEM = MODE == DENSE ? 1 : 32 / BITS;
  for (int base = 0; base < columns; base += 32 * COLUMNS) {
    int column = base + int(lane) * COLUMNS;
    int count = clamp(columns - column, 0, COLUMNS);
    float weights[BLOCK][COLUMNS];
    float2 scales[BLOCK];
    UNROLL
    for (int b = 0; b < BLOCK; b++) {
      int row = first_row + b % ROWS;
      int present = row < rows ? count : 0;
      size_t place = size_t(slot) * rows + min(row, rows - 1);
      Projection<W, S, B> p = projections[b / ROWS];
      const device W* weight = p.weight + place * (columns / PER_ITEM);
      load_weights<MODE, BITS, COLUMNS>(weight, column, present, weights[b]);
      scales[b] =
          load_scale<MODE, GROUP, COLUMNS>(p, place, columns, column, present, lane);
    }
    UNROLL
    for (int v = 0; v < VECTORS; v++) {
      if (v < num_vectors) {
        const device T* vector = vectors + size_t(ids[v]) * columns;
        float values[COLUMNS];
        load_run<COLUMNS>(vector + column, count, values);
        float total = 0.0f;
        UNROLL
        for (int i = 0; i < COLUMNS; i++) total += values[i];
        UNROLL
        for (int b = 0; b < BLOCK; b++) {
          float product = 0.0f;
          UNROLL
          for (int i = 0; i < COLUMNS; i++) product += weights[b][i] * values[i];
          sums[v * BLOCK + b] += scales[b].x * product + scales[b].y * total;
        }
      }
    }
  }
}
