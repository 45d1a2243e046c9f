/* libmpi with a slow link: collectives take a latency and the time of their bytes more.
 *
 * Linked against the real library, in whose place it is loaded: what is not here is
 * found there. A collective of all ranks ends a delay after the last of them has joined
 * it. Until then nobody asks again and again for the others, as MPI does, nor for the
 * time: ranks sleep until all have joined (a futex in shared memory) and then until the
 * delay is over, which is the same moment for all, so that MPI has nothing to wait for.
 * A core is free meanwhile, as it is where a cable moves the bytes.
 *
 * Where the system allows it, the thread of the collectives runs before all others: a
 * rank that has one core would else give it that core milliseconds late.
 */

#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/futex.h>
#include <sched.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

int PMPI_Type_size(void *type, int *size);
int PMPI_Comm_size(void *comm, int *size);
int PMPI_Allreduce(
    const void *from, void *to, int count, void *type, void *op, void *comm);
int PMPI_Allgather(
    const void *from, int count, void *type, void *to, int to_count, void *to_type,
    void *comm);

/* Where ranks meet, in a file of zeros that all of them map. */
typedef struct {
  uint32_t joined;
  uint32_t meetings;
  int64_t end;
} Place;

static double link_latency = LATENCY, link_bandwidth = BANDWIDTH;

/* Another link, from the next collective on; to be called on every rank. */
void set_link(double latency, double bandwidth) {
  link_latency = latency;
  link_bandwidth = bandwidth;
}

static Place *place_of_ranks(void) {
  static Place *place;
  if (!place) {
    int file = open(MEETING, O_RDWR);
    void *found = file < 0 ? MAP_FAILED
                           : mmap(0, sizeof(Place), PROT_READ | PROT_WRITE, MAP_SHARED,
                                  file, 0);
    if (found == MAP_FAILED) abort();
    close(file);
    place = found;
  }
  return place;
}

static int64_t now(void) {
  struct timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return time.tv_sec * 1000000000LL + time.tv_nsec;
}

static void sleep_until(int64_t end) {
  struct timespec time = {end / 1000000000, end % 1000000000};
  while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &time, 0)) {
  }
}

static void run_first(void) {
  static __thread int is_first;
  if (is_first) return;
  struct sched_param priority = {1};
  sched_setscheduler(0, SCHED_FIFO, &priority);
  prctl(PR_SET_TIMERSLACK, 1); /* where it was not allowed */
  is_first = 1;
}

static void wait_for(int count, void *type, void *comm) {
  int size = 0, ranks = 0;
  PMPI_Type_size(type, &size);
  PMPI_Comm_size(comm, &ranks);
  double seconds = link_latency + (double)count * size / link_bandwidth;
  int64_t delay = (int64_t)(seconds * 1e9);
  const char *all = getenv("OMPI_COMM_WORLD_SIZE");
  if (!all || atoi(all) != ranks) { /* some of the ranks: they meet in MPI */
    sleep_until(now() + delay);
    return;
  }
  run_first();
  Place *place = place_of_ranks();
  uint32_t meeting = __atomic_load_n(&place->meetings, __ATOMIC_ACQUIRE);
  if (__atomic_add_fetch(&place->joined, 1, __ATOMIC_ACQ_REL) == (uint32_t)ranks) {
    place->joined = 0;
    place->end = now() + delay;
    __atomic_store_n(&place->meetings, meeting + 1, __ATOMIC_RELEASE);
    syscall(SYS_futex, &place->meetings, FUTEX_WAKE, ranks, 0, 0, 0);
  }
  while (__atomic_load_n(&place->meetings, __ATOMIC_ACQUIRE) == meeting)
    syscall(SYS_futex, &place->meetings, FUTEX_WAIT, meeting, 0, 0, 0);
  if (delay > 0) sleep_until(place->end);
}

int MPI_Allreduce(
    const void *from, void *to, int count, void *type, void *op, void *comm) {
  wait_for(count, type, comm);
  return PMPI_Allreduce(from, to, count, type, op, comm);
}

int MPI_Allgather(
    const void *from, int count, void *type, void *to, int to_count, void *to_type,
    void *comm) {
  wait_for(count, type, comm);
  return PMPI_Allgather(from, count, type, to, to_count, to_type, comm);
}
