/* run_on_threads: one function on several threads at once, the calling one among them.
 *
 * They are PyTorch's own threads where its OpenMP library has been loaded into the process: after every
 * operation of PyTorch they spin for some milliseconds, and threads of another pool would have to share the
 * cores with them. Else, and in a forked process, where those are gone, threads are started for the call.
 */
#pragma once

#include <pthread.h>
#include <stdint.h>

enum { MOST_STARTED = 256 };

typedef struct {
  void (*work)(void *);
  void *job;
} on_thread;

static inline void *start_on_thread(void *given) {
  on_thread *this = given;
  this->work(this->job);
  return NULL;
}

#ifdef __ELF__
extern __attribute__((weak)) void GOMP_parallel(void (*work)(void *), void *job, unsigned threads, unsigned);
static int threads_are_gone;
static void forget_threads(void) { threads_are_gone = 1; }
__attribute__((constructor)) static void watch_forks(void) { pthread_atfork(NULL, NULL, forget_threads); }
#endif

/* `work` has to share out what there is to do: it may run on fewer than `threads` threads. */
static inline void run_on_threads(void (*work)(void *), void *job, int64_t threads) {
#ifdef __ELF__
  if (threads > 1 && GOMP_parallel && !threads_are_gone) {
    GOMP_parallel(work, job, (unsigned)threads, 0);
    return;
  }
#endif
  pthread_t started[MOST_STARTED];
  on_thread one = {work, job};
  int count = 0;
  while (count < threads - 1 && count < MOST_STARTED &&
         pthread_create(&started[count], NULL, start_on_thread, &one) == 0)
    count++;
  work(job);
  while (count > 0) pthread_join(started[--count], NULL);
}
