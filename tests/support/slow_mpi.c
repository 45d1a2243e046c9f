/* libmpi with a slow link: collectives take a latency and the time of their bytes more.
 *
 * Linked against the real library, in whose place it is loaded: what is not here is
 * found there. The wait is a sleep, so that a core is free meanwhile, as it is where a
 * cable moves the bytes. A collective ends a delay after the last rank has joined it at
 * the earliest, since every rank sleeps before it joins.
 *
 * Where the system allows it, the thread of the collectives runs before all others while
 * it waits for its input and for the link: a rank that has one core would else give it
 * that core milliseconds late. In the collective itself, where MPI asks again and again
 * for the other ranks, it is a thread like any other.
 */

#define _GNU_SOURCE
#include <sched.h>
#include <time.h>

int PMPI_Type_size(void *type, int *size);
int PMPI_Allreduce(
    const void *from, void *to, int count, void *type, void *op, void *comm);
int PMPI_Allgather(
    const void *from, int count, void *type, void *to, int to_count, void *to_type,
    void *comm);

static void run_first(int is_first) {
  struct sched_param priority = {is_first ? 1 : 0};
  sched_setscheduler(0, is_first ? SCHED_FIFO : SCHED_OTHER, &priority);
}

static void wait_for(int count, void *type) {
  int size = 0;
  PMPI_Type_size(type, &size);
  double seconds = LATENCY + (double)count * size / BANDWIDTH;
  struct timespec left = {(time_t)seconds, 0};
  left.tv_nsec = (long)((seconds - (double)left.tv_sec) * 1e9);
  run_first(1);
  clock_nanosleep(CLOCK_MONOTONIC, 0, &left, 0);
  run_first(0);
}

int MPI_Allreduce(
    const void *from, void *to, int count, void *type, void *op, void *comm) {
  wait_for(count, type);
  int code = PMPI_Allreduce(from, to, count, type, op, comm);
  run_first(1);
  return code;
}

int MPI_Allgather(
    const void *from, int count, void *type, void *to, int to_count, void *to_type,
    void *comm) {
  wait_for(count, type);
  int code = PMPI_Allgather(from, count, type, to, to_count, to_type, comm);
  run_first(1);
  return code;
}
