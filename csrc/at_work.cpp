#include "at_work.h"

#include <system_error>

#include <pthread.h>

namespace spotspeed {

std::shared_mutex& fork_lock() {
  // Never destroyed: threads may be at work until the process ends.
  static auto* lock = new std::shared_mutex;
  // The child's thread has another id than the one that took the lock, and cannot give it back:
  // it gets another lock.
  static const int failure = pthread_atfork([] { lock->lock(); }, [] { lock->unlock(); },
                                            [] { lock = new std::shared_mutex; });
  if (failure != 0) throw std::system_error(failure, std::generic_category(), "pthread_atfork");
  return *lock;
}

}  // namespace spotspeed
