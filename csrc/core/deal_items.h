// How both adapters' executors share out a call's items.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <functional>
#include <mutex>

namespace dhsa::adapter {

// Items go to whichever worker is free, in rising order, so that costs which grow along them (the causal triangle) and
// cores of unlike speed balance. An item's result does not depend on its worker. start(workers, work) calls work(w) for
// each w in [0, workers), on any threads; what a task throws does not pass through it.
template <class Start>
void deal_items(int64_t count, int64_t workers, const std::function<void(int64_t, int)>& task, const Start& start) {
  workers = std::min(workers, count);
  if (workers <= 1) {
    for (int64_t item = 0; item < count; ++item) task(item, 0);
    return;
  }
  std::atomic<int64_t> next{0};
  std::exception_ptr error;
  std::mutex error_mutex;
  start(static_cast<int>(workers), [&](int worker) {
    try {
      for (int64_t item; (item = next.fetch_add(1)) < count;) task(item, worker);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(error_mutex);
      error = std::current_exception();
    }
  });
  if (error) std::rethrow_exception(error);
}

}  // namespace dhsa::adapter
