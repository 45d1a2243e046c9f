// unpack_sum: the gate-weighted sum of the rows that came back for each token, and of rows
// that never left.
//
//   out[t, :] = sum over c of gates[t, c] * both[row_ids[t, c], :]
//
// `both` is rows and behind them local, read where they are: neither is copied.
//
// rows      [M, D]  device, row-contiguous, float / half / bfloat
// local     [L, D]  device, likewise, of its own type; rows itself where there is none
// row_ids   [T, C]  int, 0..M+L-1; -1: no row, nothing is read
// gates     [T, C]  float
// out       [T, D]  device, float / half / bfloat
// num_rows  M
// width     D
// choices  C
//
// Grid: one SIMD group per (segment of a token, token); threads (32 * segments, T).
// A segment is 4 turns of 32 lanes x 16 bytes of a row, summed in registers, so each row is
// read once and no product is ever stored. Lane c reads row_ids[t, c] and gates[t, c] and
// broadcasts them: 8 bytes for the 2 KiB of a row's segment.
// Numerics: float sums in the order of c, rounded once to the type of out. With float out
// nothing is rounded, as sums must be that are added to others later.
// Alignment: the element's only. D need not divide by anything.
#include "common.h"

// sums[i] += gate * this lane's share of a row
template <int RUN, int TURNS, typename T>
METAL_FUNC void add_row(
    const device T* row, float gate, int start, int width, thread float* sums) {
  UNROLL
  for (int turn = 0; turn < TURNS; turn++) {
    int column = start + turn * 32 * RUN;
    if (column < width) {
      float values[RUN];
      load_run<RUN>(row + column, width - column, values);
      UNROLL
      for (int i = 0; i < RUN; i++) sums[turn * RUN + i] += gate * values[i];
    }
  }
}

template <typename T, typename L, typename Ids, typename Gates, typename Out>
METAL_FUNC void unpack_sum(
    const device T* rows,
    const device L* local,
    Ids row_ids,
    Gates gates,
    device Out* out,
    int num_rows,
    int width,
    int choices,
    uint lane,
    uint3 position) {
  constexpr int RUN = 16 / sizeof(T);
  constexpr int TURNS = 4;
  size_t token = position.y;
  int start = int(position.x / 32) * (TURNS * 32 * RUN) + int(lane) * RUN;
  float sums[TURNS * RUN] = {0};
  for (int base = 0; base < choices; base += 32) {
    int here = min(32, choices - base);
    int lane_row = -1;
    float lane_gate = 0.0f;
    if (int(lane) < here) {
      lane_row = row_ids[token * choices + base + lane];
      lane_gate = gates[token * choices + base + lane];
    }
    for (int c = 0; c < here; c++) {
      int row = simd_broadcast(lane_row, ushort(c));
      float gate = simd_broadcast(lane_gate, ushort(c));
      if (row < 0) continue;
      if (row < num_rows) {
        add_row<RUN, TURNS>(rows + size_t(row) * width, gate, start, width, sums);
      } else {
        size_t place = size_t(row - num_rows) * width;
        add_row<RUN, TURNS>(local + place, gate, start, width, sums);
      }
    }
  }
  device Out* to = out + token * width;
  UNROLL
  for (int turn = 0; turn < TURNS; turn++) {
    int column = start + turn * 32 * RUN;
    UNROLL
    for (int i = 0; i < RUN; i++)
      if (column + i < width) to[column + i] = Out(sums[turn * RUN + i]);
  }
}
