// Threads of one threadgroup as fibers. A thread runs until it blocks in a barrier or a
// SIMD-group operation; a fiber whose thread ended without blocking takes the next one.
#pragma once
#include <ucontext.h>

#include "memory.h"

enum State { READY, WAITS_SIMD, WAITS_SIMD_BARRIER, WAITS_BARRIER, DONE };
struct Fiber {
  ucontext_t context;
  u8* stack;
};
struct Thread {
  ThreadPosition position;
  State state;
  Fiber* fiber;  // set once it has blocked
  const char* file;
  int line, flags;
  u32 mask;              // lanes that took part in the last SIMD-group operation
  size_t bytes;          // size of the exchanged value
  u8 sent[64], received[32 * 64];
  bool waits_at(const Thread& t) const {
    return state == t.state && line == t.line && file == t.file;
  }
};

typedef void (*Entry)(void** buffers, const ThreadPosition*);
static Entry kernel_entry;
static std::vector<void*> kernel_buffers;
static const size_t STACK_SIZE = 256 * 1024;
static std::vector<Thread> threads;
static std::vector<int> order;  // in which the threads of a group are run
static size_t next_thread;
static Thread* current;
static Fiber* current_fiber;
static ucontext_t scheduler;
static std::vector<Fiber*> idle_fibers;
static std::map<std::string, long> statistics;

static void set_current(Thread* t) {
  current = t;
  current_position = t ? &t->position : nullptr;
}

static void fiber_main() {
  while (next_thread < order.size()) {
    Thread& t = threads[order[next_thread++]];
    set_current(&t);
    kernel_entry(kernel_buffers.data(), &t.position);
    current->state = DONE;
    if (current->fiber) break;  // it had blocked: its fiber goes back
  }
  idle_fibers.push_back(current_fiber);
  set_current(nullptr);
  setcontext(&scheduler);
}

static void enter(Fiber* f) {
  current_fiber = f;
  stack_low = f->stack;
  stack_high = f->stack + STACK_SIZE;
  swapcontext(&scheduler, &f->context);
  set_current(nullptr);
}

static void start_fiber() {
  Fiber* f;
  if (idle_fibers.empty()) {
    f = new Fiber;
    f->stack = (u8*)mmap(nullptr, STACK_SIZE, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  } else {
    f = idle_fibers.back();
    idle_fibers.pop_back();
  }
  getcontext(&f->context);
  f->context.uc_stack.ss_sp = f->stack;
  f->context.uc_stack.ss_size = STACK_SIZE;
  f->context.uc_link = &scheduler;
  makecontext(&f->context, fiber_main, 0);
  enter(f);
}

static void resume(Thread& t) {
  t.state = READY;
  set_current(&t);
  enter(t.fiber);
}

static void block(State state, const char* file, int line, int flags) {
  Thread* t = current;
  t->state = state;
  t->file = file;
  t->line = line;
  t->flags = flags;
  t->fiber = current_fiber;
  swapcontext(&t->fiber->context, &scheduler);
}

static void advance(u32* epoch, int flags, int space) {
  if (flags & (1 << space)) ++*epoch;
}

// Lets the lanes of one SIMD group go on that wait at the operation which comes first
// in the source: lanes that lag behind catch up, as they do after a branch.
static bool release_simd(size_t simd) {
  size_t low = simd * 32, high = std::min(threads.size(), low + 32);
  Thread* first = nullptr;
  for (size_t i = low; i < high; i++) {
    Thread& t = threads[i];
    if (t.state != WAITS_SIMD && t.state != WAITS_SIMD_BARRIER) continue;
    if (!first || t.line < first->line) first = &t;
  }
  if (!first) return false;
  Thread site = *first;
  u32 mask = 0;
  bool all = true;
  for (size_t i = low; i < high; i++)
    if (threads[i].waits_at(site)) mask |= 1u << (i - low);
    else all = false;
  if (!all) {
    statistics["divergent_simd_operations"]++;
    if (site.state == WAITS_SIMD_BARRIER) {
      set_current(first);
      finding(false, 0, "barrier-divergence",
              "simdgroup_barrier at %s:%d reached by lanes %08x only", site.file, site.line,
              mask);
      set_current(nullptr);
    }
  }
  if (site.state == WAITS_SIMD_BARRIER)
    for (int space = 0; space < 2; space++)
      advance(&simd_epoch[space][simd], site.flags, space);
  statistics[site.state == WAITS_SIMD ? "simd_operations" : "simdgroup_barriers"]++;
  for (size_t i = low; i < high; i++) {
    if (!(mask >> (i - low) & 1)) continue;
    Thread& t = threads[i];
    t.mask = mask;
    if (site.state != WAITS_SIMD) continue;
    for (size_t j = low; j < high; j++) {
      if (!(mask >> (j - low) & 1)) continue;
      if (threads[j].bytes != t.bytes)
        finding(true, 0, "fail", "two SIMD-group operations on one line (%s:%d)", site.file,
                site.line);
      memcpy(t.received + (j - low) * t.bytes, threads[j].sent, t.bytes);
    }
  }
  for (int i : order)
    if (size_t(i) >= low && size_t(i) < high && (mask >> (i - low) & 1)) resume(threads[i]);
  return true;
}

// Lets all threads go on that wait at a threadgroup barrier: none can move otherwise.
static bool release_barrier() {
  Thread *first = nullptr, *elsewhere = nullptr;
  std::vector<int> waiting;
  int flags = ~0;
  for (int i : order) {
    Thread& t = threads[i];
    if (t.state != WAITS_BARRIER) continue;
    if (!first) first = &t;
    else if (!t.waits_at(*first)) elsewhere = &t;
    flags &= t.flags;
    waiting.push_back(i);
  }
  if (!first) return false;
  set_current(first);
  if (waiting.size() != threads.size())
    finding(false, 0, "barrier-divergence",
            "threadgroup_barrier at %s:%d reached by %zu of %zu threads; the others have "
            "returned",
            first->file, first->line, waiting.size(), threads.size());
  if (elsewhere)
    finding(false, 0, "barrier-divergence",
            "threads wait at different barriers: %s:%d and %s:%d", first->file, first->line,
            elsewhere->file, elsewhere->line);
  set_current(nullptr);
  for (int space = 0; space < 2; space++) advance(&group_epoch[space], flags, space);
  statistics["threadgroup_barriers"]++;
  for (int i : waiting) resume(threads[i]);
  return true;
}

static void run_group() {
  size_t num_simds = (threads.size() + 31) / 32;
  for (int space = 0; space < 2; space++) {
    group_epoch[space] = 0;
    simd_epoch[space].assign(num_simds, 0);
  }
  reset_group_arrays();
  for (auto& t : threads) t.state = READY, t.fiber = nullptr;
  next_thread = 0;
  while (next_thread < order.size()) start_fiber();
  bool moved = true;
  while (moved) {
    moved = false;
    for (size_t s = 0; s < num_simds; s++) moved |= release_simd(s);
    if (!moved) moved = release_barrier();
  }
}
