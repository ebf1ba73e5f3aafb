// Lets fork() wait until nothing that owns descriptors is at work, so that the child finds whole
// objects whose descriptors it can close.
//
// Lifetime: an AtWork lives for one turn, which must not block.
// Threads: any number may be at work; the thread that is must not fork.
// Alignment: none required.
#pragma once

#include <mutex>
#include <shared_mutex>

namespace spotspeed {

// Taken alone by fork(). The first call registers it with pthread_atfork.
std::shared_mutex& fork_lock();

class AtWork {
 public:
  AtWork() : guard_(fork_lock()) {}

 private:
  std::shared_lock<std::shared_mutex> guard_;
};

}  // namespace spotspeed
