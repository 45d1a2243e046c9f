// The (token, expert) pairs of a chunk of tokens, grouped by slot, so that tokens that share
// an expert share the reading of its weights.
#pragma once
#include "common.h"

// The pairs of a chunk, in threadgroup memory; they count from the chunk's first.
//
// slots[p]    the slot of pair p, or -1 where it is not on this rank
// leaders[p]  the first pair of p's group, or -1 likewise; a group has one slot and at most
//             TOKENS pairs: a slot that more pairs visit has several groups
struct Pairs {
  threadgroup int* slots;
  threadgroup int* leaders;
  int count;
};

// Groups the `count` pairs from slot_ids[begin] on. `memory` has room for 2 * count ints.
// Every thread of the threadgroup takes part.
template <int TOKENS, typename Ids>
METAL_FUNC Pairs group_pairs(
    Ids slot_ids,
    int begin,
    int count,
    threadgroup int* memory,
    uint thread_index,
    uint num_threads) {
  Pairs pairs = {memory, memory + count, count};
  // Each id is read once by each threadgroup; the comparisons use its copy.
  for (int p = thread_index; p < count; p += num_threads)
    pairs.slots[p] = slot_ids[begin + p];
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int p = thread_index; p < count; p += num_threads) {
    int slot = pairs.slots[p];
    int leader = p, before = 0;
    if (TOKENS > 1 && slot >= 0) {
      for (int m = 0; m < p; m++) {
        if (pairs.slots[m] != slot) continue;
        if (before++ % TOKENS == 0) leader = m;
      }
      if (before % TOKENS == 0) leader = p;
    }
    pairs.leaders[p] = slot < 0 ? -1 : leader;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  return pairs;
}

// members[0 .. result): the pairs of the group that `leader` leads, in order; 0 beyond.
// A lane holds the member of its number, so that no array is indexed by a variable.
template <int TOKENS>
METAL_FUNC int find_members(
    Pairs pairs, int leader, uint lane, thread int* members) {
  if (TOKENS == 1) {
    members[0] = leader;
    return 1;
  }
  int count = 0, member = 0;
  for (int base = leader; base < pairs.count; base += 32) {
    int p = base + int(lane);
    uint mine = lanes_where(p < pairs.count && pairs.leaders[p] == leader);
    for (; mine; mine &= mine - 1) {
      if (int(lane) == count) member = base + int(ctz(mine));
      count++;
    }
  }
  UNROLL
  for (int i = 0; i < TOKENS; i++) members[i] = simd_broadcast(member, ushort(i));
  return count;
}
