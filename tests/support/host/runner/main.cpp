// Runs a compiled kernel over a grid, one threadgroup after the other.
// usage: runner JOB INPUTS OUTPUTS   exit: 0 clean, 2 findings, 3 stopped by one, 4 misuse
//   JOB (text): so PATH / grid X Y Z / threadgroup X Y Z / seed N / timeout S /
//               buffers N, then per buffer: buffer NAME in|out|outinit ELEMENT BYTES
//   INPUTS: the bytes of the in and outinit buffers in order; OUTPUTS: of the out ones
#include <dlfcn.h>
#include <link.h>
#include <signal.h>
#include <unistd.h>

#include <random>

#include "hooks.h"

static std::vector<Region*> outputs;
static const char* outputs_path;

static void finish(int code) {
  if (FILE* f = fopen(outputs_path, "wb")) {
    for (Region* r : outputs) fwrite(r->base, 1, r->size, f);
    fclose(f);
  }
  for (Region* r : regions) {
    if (r->threadgroup) continue;
    size_t unwritten = 0;
    for (auto& c : r->cells) unwritten += !c.written;
    printf("BUFFER|name=%s|size=%zu|read=%llu|distinct=%zu|written=%llu|unwritten=%zu\n",
           r->name.c_str(), r->size, (unsigned long long)r->bytes_read,
           size_t(std::count(r->touched.begin(), r->touched.end(), 1)),
           (unsigned long long)r->bytes_written, unwritten * r->granule);
  }
  for (auto& s : statistics) printf("STAT|%s=%ld\n", s.first.c_str(), s.second);
  printf("STAT|threadgroup_bytes=%zu\n", group_bytes);
  fflush(stdout);
  _exit(code);
}

static void on_signal(int signal, siginfo_t* info, void*) {
  if (signal == SIGALRM)
    finding(true, 0, "timeout", "no end in time: an endless loop, or a wait for another group");
  finding(true, 0, "signal", "%s at address %p", strsignal(signal), info->si_addr);
}

static int note_module(dl_phdr_info* info, size_t, void* path) {
  if (!strstr(info->dlpi_name, (const char*)path)) return 0;
  u64 low = ~0ull, high = 0;
  for (int k = 0; k < info->dlpi_phnum; k++) {
    auto& segment = info->dlpi_phdr[k];
    if (segment.p_type != PT_LOAD) continue;
    low = std::min<u64>(low, segment.p_vaddr);
    high = std::max<u64>(high, segment.p_vaddr + segment.p_memsz);
  }
  code_low = info->dlpi_addr + low;
  code_high = info->dlpi_addr + high;
  return 1;
}

static void install_signals() {
  static u8 stack[65536];
  stack_t alternative = {};
  alternative.ss_sp = stack;
  alternative.ss_size = sizeof stack;
  sigaltstack(&alternative, nullptr);
  struct sigaction action = {};
  action.sa_sigaction = on_signal;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  for (int s : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGALRM}) sigaction(s, &action, nullptr);
}

static bool read_buffers(FILE* job, FILE* inputs, int count) {
  for (int i = 0; i < count; i++) {
    char name[256], kind[16];
    size_t element, size;
    if (fscanf(job, " buffer %255s %15s %zu %zu", name, kind, &element, &size) != 4)
      return false;
    bool is_output = kind[0] == 'o', has_bytes = strcmp(kind, "out") != 0;
    Region* r = new_region(name, size, element, is_output, false);
    if (!has_bytes) poison(r);
    else if (fread(r->base, 1, size, inputs) != size) return false;
    if (is_output && has_bytes)
      for (auto& c : r->cells) c.written = true;
    if (is_output) outputs.push_back(r);
    else write_protect(r);
    kernel_buffers.push_back(r->base);
  }
  return true;
}

// Metal's dispatchThreads: `grid` counts threads, and groups at the edge are smaller.
static void run_grid(const u32* grid, const u32* wanted, unsigned seed) {
  u32 nominal[3], groups[3];
  for (int k = 0; k < 3; k++) {
    nominal[k] = std::min(wanted[k], grid[k]);
    groups[k] = (grid[k] + nominal[k] - 1) / nominal[k];
  }
  // seed 0: ascending, 1: descending, else shuffled: a kernel must not care.
  std::mt19937 random(seed);
  auto arrange = [&](auto& v) {
    for (size_t i = 0; i < v.size(); i++) v[i] = i;
    if (seed == 1) std::reverse(v.begin(), v.end());
    else if (seed > 1) std::shuffle(v.begin(), v.end(), random);
  };
  std::vector<u32> sequence(size_t(groups[0]) * groups[1] * groups[2]);
  arrange(sequence);
  for (u32 g : sequence) {
    u32 group[3] = {g % groups[0], g / groups[0] % groups[1], g / groups[0] / groups[1]};
    u32 size[3];
    for (int k = 0; k < 3; k++) size[k] = std::min(nominal[k], grid[k] - group[k] * nominal[k]);
    u32 count = size[0] * size[1] * size[2];
    current_group = g;
    threads.resize(count);
    for (u32 i = 0; i < count; i++) {
      ThreadPosition& p = threads[i].position;
      u32 local[3] = {i % size[0], i / size[0] % size[1], i / (size[0] * size[1])};
      for (int k = 0; k < 3; k++) {
        p.local_pos[k] = local[k];
        p.group_pos[k] = group[k];
        p.grid_pos[k] = group[k] * nominal[k] + local[k];
        p.group_size[k] = size[k];
        p.nominal_size[k] = nominal[k];
        p.grid_size[k] = grid[k];
        p.num_groups[k] = groups[k];
      }
      p.index = i;
      p.lane = i % 32;
      p.simd = i / 32;
      p.num_simds = (count + 31) / 32;
      p.nominal_simds = (nominal[0] * nominal[1] * nominal[2] + 31) / 32;
    }
    order.resize(count);
    arrange(order);
    run_group();
  }
}

int main(int argc, char** argv) {
  if (argc != 4) return 4;
  FILE *job = fopen(argv[1], "r"), *inputs = fopen(argv[2], "rb");
  outputs_path = argv[3];
  char so[4096];
  u32 grid[3], size[3];
  unsigned seed, timeout;
  int count;
  if (!job || !inputs ||
      fscanf(job, "so %4095s grid %u %u %u threadgroup %u %u %u seed %u timeout %u buffers %d",
             so, grid, grid + 1, grid + 2, size, size + 1, size + 2, &seed, &timeout,
             &count) != 10 ||
      !read_buffers(job, inputs, count))
    return 4;
  void* module = dlopen(so, RTLD_NOW | RTLD_LOCAL);
  if (!module) return fprintf(stderr, "%s\n", dlerror()), 4;
  kernel_entry = (Entry)dlsym(module, "msl_entry");
  dl_iterate_phdr(note_module, so);
  install_signals();
  alarm(timeout);
  run_grid(grid, size, seed);
  finish(num_findings ? 2 : 0);
}
