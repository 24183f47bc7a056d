/* Threads, borrowed from the OpenMP runtime that torch has loaded. A second runtime would bring a second pool, and the
 * two would spin against each other for the same cores. */
#include <dlfcn.h>

#include <thread>
#include <vector>

#include "pass.h"

namespace grgauge {
namespace {

template <class F>
F symbol(const char* name) {
  return reinterpret_cast<F>(dlsym(RTLD_DEFAULT, name));
}

/* libgomp's entry point, which LLVM's and Intel's runtimes export as well. */
const auto gomp_parallel = symbol<void (*)(void (*)(void*), void*, unsigned, unsigned)>("GOMP_parallel");
const auto omp_thread = symbol<int (*)()>("omp_get_thread_num");
const auto omp_threads = symbol<int (*)()>("omp_get_num_threads");

struct Task {
  void (*run)(void*, int, int);
  void* data;
};

}  // namespace

void parallel(int threads, void (*run)(void*, int, int), void* data) {
  if (threads <= 1) return run(data, 0, 1);
  Task task{run, data};
  if (gomp_parallel && omp_thread && omp_threads) {
    const auto body = [](void* t) {
      const Task& own = *static_cast<Task*>(t);
      own.run(own.data, omp_thread(), omp_threads());
    };
    return gomp_parallel(body, &task, unsigned(threads), 0);
  }
  std::vector<std::thread> others;
  for (int i = 1; i < threads; ++i) others.emplace_back(run, data, i, threads);
  run(data, 0, threads);
  for (std::thread& other : others) other.join();
}

}  // namespace grgauge
