#include "bindings_unlocked.h"

#include <atomic>
#include <thread>

#include <unistd.h>

namespace spotspeed {
namespace {

std::atomic<int> coming_back{0};
std::atomic<bool> is_ending{false};
std::atomic<std::thread::id> ending_thread{};

}  // namespace

Unlocked::~Unlocked() {
  // Either `end` sees this thread, and lets it through, or this thread sees that it is too late.
  coming_back.fetch_add(1);
  if (is_ending.load() && ending_thread.load() != std::this_thread::get_id()) {
    coming_back.fetch_sub(1);
    while (true) pause();
  }
  PyEval_RestoreThread(state_);
  coming_back.fetch_sub(1);
}

void Unlocked::end() {
  ending_thread.store(std::this_thread::get_id());
  is_ending.store(true);
  PyThreadState* const state = PyEval_SaveThread();
  while (coming_back.load() > 0) std::this_thread::yield();
  PyEval_RestoreThread(state);
}

}  // namespace spotspeed
