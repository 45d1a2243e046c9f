// What the compiled kernel calls: the sanitizers' callbacks (the kernel is compiled with
// -fsanitize=thread,... and linked without their libraries) and the shim's functions.
#pragma once
#include "fibers.h"

#define PC ((u64)__builtin_return_address(0))

extern "C" {
// ---------------------------------------------------------------- loads and stores
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
#define ACCESS(prefix, n)                                                              \
  void __tsan_##prefix##read##n(void* p) { check(p, n, READ, false, PC); }             \
  void __tsan_##prefix##write##n(void* p) { check(p, n, WRITE, false, PC); }
ACCESS(, 1) ACCESS(, 2) ACCESS(, 4) ACCESS(, 8) ACCESS(, 16)
ACCESS(unaligned_, 2) ACCESS(unaligned_, 4) ACCESS(unaligned_, 8) ACCESS(unaligned_, 16)
ACCESS(volatile_, 1) ACCESS(volatile_, 2) ACCESS(volatile_, 4) ACCESS(volatile_, 8)
#undef ACCESS
void __tsan_read_range(void* p, long n) {
  if (n) check(p, n, READ, false, PC);
}
void __tsan_write_range(void* p, long n) {
  if (n) check(p, n, WRITE, false, PC);
}
void* __tsan_memcpy(void* to, const void* from, size_t n) {
  if (n) check(from, n, READ, false, PC), check(to, n, WRITE, false, PC);
  return memcpy(to, from, n);
}
void* __tsan_memmove(void* to, const void* from, size_t n) {
  if (n) check(from, n, READ, false, PC), check(to, n, WRITE, false, PC);
  return memmove(to, from, n);
}
void* __tsan_memset(void* to, int value, size_t n) {
  if (n) check(to, n, WRITE, false, PC);
  return memset(to, value, n);
}

// ---------------------------------------------------------------- undefined behaviour
struct SourcePlace {  // the first member of every record that the compiler passes
  const char* file;
  u32 line, column;
};
#define UNDEFINED(name, what)                                                          \
  void __ubsan_handle_##name(SourcePlace* s) {                                         \
    finding(false, PC, "undefined", "%s at %s:%u", what, s->file, s->line);            \
  }
UNDEFINED(shift_out_of_bounds, "shift amount out of range")
UNDEFINED(divrem_overflow, "division by zero or overflow")
#undef UNDEFINED
void __ubsan_handle_missing_return(SourcePlace* s) {
  finding(true, PC, "undefined", "function without return at %s:%u", s->file, s->line);
}
void __ubsan_handle_out_of_bounds(SourcePlace* s, u64 index) {
  finding(true, PC, "out-of-bounds", "array index %lld at %s:%u", (long long)index, s->file,
          s->line);
}
struct TypeMismatch {
  SourcePlace place;
  void* type;
  u8 log_alignment, kind;
};
void __ubsan_handle_type_mismatch_v1(TypeMismatch* m, u64 address) {
  u32 alignment = 1u << m->log_alignment;
  finding(false, PC, "misaligned", "address %% %u = %u at %s:%u", alignment,
          u32(address % alignment), m->place.file, m->place.line);
}

// ---------------------------------------------------------------- the shim (msl_runtime.h)
u32 msl_lane() { return current->position.lane; }
void msl_note_atomic(const void* p, size_t n, int kind, void* pc) {
  check(p, n, Kind(kind), true, (u64)pc);
}
void msl_fail(const char* what, const char* file, int line) {
  finding(true, 0, "fail", "%s (%s:%d)", what, file, line);
}
void msl_inactive_lane(const char* what, u32 lane, const char* file, int line) {
  finding(false, 0, "inactive-lane", "%s reads lane %u, which is not active (%s:%d)", what,
          lane, file, line);
}
void msl_barrier(int threadgroup, int flags, const char* file, int line) {
  block(threadgroup ? WAITS_BARRIER : WAITS_SIMD_BARRIER, file, line, flags);
}
u32 msl_exchange(const void* value, void* values, size_t n, const char* file, int line) {
  if (n > sizeof current->sent) msl_fail("value too large to exchange", file, line);
  memcpy(current->sent, value, n);
  current->bytes = n;
  block(WAITS_SIMD, file, line, 0);
  memcpy(values, current->received, 32 * n);
  return current->mask;
}
void* msl_group_array(const char* name, unsigned line, size_t size, size_t element) {
  return group_array(name, line, size, element);
}
}
