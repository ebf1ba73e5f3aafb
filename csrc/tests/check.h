// The smallest test harness that fails loudly: TEST(name) { CHECK(...); } and one main().
//
// Lifetime: tests register themselves before main() and run in order of their file.
// Threads: CHECK may be used on the test's own thread only.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <exception>
#include <vector>

namespace check {

struct Test {
  const char* name;
  void (*run)();
};

inline std::vector<Test>& tests() {
  static std::vector<Test> all;
  return all;
}

struct Registration {
  Registration(const char* name, void (*run)()) { tests().push_back({name, run}); }
};

[[noreturn]] inline void fail(const char* file, int line, const char* what) {
  std::fprintf(stderr, "%s:%d: CHECK(%s) failed\n", file, line, what);
  std::_Exit(1);
}

// Whether `call` throws an `Error`.
template <typename Error, typename Call>
bool throws(Call call) {
  try {
    call();
  } catch (const Error&) {
    return true;
  }
  return false;
}

inline int run_all() {
  for (const Test& test : tests()) {
    std::printf("  %s\n", test.name);
    std::fflush(stdout);
    try {
      test.run();
    } catch (const std::exception& error) {
      std::fprintf(stderr, "%s threw: %s\n", test.name, error.what());
      return 1;
    }
  }
  return tests().empty() ? 1 : 0;
}

}  // namespace check

#define TEST(name)                                              \
  static void name();                                           \
  static const check::Registration name##_registration(#name, name); \
  static void name()

#define CHECK(condition)                                             \
  do {                                                               \
    if (!(condition)) check::fail(__FILE__, __LINE__, #condition);   \
  } while (false)

#define TEST_MAIN \
  int main() { return check::run_all(); }
