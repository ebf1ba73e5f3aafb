#include "host_copy.h"

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <string>
#include <utility>

#include <pthread.h>
#include <sched.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "planes.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace spotspeed {
namespace {

// A task is what one thread claims at once: long enough to amortise the claim, short enough that
// a waiter is soon helped and a cancelled job soon still.
constexpr std::size_t kTaskBytes = 1 << 20;
// Below this size the caches help more than streaming past them.
constexpr std::size_t kStreamingBytes = 64 << 10;

std::uintptr_t address(const std::byte* pointer) {
  return reinterpret_cast<std::uintptr_t>(pointer);
}

void check_range(const char* what, std::size_t index, const std::byte* start, std::size_t size) {
  if (start == nullptr) {
    throw std::invalid_argument("copy " + std::to_string(index) + ": null " + what);
  }
  if (address(start) + size < address(start)) {
    throw std::invalid_argument("copy " + std::to_string(index) + ": the " + what +
                                " wraps around the address space");
  }
}

#if defined(__x86_64__)
__attribute__((target("avx2"))) void copy_avx2(const std::byte* source, std::byte* target,
                                               std::size_t size) {
  const std::size_t head = std::min(size, (32 - address(target) % 32) % 32);
  std::memcpy(target, source, head);
  std::size_t done = head;
  for (; done + 128 <= size; done += 128) {
    const auto* from = reinterpret_cast<const __m256i*>(source + done);
    auto* to = reinterpret_cast<__m256i*>(target + done);
    const __m256i a = _mm256_loadu_si256(from), b = _mm256_loadu_si256(from + 1);
    const __m256i c = _mm256_loadu_si256(from + 2), d = _mm256_loadu_si256(from + 3);
    _mm256_stream_si256(to, a);
    _mm256_stream_si256(to + 1, b);
    _mm256_stream_si256(to + 2, c);
    _mm256_stream_si256(to + 3, d);
  }
  // Streaming stores are weakly ordered: without the fence a release store could overtake them.
  _mm_sfence();
  std::memcpy(target + done, source + done, size - done);
}
#endif

void lower_priority() {
  // Both are per thread on Linux, and both only ever yield: a refusal leaves normal priority,
  // which is slower for the training but never wrong.
  sched_param parameters{};
  (void)sched_setscheduler(0, SCHED_BATCH, &parameters);
  (void)setpriority(PRIO_PROCESS, static_cast<id_t>(syscall(SYS_gettid)), 19);
}

}  // namespace

void check_copies(const std::vector<Copy>& copies) {
  std::vector<std::pair<std::uintptr_t, std::uintptr_t>> targets;
  targets.reserve(copies.size());
  for (std::size_t i = 0; i < copies.size(); ++i) {
    const Copy& copy = copies[i];
    if (copy.size == 0) continue;
    check_range("source", i, copy.source, copy.size);
    check_range("target", i, copy.target, copy.size);
    const std::uintptr_t from = address(copy.source), to = address(copy.target);
    if (from < to + copy.size && to < from + copy.size) {
      throw std::invalid_argument("copy " + std::to_string(i) + ": source and target overlap");
    }
    targets.emplace_back(to, to + copy.size);
  }
  if (!std::is_sorted(targets.begin(), targets.end())) std::sort(targets.begin(), targets.end());
  for (std::size_t i = 1; i < targets.size(); ++i) {
    if (targets[i].first < targets[i - 1].second) {
      throw std::invalid_argument("two copies write to the same memory");
    }
  }
}

void copy_scalar(const std::byte* source, std::byte* target, std::size_t size) {
  if (size != 0) std::memcpy(target, source, size);
}

void copy_streaming(const std::byte* source, std::byte* target, std::size_t size) {
#if defined(__x86_64__)
  if (size >= kStreamingBytes && has_avx2()) return copy_avx2(source, target, size);
#endif
  copy_scalar(source, target, size);
}

CopyJob::CopyJob(const std::vector<Copy>& copies) : owner_(getpid()) {
  std::size_t task_bytes = kTaskBytes;  // full, so that the first piece opens a task
  for (const Copy& copy : copies) {
    for (std::size_t offset = 0; offset < copy.size;) {
      if (task_bytes >= kTaskBytes) {
        task_starts_.push_back(pieces_.size());
        task_bytes = 0;
      }
      const std::size_t size = std::min(copy.size - offset, kTaskBytes - task_bytes);
      pieces_.push_back({copy.source + offset, copy.target + offset, size});
      offset += size;
      task_bytes += size;
    }
    size_bytes_ += copy.size;
  }
  unfinished_ = task_starts_.size();
  task_starts_.push_back(pieces_.size());
}

