// Decides which address of a peer to try next, and when to give up; coordinator/dialing.py.
//
// Lifetime: a plain value.
// Threads: one thread an object.
// Alignment: none required.
#pragma once

#include <algorithm>
#include <string>
#include <vector>

namespace spotspeed::control {

class Dial {
 public:
  Dial(std::vector<std::string> hosts, double now_s, double timeout_s)
      : due_s(now_s), deadline_s(now_s + timeout_s), hosts_(std::move(hosts)) {}

  const std::string& next_host() const { return hosts_[next_]; }

  // The attempt at next_host() failed: sets `due_s` for the next one, or `is_given_up`.
  void failed(const std::string& how, bool is_refused, double now_s) {
    why = hosts_[next_] + ": " + how;
    is_round_refused_ = is_round_refused_ && is_refused;
    due_s = now_s;
    if (++next_ == hosts_.size()) {
      refused_rounds_ = is_round_refused_ ? refused_rounds_ + 1 : 0;
      // A rank listens before it publishes its addresses: its process is gone.
      is_given_up = refused_rounds_ >= kRefusedRoundsMax;
      next_ = 0;
      is_round_refused_ = true;
      due_s = now_s + backoff_s_;
      backoff_s_ = std::min(2 * backoff_s_, kBackoffMaxS);
    }
    is_given_up = is_given_up || now_s >= deadline_s;
  }

  // This process itself was paused for so long: the peer does not pay for it.
  void shift(double pause_s) {
    due_s += pause_s;
    deadline_s += pause_s;
  }

  double due_s, deadline_s;
  bool is_given_up = false;
  std::string why;

 private:
  static constexpr int kRefusedRoundsMax = 3;
  static constexpr double kBackoffMaxS = 1.0;
  std::vector<std::string> hosts_;
  std::size_t next_ = 0;
  double backoff_s_ = 0.05;
  bool is_round_refused_ = true;
  int refused_rounds_ = 0;
};

}  // namespace spotspeed::control
