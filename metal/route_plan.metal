// route_plan: where every (token, expert) pair and every (token, rank) row goes.
//
// expert_ids    [T, K]  int; -1: no expert
// expert_ranks  [E, R]  int, 0..P-1: the ranks that hold the expert's R replicas
// expert_slots  [E, R]  int, 0..S-1: their slots in the group
// slot_counts   [S]     pairs of each slot
// slot_offsets  [S + 1] where its pairs start, slot-major; the last: how many there are
// positions     [T, K]  a pair's place: slot-major, within a slot by token, then k; or -1
// rank_counts   [P]     rows of each rank: tokens with an expert there, counted once
// rank_offsets  [P + 1] where its rows start, rank-major; the last: how many there are
// row_tokens    [R]     the token of each row, by rank, then token; -1 past the last row
// token_rows    [T, P]  the row of a token on a rank, or -1
//
// Token t uses replica t % R of every expert it chose: a function of nothing but its place,
// so that all who see the same ids choose alike. An expert with fewer replicas than R
// repeats them, and one without has one in all R columns.
//
// Grid: 32 * (S + P) threads. One SIMD group owns one slot or one rank: it writes all that
// concerns its owner and nothing else. It walks the ids twice, 32 at a time. The first walk
// counts the pairs (rows) of its owner and of all smaller ones, which is the prefix sum;
// the second numbers its own, a lane's place being the number of matches below it. So there
// are no atomics, no barriers and no order between threadgroups, and the result is stable
// and the same on every run. The price is that each owner reads all ids: at decode that is
// one or two steps; at T = 4096, K = 8 it is 1024 steps of cached reads for each owner.
// At most 32 ranks: the ranks of a token are the bits of a word.
#include "common.h"

// The slot or rank of a pair, as `map` says.
template <typename Ids, typename Map>
METAL_FUNC int owner_of(
    Ids expert_ids, Map map, int pair, int num_pairs, int K, int replicas) {
  if (pair >= num_pairs) return -1;
  int expert = expert_ids[pair];
  if (expert < 0) return -1;
  return replicas == 1 ? map[expert] : map[expert * replicas + pair / K % replicas];
}

template <typename Ids, typename Map>
METAL_FUNC void plan_slot(
    Ids expert_ids,
    Map expert_slots,
    device int* slot_counts,
    device int* slot_offsets,
    device int* positions,
    int num_pairs,
    int K,
    int replicas,
    int num_slots,
    int slot,
    int lane) {
  int smaller = 0, own = 0;
  for (int base = 0; base < num_pairs; base += 32) {
    int other =
        owner_of(expert_ids, expert_slots, base + lane, num_pairs, K, replicas);
    smaller += other >= 0 && other < slot;
    own += other == slot;
  }
  smaller = simd_sum(smaller);
  own = simd_sum(own);
  if (lane == 0) {
    slot_counts[slot] = own;
    slot_offsets[slot] = smaller;
    if (slot == num_slots - 1) slot_offsets[num_slots] = smaller + own;
  }
  int next = smaller;
  for (int base = 0; base < num_pairs; base += 32) {
    int pair = base + lane;
    int other = owner_of(expert_ids, expert_slots, pair, num_pairs, K, replicas);
    uint matches = lanes_where(other == slot);
    if (other == slot) positions[pair] = next + popcount(matches & ((1u << lane) - 1));
    // Pairs without an expert belong to nobody: the first slot's owner marks them.
    else if (slot == 0 && other < 0 && pair < num_pairs) positions[pair] = -1;
    next += popcount(matches);
  }
}

// The ranks that a token visits, one bit each.
template <typename Ids, typename Map>
METAL_FUNC uint ranks_of(
    Ids expert_ids, Map expert_ranks, int token, int T, int K, int replicas) {
  uint ranks = 0;
  if (token >= T) return ranks;
  for (int k = 0; k < K; k++) {
    int rank =
        owner_of(expert_ids, expert_ranks, token * K + k, T * K, K, replicas);
    if (rank >= 0) ranks |= 1u << rank;
  }
  return ranks;
}

template <typename Ids, typename Map>
METAL_FUNC void plan_rank(
    Ids expert_ids,
    Map expert_ranks,
    device int* rank_counts,
    device int* rank_offsets,
    device int* row_tokens,
    device int* token_rows,
    int T,
    int K,
    int replicas,
    int num_ranks,
    int num_rows,
    int rank,
    int lane) {
  int smaller = 0, own = 0;
  for (int base = 0; base < T; base += 32) {
    uint ranks = ranks_of(expert_ids, expert_ranks, base + lane, T, K, replicas);
    smaller += popcount(ranks & ((1u << rank) - 1));
    own += ranks >> rank & 1;
  }
  smaller = simd_sum(smaller);
  own = simd_sum(own);
  if (lane == 0) {
    rank_counts[rank] = own;
    rank_offsets[rank] = smaller;
    if (rank == num_ranks - 1) rank_offsets[num_ranks] = smaller + own;
  }
  int next = smaller;
  for (int base = 0; base < T; base += 32) {
    int token = base + lane;
    bool visits = ranks_of(expert_ids, expert_ranks, token, T, K, replicas) >> rank & 1;
    uint matches = lanes_where(visits);
    int row = next + popcount(matches & ((1u << lane) - 1));
    if (visits) row_tokens[row] = token;
    if (token < T) token_rows[token * num_ranks + rank] = visits ? row : -1;
    next += popcount(matches);
  }
  if (rank == num_ranks - 1)
    for (int row = next + lane; row < num_rows; row += 32) row_tokens[row] = -1;
}

template <typename Ids, typename Map>
METAL_FUNC void route_plan(
    Ids expert_ids,
    Map expert_ranks,
    Map expert_slots,
    device int* slot_counts,
    device int* slot_offsets,
    device int* positions,
    device int* rank_counts,
    device int* rank_offsets,
    device int* row_tokens,
    device int* token_rows,
    int T,
    int K,
    int replicas,
    int num_slots,
    int num_ranks,
    int num_rows,
    uint lane,
    uint3 position) {
  int owner = position.x / 32;
  if (owner < num_slots) {
    plan_slot(
        expert_ids, expert_slots, slot_counts, slot_offsets, positions, T * K, K, replicas,
        num_slots, owner, int(lane));
  } else {
    plan_rank(
        expert_ids, expert_ranks, rank_counts, rank_offsets, row_tokens, token_rows, T, K,
        replicas, num_ranks, num_rows, owner - num_slots, int(lane));
  }
}