bool CopyJob::help() {
  const std::size_t tasks = task_starts_.size() - 1;
  // The counter may pass the end by one per caller, never by enough to wrap.
  if (next_task_.load(std::memory_order_relaxed) >= tasks) return false;
  const std::size_t task = next_task_.fetch_add(1, std::memory_order_relaxed);
  if (task >= tasks) return false;
  std::size_t bytes = 0;
  for (std::size_t i = task_starts_[task]; i < task_starts_[task + 1]; ++i) {
    copy_streaming(pieces_[i].source, pieces_[i].target, pieces_[i].size);
    bytes += pieces_[i].size;
  }
  copied_.fetch_add(bytes, std::memory_order_relaxed);
  finish(1);
  return true;
}

void CopyJob::finish(std::size_t tasks) {
  if (tasks == 0 || unfinished_.fetch_sub(tasks, std::memory_order_acq_rel) != tasks) return;
  // Taking the mutex keeps the wake-up from falling between a waiter's check and its sleep.
  const std::lock_guard<std::mutex> lock(mutex_);
  finished_.notify_all();
}

void CopyJob::check_process() const {
  if (getpid() != owner_) {
    throw std::logic_error("this copy was submitted by process " + std::to_string(owner_) +
                           "; its threads do not exist in a forked child");
  }
}

std::size_t CopyJob::wait() {
  check_process();
  while (help()) {
  }
  std::unique_lock<std::mutex> lock(mutex_);
  finished_.wait(lock, [this] { return done(); });
  if (copied_bytes() != size_bytes_) {
    throw CopyCancelled("the copy was cancelled after " + std::to_string(copied_bytes()) + " of " +
                        std::to_string(size_bytes_) + " bytes");
  }
  return size_bytes_;
}

bool CopyJob::wait_for(std::chrono::nanoseconds timeout) {
  check_process();
  std::unique_lock<std::mutex> lock(mutex_);
  return finished_.wait_for(lock, timeout, [this] { return done(); });
}

void CopyJob::cancel() {
  if (getpid() != owner_) return;  // nothing runs in this process
  const std::size_t tasks = task_starts_.size() - 1;
  const std::size_t claimed = next_task_.exchange(tasks, std::memory_order_relaxed);
  if (claimed < tasks) {
    cancelled_.store(true, std::memory_order_release);
    finish(tasks - claimed);
  }
  std::unique_lock<std::mutex> lock(mutex_);
  finished_.wait(lock, [this] { return done(); });
}

CopyEngine::CopyEngine(int threads, bool low_priority) : state_(std::make_unique<State>()) {
  if (threads < 1 || threads > 256) {
    throw std::invalid_argument("threads must be 1 to 256, not " + std::to_string(threads));
  }
  State& state = *state_;
  state.low_priority = low_priority;
  state.owner = getpid();
  state.threads.reserve(static_cast<std::size_t>(threads));
  try {
    for (int i = 0; i < threads; ++i) state.threads.emplace_back([&state] { work(state); });
  } catch (...) {
    stop(state);
    throw;
  }
}

CopyEngine::~CopyEngine() {
  if (getpid() != state_->owner) {
    // A forked child: joining the parent's threads, or destroying the condition they wait on,
    // would never return, so the child leaks its copy of the state.
    (void)state_.release();
    return;
  }
  stop(*state_);
}

void CopyEngine::stop(State& state) {
  std::deque<std::shared_ptr<CopyJob>> unfinished;
  {
    const std::lock_guard<std::mutex> lock(state.mutex);
    state.stopping = true;
    unfinished.swap(state.queue);
  }
  state.wake.notify_all();
  for (const auto& job : unfinished) job->cancel();
  for (std::thread& thread : state.threads) thread.join();
}

std::shared_ptr<CopyJob> CopyEngine::submit(const std::vector<Copy>& copies) {
  if (getpid() != state_->owner) {
    throw std::logic_error("this copy engine belongs to process " + std::to_string(state_->owner) +
                           "; a forked child needs its own");
  }
  check_copies(copies);
  auto job = std::make_shared<CopyJob>(copies);
  if (job->done()) return job;  // nothing to copy
  {
    const std::lock_guard<std::mutex> lock(state_->mutex);
    state_->queue.push_back(job);
  }
  state_->wake.notify_all();
  return job;
}

void CopyEngine::work(State& state) {
  pthread_setname_np(pthread_self(), "spotspeed-copy");
  if (state.low_priority) lower_priority();
  std::unique_lock<std::mutex> lock(state.mutex);
  while (true) {
    state.wake.wait(lock, [&state] { return state.stopping || !state.queue.empty(); });
    if (state.stopping) return;
    const std::shared_ptr<CopyJob> job = state.queue.front();
    lock.unlock();
    const bool claimed = job->help();
    lock.lock();
    if (!claimed && !state.queue.empty() && state.queue.front() == job) state.queue.pop_front();
  }
}

}  // namespace spotspeed
