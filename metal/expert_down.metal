// expert_down: the second half of the experts in decode: down projection and the
// gate-weighted sum over the slots of this rank.
//
//   out[t, :] = sum over k with slot_ids[t, k] >= 0 of
//               gates[t, k] * (down[slot] hidden[t, k] + bias)
//
// hidden    [T, K, F]  device, float, as expert_glu leaves it
// slot_ids  [T, K]     int, a slot of this rank; -1 for a slot of another rank or none
// gates     [T, K]     float
// down      [L, D, F]  see weights.h; bias [L, D] or null
// out       [T, D]     device, float: this rank's partial sum, 0 where it owns no slot
// memory               2 * TOKENS * K ints of threadgroup memory
// products             TOKENS * K * 4 floats of threadgroup memory
// columns   F, rows  D, num_pairs  T * K
//
// Grid: one threadgroup per (block of 4 rows of D, chunk of TOKENS tokens), of several SIMD
// groups. As in expert_glu they share out the slots that the chunk visits, each reads its 4
// rows of a slot once, and a piece of hidden in registers serves 4 rows. The products meet
// in threadgroup memory, where one thread per (token, row) adds them up.
// A chunk is at most 8 tokens, and each chunk reads its slots again: made for decode.
// Numerics: float; the sum over k is in the order of k whatever SIMD group made a product.
// Alignment: the element's only; F need not divide by anything in a dense packing.
#include "pairs.h"
#include "weights.h"

template <
    int MODE,
    int BITS,
    int GROUP,
    int TOKENS,
    int K,
    typename Ids,
    typename Gates,
    typename W,
    typename S,
    typename B>
METAL_FUNC void expert_down(
    const device float* hidden,
    Ids slot_ids,
    Gates gates,
    Projection<W, S, B> down,
    device float* out,
    threadgroup int* memory,
    threadgroup float* products,
    int num_pairs,
    int rows,
    int columns,
    uint lane,
    uint simd,
    uint num_simds,
    uint3 group) {
  constexpr int ROWS = 4;
  int begin = group.z * (TOKENS * K);
  int chunk = min(TOKENS * K, num_pairs - begin);
  int first_row = group.x * ROWS;
  uint thread_index = simd * 32 + lane, num_threads = num_simds * 32;
  Pairs pairs =
      group_pairs<TOKENS>(slot_ids, begin, chunk, memory, thread_index, num_threads);
  uint groups = 0;
  for (int leader = 0; leader < chunk; leader++) {
    if (pairs.leaders[leader] != leader) continue;
    if (groups++ % num_simds != simd) continue;
    int slot = pairs.slots[leader];
    int members[TOKENS], vectors[TOKENS];
    int count = find_members<TOKENS>(pairs, leader, lane, members);
    UNROLL
    for (int v = 0; v < TOKENS; v++) vectors[v] = begin + members[v];
    float sums[TOKENS * ROWS] = {0};
    multiply_rows<MODE, BITS, GROUP, 1, ROWS, TOKENS>(
        &down, slot, first_row, rows, columns, hidden, vectors, count, lane, sums);
    UNROLL
    for (int r = 0; r < ROWS; r++) {
      int row = first_row + r;
      bool is_mine = lane == 0 && row < rows;
      float bias = 0.0f;
      if (is_mine && down.bias) bias = float(down.bias[size_t(slot) * rows + row]);
      UNROLL
      for (int v = 0; v < TOKENS; v++) {
        if (v < count) {
          float product = simd_sum(sums[v * ROWS + r]);
          if (is_mine) products[members[v] * ROWS + r] = product + bias;
        }
      }
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int i = thread_index; i < chunk / K * ROWS; i += num_threads) {
    int token = i / ROWS, r = i % ROWS;
    if (first_row + r >= rows) continue;
    float sum = 0.0f;
    for (int pair = token * K; pair < token * K + K; pair++)
      if (pairs.slots[pair] >= 0) sum += gates[begin + pair] * products[pair * ROWS + r];
    out[size_t(begin / K + token) * rows + first_row + r] = sum;
  }
}
