// Copies lists of host memory ranges on threads of their own.
//
// Lifetime: a CopyJob borrows every range it was given until it is finished (done, or cancel()
//   has returned); whoever holds the job keeps them alive. Destroying a CopyEngine cancels its
//   unfinished jobs and joins its threads. A job stays valid after its engine is gone.
// Threads: every member function may be called from any thread. Copies of one job run in any
//   order and at once, so their targets must be disjoint.
// Alignment: none required; targets aligned to 32 bytes copy fastest.
// fork(): threads do not survive it. In a child, submit() and waiting throw std::logic_error, and
//   the engine's destructor leaves the parent's threads, and what they wait on, alone.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <deque>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <thread>
#include <vector>

#include <sys/types.h>

namespace spotspeed {

struct Copy {
  const std::byte* source;
  std::byte* target;
  std::size_t size;
};

// Thrown by CopyJob::wait() when the job was cancelled before all bytes were copied.
class CopyCancelled : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// Throws std::invalid_argument when a range is null or wraps around, when a copy overlaps itself,
// or when two targets overlap.
void check_copies(const std::vector<Copy>& copies);

// Copies `size` bytes past the caches where that pays (AVX2, large, checked at run time), else by
// memcpy. All bytes are visible to whoever synchronises with the caller afterwards.
void copy_streaming(const std::byte* source, std::byte* target, std::size_t size);
// The plain twin of copy_streaming().
void copy_scalar(const std::byte* source, std::byte* target, std::size_t size);

// One submitted list of copies, cut into tasks that threads claim one by one.
class CopyJob {
 public:
  explicit CopyJob(const std::vector<Copy>& copies);
  CopyJob(const CopyJob&) = delete;
  CopyJob& operator=(const CopyJob&) = delete;

  // Claims one task and copies it on the calling thread; false when none is left to claim.
  bool help();
  // Copies what is unclaimed on the calling thread, then waits for the other threads: a waiter
  // of normal priority is never held up by a queue of low priority. Returns size_bytes();
  // throws CopyCancelled.
  std::size_t wait();
  // Waits without helping, for at most `timeout`; whether the job is finished.
  bool wait_for(std::chrono::nanoseconds timeout);
  // Gives up what is unclaimed; returns when no thread touches the ranges any more.
  void cancel();

  bool done() const { return unfinished_.load(std::memory_order_acquire) == 0; }
  bool cancelled() const { return cancelled_.load(std::memory_order_acquire); }
  std::size_t size_bytes() const { return size_bytes_; }
  std::size_t copied_bytes() const { return copied_.load(std::memory_order_acquire); }

 private:
  void finish(std::size_t tasks);
  void check_process() const;

  std::vector<Copy> pieces_;
  std::vector<std::size_t> task_starts_;  // task t is pieces [task_starts_[t], task_starts_[t + 1])
  std::size_t size_bytes_ = 0;
  pid_t owner_;
  std::atomic<std::size_t> next_task_{0};
  std::atomic<std::size_t> unfinished_{0};
  std::atomic<std::size_t> copied_{0};
  std::atomic<bool> cancelled_{false};
  std::mutex mutex_;
  std::condition_variable finished_;
};

class CopyEngine {
 public:
  // `low_priority` threads run at nice 19 under SCHED_BATCH, so that copying yields to training.
  // Throws std::invalid_argument unless 1 <= threads <= 256.
  CopyEngine(int threads, bool low_priority);
  ~CopyEngine();
  CopyEngine(const CopyEngine&) = delete;
  CopyEngine& operator=(const CopyEngine&) = delete;

  // Checks the copies (see check_copies), queues them behind earlier jobs and returns at once.
  std::shared_ptr<CopyJob> submit(const std::vector<Copy>& copies);

  int threads() const { return static_cast<int>(state_->threads.size()); }
  bool low_priority() const { return state_->low_priority; }

 private:
  struct State {
    bool low_priority = false;
    pid_t owner = 0;
    std::mutex mutex;
    std::condition_variable wake;
    std::deque<std::shared_ptr<CopyJob>> queue;
    bool stopping = false;
    std::vector<std::thread> threads;
  };

  static void work(State& state);
  static void stop(State& state);

  std::unique_ptr<State> state_;
};

}  // namespace spotspeed
