// pack_rows: copies the tokens that are to be sent, one row per (token, rank).
//
//   packed[m, :] = x[row_tokens[m], :]   for m < count[0]; later rows are not written
//
// x           [T, D]  device, row-contiguous, float / half / bfloat, or uint words of them
// row_tokens  [M]     int, rank-major; entries at and past count[0] are not read
// count       [1]     int, at most M; read on the device, so the host need not know it
// packed      [M, D]  device
// width       D
//
// Grid: one SIMD group per (segment of a row, row); threads (32 * segments, M).
// A segment is 4 turns of 32 lanes x 16 bytes = 2 KiB: at a model's D a token is a few
// segments, so that even one token occupies several SIMD groups, and the two integers that a
// SIMD group reads (by one lane, then broadcast) are 0.4 % of what it copies. A lane copies
// 16 consecutive bytes a turn, neighbouring lanes neighbouring bytes.
// Alignment: the element's only. D need not divide by anything. Copies are exact.
#include "common.h"

template <typename T, typename Ids, typename Count>
METAL_FUNC void pack_rows(
    const device T* x,
    Ids row_tokens,
    Count count,
    device T* packed,
    int width,
    uint lane,
    uint3 position) {
  constexpr int RUN = 16 / sizeof(T);
  constexpr int TURNS = 4;
  int row = position.y;
  int token = -1;
  if (lane == 0 && row < count[0]) token = row_tokens[row];
  token = simd_broadcast_first(token);
  if (token < 0) return;
  const device T* from = x + size_t(token) * width;
  device T* to = packed + size_t(row) * width;
  int start = int(position.x / 32) * (TURNS * 32 * RUN) + int(lane) * RUN;
  for (int turn = 0; turn < TURNS; turn++, start += 32 * RUN) {
    T values[RUN];
    if (start + RUN <= width) {
      UNROLL
      for (int i = 0; i < RUN; i++) values[i] = from[start + i];
      UNROLL
      for (int i = 0; i < RUN; i++) to[start + i] = values[i];
    } else {
      for (int i = start; i < width; i++) to[i] = from[i];
    }
  }
}
