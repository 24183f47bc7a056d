/* One pass: the chunks shared among threads, then their sums added in order. */
#include "pass.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <new>
#include <vector>

namespace grgauge {
namespace {

struct Isa {
  const char* name;
  visit_function (*choose)(const grgauge_pass&);
  bool runs;
};

Isa isas[] = {
#if defined(__x86_64__)
    {"avx512", choose_avx512,
     __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq")},
    {"avx2", choose_avx2,
     __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")},
#endif
    {"portable", choose_portable, true},
};

const Isa* active = std::find_if(std::begin(isas), std::end(isas), [](const Isa& isa) { return isa.runs; });

#if defined(__x86_64__)
const bool intel = __builtin_cpu_is("intel");
#else
const bool intel = false;
#endif

/* Fewer elements than this on a thread are not worth waking it for. */
constexpr int64_t kGrain = 16384;

/* More than this do not stay in a cache from step to step. */
constexpr int64_t kCached = 1 << 20;

int64_t elements(const grgauge_pass& pass) {
  const grgauge_row& last = pass.rows[pass.chunks - 1];
  return last.state + last.length;
}

struct Job {
  const grgauge_pass& pass;
  visit_function visit;
  double* partials;
};

/* Threads take equal shares of the elements, whole chunks each. A row knows how many elements came before it. */
void run_share(void* data, int thread, int threads) {
  const Job& job = *static_cast<const Job*>(data);
  const grgauge_row *rows = job.pass.rows, *end = rows + job.pass.chunks;
  const int64_t visited = elements(job.pass);
  const auto cut = [&](int64_t share) {
    const int64_t target = visited * share / threads;
    return std::lower_bound(rows, end, target, [](const grgauge_row& row, int64_t n) { return row.state < n; }) - rows;
  };
  job.visit(job.pass, cut(thread), thread + 1 == threads ? job.pass.chunks : cut(thread + 1), job.partials);
}

}  // namespace

/* At 50 M, Intel's own prefetchers stop at every page, where four streams reach their ends together: fetching ahead saves
 * an eighth (Ice Lake). AMD's do not, and it costs a quarter (Zen 4). */
bool fetches_ahead(const grgauge_pass& pass) { return intel && elements(pass) > kCached; }

}  // namespace grgauge

extern "C" {

int grgauge_abi(void) { return GRGAUGE_ABI; }

const char* grgauge_error(int code) {
  switch (code) {
    case GRGAUGE_OK: return "no error";
    case GRGAUGE_BAD_DTYPE: return "gradients and parameters must be float32, bfloat16 or float16, moments float32 or bfloat16";
    case GRGAUGE_OUT_OF_MEMORY: return "out of memory for the chunks' partial sums";
    case GRGAUGE_NO_TENSOR: return "an object that DLPack cannot describe";
  }
  return "unknown error";
}

const char* grgauge_cpu_isa(const char* choose) {
  using namespace grgauge;
  for (const Isa& isa : isas)
    if (choose && isa.runs && !std::strcmp(isa.name, choose)) active = &isa;
  return active->name;
}

int grgauge_cpu_pass(const grgauge_pass* pass, int threads) {
  using namespace grgauge;
  const visit_function visit = active->choose(*pass);
  if (!visit) return GRGAUGE_BAD_DTYPE;
  if (pass->params && pass->found_inf && *pass->found_inf != 0.0f) {
    if (pass->stats)
      std::fill_n(pass->stats, pass->segments * GRGAUGE_SUMS, std::numeric_limits<double>::quiet_NaN());
    return GRGAUGE_OK;
  }
  if (pass->stats) std::fill_n(pass->stats, pass->segments * GRGAUGE_SUMS, 0.0);
  if (!pass->chunks) return GRGAUGE_OK;

  static thread_local std::vector<double> partials; /* kept: a fresh one would be paged in anew at every step */
  try {
    partials.resize(pass->chunks * GRGAUGE_SUMS);
  } catch (const std::bad_alloc&) {
    return GRGAUGE_OUT_OF_MEMORY;
  }
  const int64_t useful = std::max<int64_t>(1, std::min(pass->chunks, elements(*pass) / kGrain));
  Job job{*pass, visit, partials.data()};
  parallel(int(std::min<int64_t>(threads, useful)), run_share, &job);

  if (pass->stats)
    for (int64_t c = 0; c < pass->chunks; ++c)
      for (int k = 0; k < GRGAUGE_SUMS; ++k)
        pass->stats[pass->rows[c].segment * GRGAUGE_SUMS + k] += partials[c * GRGAUGE_SUMS + k];
  return GRGAUGE_OK;
}
}
