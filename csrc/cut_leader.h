// The leader's part in rounds; the twin of core/cut_leader.py.
//
// Lifetime: `timing` and `post` must outlive the object.
// Threads: one mutex around it.
// Alignment: none required.
#pragma once

#include <list>
#include <map>
#include <set>

#include "cut_actions.h"

namespace spotspeed::cut {

class Leader {
 public:
  struct Office {
    Rank rank = 0;
    Term term;
    Ranks members;
    Ranks lost;
    double unix_offset_s = 0;
    std::int64_t next_round = 1;
  };

  Leader(Office office, const Timing& timing, Post post)
      : office_(std::move(office)), timing_(timing), post_(std::move(post)) {}

  // A rank wants a save, a stop, or to close.
  void wish(Rank sender, const Notice& notice, Time now);
  // A member is so far in a round; anything about other rounds is old and ignored.
  void report(Rank sender, const Report& report, Time now);
  // After a loss, with all survivors locked: stops at `step`.
  void settle(std::int64_t step, OptionalTime deadline, Time now);
  // After a loss: goes on with what an earlier leader decided.
  void adopt(const Cut& cut, std::optional<Outcome> outcome, OptionalTime deadline, Time now);
  void tick(Time now);
  OptionalTime wake() const;
  // Whether all have closed and know it, or have had time to.
  bool is_closed(Time now) const;

  std::set<Rank> closed_heard;
  OptionalTime close_by;
  std::optional<Leave> left;

 private:
  // One round as its leader sees it.
  struct Round {
    std::int64_t number = 0;
    bool stop = false;
    std::string source;
    OptionalTime deadline;
    Time resend_at = 0;
    std::optional<Cut> cut;
    OptionalTime capture_by, rest_by;
    std::map<Rank, std::int64_t> started;
    // In the order of the first report of each.
    std::vector<std::pair<Rank, Report>> reports;
    std::optional<Outcome> outcome;

    const Report* report_of(Rank rank) const;
    Phase phase(Rank rank) const;
  };

  // A fresh round of that number: at the end, or in place of one that has it.
  Round& place(std::int64_t number);
  void want_stop(OptionalTime deadline, const std::string& source, Time now);
  bool may_snap() const;
  void begin_queued(Time now);
  void begin(bool stop, OptionalTime deadline, std::string source, Time now);
  void decide(Round& entry, std::int64_t step, Time now);
  void advance(Round& entry, Time now);
  // After a loss, from when all know the step until all rest at it.
  void watch_rest(Round& entry, Time now);
  std::pair<OptionalText, std::string> verdict(const Round& entry) const;
  void end(Round& entry, OptionalText digest, std::string why, Time now);
  void finish_if_known(Round& entry, Time now);
  void resend(Round& entry, Time now);
  void consider_close(Time now);
  void tell_closed(Time now);
  bool all_have(const Round& entry, Phase phase) const;
  // Whether every rank knows the step, so that another round may lock.
  bool is_decided(const Round& entry) const { return all_have(entry, Phase::kDecided); }
  bool is_captured(const Round& entry) const { return all_have(entry, Phase::kCaptured); }
  bool all_decided() const;

  Office office_;
  const Timing& timing_;
  Post post_;
  // In the order in which they were begun or adopted.
  std::list<Round> rounds_;
  std::set<Rank> closing_;
  std::optional<std::pair<OptionalTime, std::string>> queued_;
  Time resend_closed_at_ = 0;
};

}  // namespace spotspeed::cut
