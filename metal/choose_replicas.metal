// choose_replicas: which slot serves each routed expert, where experts have copies.
//
// expert_ids    [T, K]  int; -1: no expert
// order         [E]     int: the experts, those with the same holders side by side
// class_masks   [C]     int: the holders of each such run, one bit a rank
// class_starts  [C + 1] int: where in `order` each run starts; the last is E
// slots         [P, E]  int: the slot of an expert on a rank; any where it has none
// served        [T, K]  int: the slot that serves the pair; -1: no expert
//
// Grid: 32 threads, one SIMD group. With n(A) the experts of the step whose holders are all
// in A, the least that the busiest rank can read is m, the largest n(A) / |A| rounded up
// (Hall). A lane keeps m * |A| - n(A), its slack, for every 32nd set A of ranks. Run by run
// and holder by holder as many experts as leave no slack below 0 go to the holder; taking
// one of them takes 1 from each set with that holder, but not all holders, in it. The last
// holder gets the rest, which always fits. All decisions are the same in all lanes, so there
// is one barrier, before the slots of experts, in threadgroup memory, are read by pairs.
// Integers only. 2^P sets: at most 8 ranks. Each expert looks through all ids, T * K of
// them: for decode.
#include "common.h"

// The bits first..stop-1 of words of 32.
template <int WORDS>
METAL_FUNC int count_bits(thread const uint* words, int first, int stop) {
  int count = 0;
  for (int w = 0; w < WORDS; w++) {
    int low = clamp(first - 32 * w, 0, 32), high = clamp(stop - 32 * w, 0, 32);
    uint below_high = high == 32 ? ~0u : (1u << high) - 1;
    uint below_low = low == 32 ? ~0u : (1u << low) - 1;
    count += int(popcount(words[w] & below_high & ~below_low));
  }
  return count;
}

template <int P, int WORDS, typename Ids, typename Order, typename Masks, typename Starts, typename Slots>
METAL_FUNC void choose_replicas(
    Ids expert_ids,
    Order order,
    Masks class_masks,
    Starts class_starts,
    Slots slots,
    device int* served,
    threadgroup int* slot_of,
    int num_pairs,
    int num_experts,
    int num_classes,
    uint lane) {
  constexpr int SETS = 1 << P;
  constexpr int EACH = (SETS + 31) / 32;
  // Which places of `order` hold an expert of this step.
  uint used[WORDS];
  for (int w = 0; w < WORDS; w++) {
    int place = 32 * w + int(lane);
    bool is_used = false;
    if (place < num_experts) {
      int expert = order[place];
      for (int pair = 0; pair < num_pairs; pair++) is_used |= expert_ids[pair] == expert;
    }
    used[w] = lanes_where(is_used);
  }
  int slack[EACH];
  for (int i = 0; i < EACH; i++) slack[i] = 0;
  for (int c = 0; c < num_classes; c++) {
    int count = count_bits<WORDS>(used, class_starts[c], class_starts[c + 1]);
    int mask = class_masks[c];
    for (int i = 0; i < EACH; i++) {
      int ranks = 32 * i + int(lane);
      slack[i] -= (mask & ranks) == mask ? count : 0;
    }
  }
  int most = 0;
  for (int i = 0; i < EACH; i++) {
    int ranks = 32 * i + int(lane);
    int size = int(popcount(uint(ranks)));
    if (ranks > 0 && ranks < SETS) most = max(most, (size - 1 - slack[i]) / size);
  }
  most = simd_max(most);
  for (int i = 0; i < EACH; i++) {
    slack[i] += most * int(popcount(uint(32 * i + int(lane))));
  }
  for (int c = 0; c < num_classes; c++) {
    int first = class_starts[c], stop = class_starts[c + 1], mask = class_masks[c];
    int count = count_bits<WORDS>(used, first, stop), done = 0;
    for (int rank = 0; rank < P && done < count; rank++) {
      if (!(mask >> rank & 1)) continue;
      int taken = count - done;
      if (mask >> (rank + 1)) {
        for (int i = 0; i < EACH; i++) {
          int ranks = 32 * i + int(lane);
          bool takes = ranks < SETS && (ranks >> rank & 1) && (mask & ranks) != mask;
          if (takes) taken = min(taken, slack[i]);
        }
        taken = simd_min(taken);
      }
      for (int i = 0; i < EACH; i++) {
        int ranks = 32 * i + int(lane);
        bool takes = (ranks >> rank & 1) && (mask & ranks) != mask;
        slack[i] -= takes ? taken : 0;
      }
      for (int w = first / 32; 32 * w < stop; w++) {
        int place = 32 * w + int(lane);
        if (place < first || place >= stop || !(used[w] >> lane & 1)) continue;
        int number = count_bits<WORDS>(used, first, place);
        if (number < done || number >= done + taken) continue;
        slot_of[order[place]] = slots[rank * num_experts + order[place]];
      }
      done += taken;
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int pair = int(lane); pair < num_pairs; pair += 32) {
    int expert = expert_ids[pair];
    served[pair] = expert < 0 ? -1 : slot_of[expert];
  }
}
