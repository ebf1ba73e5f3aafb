// One rank's part in rounds; the twin of core/cut_member.py.
//
// Lifetime: `gate`, `timing`, `say` and `actions` must outlive the object.
// Threads: one mutex around it.
// Alignment: none required.
#pragma once

#include <map>

#include "cut_actions.h"
#include "cut_gate.h"

namespace spotspeed::cut {

// One decided round as this rank sees it.
struct Held {
  Cut cut;
  OptionalTime deadline;
  Time decided_at = 0;
  Phase phase = Phase::kDecided;
  OptionalText digest;
  std::string why;
  bool is_settled = false;

  RoundView view() const { return {cut, is_settled ? Phase::kKnown : phase, digest, why}; }
};

class Member {
 public:
  Member(Gate& gate, const Timing& timing, Say say, Actions& actions)
      : gate_(gate), timing_(timing), say_(std::move(say)), actions_(actions) {}

  // Words of the leader.
  void prepare(const Prepare& message);
  void decide(const Decide& message, Time now);
  void outcome(const Outcome& message, Time now);
  // Settles what is still open: nobody will hear how it ends.
  void depart(const Leave& message, Time now);

  // Captures what can be captured now; to be called whenever an update has completed.
  void look(Time now);
  void staged(std::int64_t round);
  void durable(std::int64_t round, OptionalText digest);
  void failed(std::int64_t round, const std::string& why);
  void delivered(std::int64_t round, Time now);
  void tick(Time now);
  OptionalTime wake() const;
  // The nearest deadline of a stopping round.
  OptionalTime deadline() const;
  // Locks for good: after a loss only a stopping round lets updates begin.
  std::int64_t fence();

  const std::map<std::int64_t, Held>& rounds() const { return rounds_; }
  std::int64_t top_round() const { return top_round_; }
  bool is_fenced() const { return is_fenced_; }
  // Since when the main thread waits at the gate.
  OptionalTime waiting_since;

 private:
  Held* find(std::int64_t round);
  void unlock(bool stop);
  std::vector<std::int64_t> holding() const;
  OptionalTime hold_due() const;
  void advance(Held& held, Phase phase, std::string why);
  void settle(Held& held, OptionalText digest, std::string why, Time now);
  void answer(std::int64_t round);
  void forget_old();

  Gate& gate_;
  const Timing& timing_;
  Say say_;
  Actions& actions_;
  std::map<std::int64_t, Held> rounds_;
  std::int64_t top_round_ = 0, top_decided_ = 0;
  bool is_fenced_ = false;
  OptionalTime resend_at_;
};

}  // namespace spotspeed::cut
