// The gate before every optimizer update; the twin of core/cut_gate.py.
//
// Lifetime: a plain value.
// Threads: one mutex around it.
// Alignment: none required.
#pragma once

#include <algorithm>
#include <cstdint>
#include <map>

namespace spotspeed::cut {

constexpr std::int64_t kOpen = std::int64_t{1} << 62;

class Gate {
 public:
  explicit Gate(std::int64_t position) : started_(position), completed_(position) {}

  // Enters update `position` if that is allowed now.
  bool enter(std::int64_t position) {
    if (position > ceiling_) return false;
    started_ = position;
    return true;
  }
  void complete(std::int64_t position) { completed_ = position; }
  // Whether the state is exactly that after update `position`.
  bool rests_at(std::int64_t position) const {
    return completed_ == position && started_ == position;
  }
  // Lets no further update begin; returns the newest begun one.
  std::int64_t lock() {
    limit_ = std::min(limit_, started_);
    settle();
    return started_;
  }
  void allow(std::int64_t limit) {
    limit_ = limit;
    settle();
  }
  // Keeps the state of `position` until drop(round).
  void hold(std::int64_t round, std::int64_t position) {
    captures_[round] = position;
    settle();
  }
  void drop(std::int64_t round) {
    if (captures_.erase(round) != 0) settle();
  }

  std::int64_t started() const { return started_; }
  std::int64_t completed() const { return completed_; }
  std::int64_t limit() const { return limit_; }
  std::int64_t ceiling() const { return ceiling_; }

 private:
  void settle() {
    ceiling_ = std::min(limit_, kOpen);
    for (const auto& [round, position] : captures_) ceiling_ = std::min(ceiling_, position);
  }

  std::int64_t started_, completed_;
  std::int64_t limit_ = kOpen, ceiling_ = kOpen;
  std::map<std::int64_t, std::int64_t> captures_;
};

}  // namespace spotspeed::cut
