// Findings: what the runner has to say about a kernel, one text line each on stdout.
//   FINDING|kind=..|pc=..|thread=x,y,z|group=x,y,z|msg=..
#pragma once
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <string>

typedef uint8_t u8;
typedef uint32_t u32;
typedef uint64_t u64;

// Position of one emulated thread, in the layout that the shim's msl_tid has.
struct ThreadPosition {
  u32 grid_pos[3], local_pos[3], group_pos[3];
  u32 group_size[3], nominal_size[3], grid_size[3], num_groups[3];
  u32 index, lane, simd, num_simds, nominal_simds;
};

static const ThreadPosition* current_position;  // null outside a kernel thread
static u64 code_low, code_high;                 // where the kernel's module is loaded
static int num_findings, max_findings = 20;
static std::map<std::string, int> seen_findings;

[[noreturn]] static void finish(int code);  // main.cpp: writes outputs, then exits

// Reports once per kind and code address. A fatal finding ends the run, because the
// access it reports has not been made and cannot be.
static void finding(bool fatal, u64 pc, const char* kind, const char* format, ...) {
  char text[1024];
  va_list args;
  va_start(args, format);
  vsnprintf(text, sizeof text, format, args);
  va_end(args);
  std::string key = std::string(kind) + "@" + std::to_string(pc) + (pc ? "" : text);
  if (!seen_findings[key]++) {
    num_findings++;
    printf("FINDING|kind=%s|pc=%llx|", kind, (unsigned long long)(pc ? pc - code_low : 0));
    if (auto* p = current_position)
      printf("thread=%u,%u,%u|group=%u,%u,%u|", p->grid_pos[0], p->grid_pos[1],
             p->grid_pos[2], p->group_pos[0], p->group_pos[1], p->group_pos[2]);
    printf("msg=%s\n", text);
  }
  if (fatal || num_findings >= max_findings) finish(3);
}
