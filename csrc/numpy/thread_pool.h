// The NumPy module's threads: a pool for the process, started as calls ask for them, and the Executor of one call.
#pragma once

#include <pthread.h>

#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <system_error>
#include <thread>

#include "core/deal_items.h"
#include "dhsa.h"

namespace dhsa::adapter {

// Never destroyed, so that no thread is waited for while the process ends; a forked child, which has none of its
// parent's threads, starts with a pool of its own.
class ThreadPool {
 public:
  static ThreadPool& get() {
    static ThreadPool* pool = new ThreadPool;
    static const int registered = pthread_atfork(nullptr, nullptr, [] { pool = new ThreadPool; });
    (void)registered;
    return *pool;
  }

  // Calls part(0) ... part(parts - 1), which must not throw, on this thread and as many of the pool's as are awake;
  // returns when all have. Calls from several threads take turns.
  void run(int parts, const std::function<void(int)>& part) {
    const std::lock_guard<std::mutex> turn(turn_);
    start(parts - 1);
    std::unique_lock<std::mutex> lock(mutex_);
    part_ = &part;
    parts_ = parts;
    next_ = finished_ = 0;
    wake_.notify_all();
    take_parts(lock);
    done_.wait(lock, [this] { return finished_ == parts_; });
  }

 private:
  void start(int threads) {
    try {
      for (; started_ < threads; ++started_) {
        std::thread([this] {
          std::unique_lock<std::mutex> lock(mutex_);
          for (;;) {
            wake_.wait(lock, [this] { return next_ < parts_; });
            take_parts(lock);
          }
        }).detach();
      }
    } catch (const std::system_error&) {
      // The machine has no more threads: those that are there take every part.
    }
  }

  void take_parts(std::unique_lock<std::mutex>& lock) {
    while (next_ < parts_) {
      const int mine = next_++;
      lock.unlock();
      (*part_)(mine);
      lock.lock();
      if (++finished_ == parts_) done_.notify_one();
    }
  }

  std::mutex turn_, mutex_;  // one call at a time; what is below
  std::condition_variable wake_, done_;
  const std::function<void(int)>* part_ = nullptr;
  int parts_ = 0, next_ = 0, finished_ = 0;
  int started_ = 0;  // guarded by turn_
};

class PoolExecutor final : public cpu::Executor {
 public:
  explicit PoolExecutor(int threads) : threads_(threads) {}

  int workers() const override { return threads_; }

  void run(int64_t count, const std::function<void(int64_t, int)>& task) const override {
    deal_items(count, workers(), task, [](int parts, const auto& work) { ThreadPool::get().run(parts, work); });
  }

 private:
  int threads_;
};

}  // namespace dhsa::adapter
