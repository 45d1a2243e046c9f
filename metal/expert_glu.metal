// expert_glu: the first half of the experts in decode: gate and up projection and SwiGLU.
//
//   hidden[t, k, :] = act(gate[slot] x[t] + bias, up[slot] x[t] + bias), slot = slot_ids[t, k]
//
// x         [T, D]     device, row-contiguous, float / half / bfloat
// slot_ids  [T, K]     int, a slot of this rank; -1 for a slot of another rank or none
// gate, up  [L, F, D]  see weights.h; both packed alike; bias [L, F] or null
// hidden    [T, K, F]  device, float; where slot_ids is -1 nothing is written
// memory               2 * TOKENS * K ints of threadgroup memory
// columns   D, rows  F, num_pairs  T * K
//
// ACTIVATION 0: silu(gate) * up.
// ACTIVATION 1 (gpt-oss): gate up to 7, up within +-7: gate * sigmoid(1.702 gate) * (up + 1).
//
// Grid: one threadgroup per (block of ROWS rows of F, chunk of TOKENS tokens), of several
// SIMD groups. They share out the slots that the chunk visits: a SIMD group takes a slot,
// reads its 2 * ROWS rows once, and multiplies them with every token of the chunk that chose
// it (pairs.h). Pairs of other ranks cost one look at their id.
// ROWS is 4 for one token and 2 for several: each piece of x in registers serves 8 or 4 rows,
// and the float accumulators (2 * ROWS * TOKENS, at most 32) leave room for the weights.
// A chunk is at most 8 tokens, and each chunk reads its slots again: made for decode.
// Numerics: float; a lane sums its columns in order, lanes are added by simd_sum.
// Alignment: the element's only; D need not divide by anything in a dense packing.
#include "pairs.h"
#include "weights.h"

template <int ACTIVATION>
METAL_FUNC float glu(float gate, float up) {
  if (ACTIVATION == 0) return gate / (1.0f + exp(-gate)) * up;
  gate = min(gate, 7.0f);
  up = clamp(up, -7.0f, 7.0f);
  return gate / (1.0f + exp(-1.702f * gate)) * (up + 1.0f);
}

template <
    int MODE,
    int BITS,
    int GROUP,
    int ACTIVATION,
    int TOKENS,
    int K,
    typename T,
    typename Ids,
    typename W,
    typename S,
    typename B>
METAL_FUNC void expert_glu(
    const device T* x,
    Ids slot_ids,
    Projection<W, S, B> gate,
    Projection<W, S, B> up,
    device float* hidden,
    threadgroup int* memory,
    int num_pairs,
    int rows,
    int columns,
    uint lane,
    uint simd,
    uint num_simds,
    uint3 group) {
  constexpr int ROWS = TOKENS == 1 ? 4 : 2;
  Projection<W, S, B> projections[2] = {gate, up};
  int begin = group.z * (TOKENS * K);
  int chunk = min(TOKENS * K, num_pairs - begin);
  int first_row = group.x * ROWS;
  Pairs pairs = group_pairs<TOKENS>(
      slot_ids, begin, chunk, memory, simd * 32 + lane, num_simds * 32);
  uint groups = 0;
  for (int leader = 0; leader < chunk; leader++) {
    if (pairs.leaders[leader] != leader) continue;
    if (groups++ % num_simds != simd) continue;
    int slot = pairs.slots[leader];
    int members[TOKENS], tokens[TOKENS];
    int count = find_members<TOKENS>(pairs, leader, lane, members);
    UNROLL
    for (int v = 0; v < TOKENS; v++) tokens[v] = (begin + members[v]) / K;
    float sums[TOKENS * 2 * ROWS] = {0};
    multiply_rows<MODE, BITS, GROUP, 2, ROWS, TOKENS>(
        projections, slot, first_row, rows, columns, x, tokens, count, lane, sums);
    UNROLL
    for (int r = 0; r < ROWS; r++) {
      int row = first_row + r;
      // Lane 0 finishes the row for all tokens, so a bias is read once.
      bool is_mine = lane == 0 && row < rows;
      float2 bias = float2(0.0f, 0.0f);
      if (is_mine && gate.bias) {
        size_t place = size_t(slot) * rows + row;
        bias = float2(float(gate.bias[place]), float(up.bias[place]));
      }
      UNROLL
      for (int v = 0; v < TOKENS; v++) {
        if (v < count) {
          float g = simd_sum(sums[v * 2 * ROWS + r]);
          float u = simd_sum(sums[v * 2 * ROWS + ROWS + r]);
          float h = glu<ACTIVATION>(g + bias.x, u + bias.y);
          if (is_mine) hidden[size_t(begin + members[v]) * rows + row] = h;
        }
      }
    }
  }
}
