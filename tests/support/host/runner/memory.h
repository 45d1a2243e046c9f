// Memory of a kernel: buffers and threadgroup arrays, each a Region that sits alone in
// unmapped address space, with shadow cells (who accessed it last, was it written) and
// counters of the bytes read and written.
#pragma once
#include <sys/mman.h>
#include <sys/types.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "findings.h"

struct Access {
  u32 thread1 = 0;  // thread in its group, plus 1; 0: no access yet
  u32 group = 0, group_epoch = 0, simd_epoch = 0;
  bool atomic = false;
  u64 pc = 0;
};
struct Cell {
  Access write, read, other_read;
  bool written = false;
};
struct Region {
  std::string name;
  u8* base = nullptr;
  size_t size = 0, element = 1, granule = 1;
  bool writable = false, threadgroup = false;
  std::vector<Cell> cells;  // one per granule; none for inputs
  std::vector<u8> touched;  // one per byte: has been read
  u64 bytes_read = 0, bytes_written = 0;
  u8* map = nullptr;
  size_t map_size = 0;
};

static const size_t GUARD = size_t(1) << 29;      // unmapped on both sides of a buffer
static const size_t TG_GUARD = size_t(1) << 24;   // and of a threadgroup array
static const size_t BYTE_SHADOW_LIMIT = 1 << 20;  // larger outputs: a cell per element
static std::vector<Region*> regions;

// 0x7ffe is NaN as float, half and bfloat, and a large number as an integer.
static void poison(Region* r) {
  for (size_t i = 0; i < r->size; i++) r->base[i] = i % 2 ? 0x7f : 0xfe;
}

static size_t pages_for(size_t bytes) { return (bytes + 4095) / 4096 * 4096 + 4096; }

