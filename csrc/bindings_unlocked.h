// Without Python's lock while it lives; only for the bindings.
//
// A daemon thread that wants the lock back while the interpreter ends is ended by CPython, which
// unwinds it: through C++ frames that is std::terminate, and the process dies of SIGABRT although
// its script is done. So before the end (Unlocked::end, an atexit handler) those that wait for the
// lock get it, and who comes later waits until the process is gone.
//
// Lifetime: a scope, as std::lock_guard.
// Threads: any that holds Python's lock.
// Alignment: none required.
#pragma once

#include <pybind11/pybind11.h>

namespace spotspeed {

class Unlocked {
 public:
  Unlocked() : state_(PyEval_SaveThread()) {}
  ~Unlocked();
  Unlocked(const Unlocked&) = delete;
  Unlocked& operator=(const Unlocked&) = delete;

  // The calling thread ends the interpreter next; it alone comes back from now on.
  static void end();

 private:
  PyThreadState* state_;
};

}  // namespace spotspeed