// An input starts on an element boundary and on no larger one: MLX hands contiguous
// views (x[1:]) to a kernel with their offset, so a kernel may rely on no more.
static Region* new_region(const char* name, size_t size, size_t element, bool writable,
                          bool threadgroup) {
  Region* r = new Region;
  r->name = name;
  r->size = size;
  r->element = element ? element : 1;
  r->writable = writable;
  r->threadgroup = threadgroup;
  size_t guard = threadgroup ? TG_GUARD : GUARD, pages = pages_for(size);
  r->map_size = 2 * guard + pages;
  r->map = (u8*)mmap(nullptr, r->map_size, PROT_NONE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (r->map == MAP_FAILED) {
    perror("mmap");
    exit(4);
  }
  mprotect(r->map + guard, pages, PROT_READ | PROT_WRITE);
  r->base = r->map + guard + pages - (size + 15) / 16 * 16;
  if (!writable) r->base -= r->element;
  r->granule = size <= BYTE_SHADOW_LIMIT ? 1 : r->element;
  if (writable) r->cells.resize((size + r->granule - 1) / r->granule);
  if (!threadgroup) r->touched.resize(size);
  regions.push_back(r);
  return r;
}

static void write_protect(Region* r) {
  mprotect(r->map + GUARD, pages_for(r->size), PROT_READ);
}

// Epochs count barriers, apart for device [0] and threadgroup [1] memory, because a
// barrier orders only the memory that its flags name.
static u32 current_group;
static u32 group_epoch[2];
static std::vector<u32> simd_epoch[2];
static u8 *stack_low, *stack_high;  // of the running thread: not checked

static Region* find_region(u8* p) {
  static Region* last;
  if (last && p >= last->base && p < last->base + last->size) return last;
  for (Region* r : regions)
    if (p >= r->base && p < r->base + r->size) return last = r;
  return nullptr;
}

// a happened before b: same thread, or a barrier of their (simd)group between them.
// Threads of one SIMD group do not run in lockstep, and threadgroups are never ordered.
static bool ordered(const Access& a, const Access& b) {
  if (!a.thread1) return true;
  if (a.group != b.group) return false;
  if (a.thread1 == b.thread1 || a.group_epoch < b.group_epoch) return true;
  return (a.thread1 - 1) / 32 == (b.thread1 - 1) / 32 && a.simd_epoch < b.simd_epoch;
}

static std::string place(Region* r, size_t offset) {
  char b[200];
  snprintf(b, sizeof b, "'%s' element %zu (byte offset %zu of %zu)", r->name.c_str(),
           offset / r->element, offset, r->size);
  return b;
}

static void report_race(const Access& a, Region* r, size_t offset, bool write, u64 pc) {
  finding(false, pc, "race",
          "%s of %s conflicts with an %s by thread %u of group %u (other pc %llx): no "
          "barrier orders them%s",
          write ? "write" : "read", place(r, offset).c_str(),
          a.atomic ? "atomic access" : "access", a.thread1 - 1, a.group,
          (unsigned long long)(a.pc - code_low),
          a.group != current_group ? " (different threadgroups)" : "");
}

static void report_outside(u8* p, size_t n, bool write, u64 pc, Region* inside) {
  if (!inside && u64(p) >= code_low && u64(p) < code_high) {
    if (write) finding(true, pc, "write-to-constant", "write to program-scope data");
    return;  // reading a constant table of the kernel
  }
  Region* nearest = inside;
  size_t distance = ~size_t(0);
  if (!inside)
    for (Region* r : regions) {
      size_t d = p < r->base ? r->base - p : p - r->base - r->size;
      if (d < distance) distance = d, nearest = r;
    }
  if (!nearest || (!inside && distance > GUARD))
    finding(true, pc, "wild-access", "%zu-byte %s at %p, near no buffer", n,
            write ? "write" : "read", (void*)p);
  ssize_t offset = p - nearest->base, element = nearest->element;
  finding(true, pc, "out-of-bounds",
          "%zu-byte %s of '%s' at byte offset %zd (element %zd); it has %zu bytes (%zu "
          "elements)",
          n, write ? "write" : "read", nearest->name.c_str(), offset,
          offset < 0 ? -((-offset + element - 1) / element) : offset / element,
          nearest->size, nearest->size / element);
}

enum Kind { READ = 0, WRITE = 1, READ_MODIFY_WRITE = 2 };

static void check_cell(Region* r, size_t index, Kind kind, const Access& a) {
  Cell& cell = r->cells[index];
  size_t offset = index * r->granule;
  auto conflicts = [&](const Access& b) { return !(a.atomic && b.atomic) && !ordered(b, a); };
  if (kind != WRITE && !cell.written)
    finding(false, a.pc, "uninitialised-read", "%s was never written",
            place(r, offset).c_str());
  if (conflicts(cell.write)) report_race(cell.write, r, offset, kind != READ, a.pc);
  if (kind == READ) {
    // Two reads are kept, so that a later write meets a reader other than its thread.
    bool same = cell.read.thread1 == a.thread1 && cell.read.group == a.group;
    if (same || ordered(cell.read, a)) cell.read = a;
    else if (ordered(cell.other_read, a)) cell.other_read = a;
    return;
  }
  if (conflicts(cell.read)) report_race(cell.read, r, offset, true, a.pc);
  else if (conflicts(cell.other_read)) report_race(cell.other_read, r, offset, true, a.pc);
  cell.write = a;
  cell.written = true;
  if (kind == WRITE) cell.read = cell.other_read = Access();
}

// Every load and store of the kernel comes here before it is made.
static void check(const void* address, size_t n, Kind kind, bool atomic, u64 pc) {
  if (!current_position) return;
  u8* p = (u8*)address;
  if (p >= stack_low && p < stack_high) return;
  Region* r = find_region(p);
  if (!r || p + n > r->base + r->size) return report_outside(p, n, kind != READ, pc, r);
  size_t offset = p - r->base;
  if (kind != READ && !r->writable)
    finding(true, pc, "write-to-input", "%s", place(r, offset).c_str());
  if (kind != WRITE) {
    r->bytes_read += n;
    if (!r->threadgroup) memset(&r->touched[offset], 1, n);
  }
  if (kind != READ) r->bytes_written += n;
  if (r->cells.empty()) return;
  int space = r->threadgroup;
  Access a;
  a.thread1 = current_position->index + 1;
  a.group = current_group;
  a.group_epoch = group_epoch[space];
  a.simd_epoch = simd_epoch[space][current_position->simd];
  a.atomic = atomic;
  a.pc = pc;
  for (size_t c = offset / r->granule; c <= (offset + n - 1) / r->granule; c++)
    check_cell(r, c, kind, a);
}

// ---------------------------------------------------------------- threadgroup arrays
struct GroupArray {
  std::string name;
  unsigned line;
  Region* region;
};
static std::vector<GroupArray> group_arrays;
static size_t group_bytes;
static const size_t GROUP_LIMIT = 32768;

static void reset_group_arrays() {  // contents do not survive from group to group
  for (auto& v : group_arrays) {
    poison(v.region);
    std::fill(v.region->cells.begin(), v.region->cells.end(), Cell());
  }
}

static void* group_array(const char* name, unsigned line, size_t size, size_t element) {
  for (auto& v : group_arrays)
    if (v.line == line && v.name == name) return v.region->base;
  Region* r = new_region(name, size, element, true, true);
  group_arrays.push_back({name, line, r});
  group_bytes += (size + 15) / 16 * 16;
  poison(r);
  if (group_bytes > GROUP_LIMIT)
    finding(true, 0, "threadgroup-memory",
            "%zu bytes of threadgroup memory; the limit is %zu", group_bytes, GROUP_LIMIT);
  return r->base;
}
