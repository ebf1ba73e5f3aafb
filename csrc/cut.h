// The cut: how all ranks agree on one step. The native twin of core/cut.py, which explains it.
//
// Pure: messages and local events in, actions out, time as an argument. The simulator drives both
// twins in lockstep (spotspeed/testing/cut_lockstep.py).
//
// Lifetime: not to be moved; its parts refer to each other.
// Threads: one mutex around it.
// Alignment: none required.
#pragma once

#include <memory>
#include <set>

#include "cut_fence.h"
#include "cut_gather.h"
#include "cut_leader.h"
#include "cut_member.h"
#include "cut_wishes.h"

namespace spotspeed::cut {

// Whether this rank still takes part.
enum class State { kRunning = 1, kClosed = 2, kLeft = 3 };

// The protocol of one rank. Every method returns the actions to take, in order.
class Machine {
 public:
  struct Setup {
    Rank rank = 0;
    std::int64_t world_size = 1;
    std::int64_t position = 0;
    Timing timing;
    double unix_offset_s = 0;
  };
  explicit Machine(const Setup& setup);
  Machine(const Machine&) = delete;
  Machine& operator=(const Machine&) = delete;

  // Local events; see core/cut.py.
  Actions notice(Wish wish, OptionalTime seconds_left, std::string source, Time now);
  bool enter(std::int64_t position, Time now);
  Actions completed(std::int64_t position, Time now);
  Actions staged(std::int64_t round, Time now);
  Actions durable(std::int64_t round, OptionalText digest, Time now);
  Actions failed(std::int64_t round, const std::string& why, Time now);
  Actions delivered(std::int64_t round, Time now);
  std::pair<std::int64_t, Actions> gather(std::string label, Blob value, Time now);
  Ranks missing() const;
  Actions peer_down(Rank rank, const std::string& why, Time now);
  Actions tick(Time now);
  OptionalTime wake() const;
  // A message from another rank.
  Actions receive(Rank sender, const Term& term, const Message& message, Time now);

  Gate& gate() { return gate_; }
  const Member& member() const { return member_; }
  State state() const { return state_; }
  const Term& term() const { return term_; }
  const std::set<Rank>& lost() const { return lost_; }

 private:
  struct Suspicion {
    Rank to = 0;
    Suspect suspect;
    Time resend_at = 0;
  };

  void dispatch(Rank sender, const Message& message, Time now);
  bool on_word(const Message& message, Time now);
  void on_leave(const Leave& message, Time now);
  void afterword(Rank sender, const Message& message);
  void lose(const std::set<Rank>& ranks, const std::string& why, Time now);
  void give_up(const std::set<Rank>& ranks, const std::string& why);
  void begin_fence(Time now);
  void send_fence(Time now);
  void on_fence(Rank sender, const Term& term, const Fence& message, Time now);
  void suspect(Rank to, Suspect what, Time now);
  Status status(Time now);
  void conclude_fence(Time now);
  void resend(Time now);
  Fence fence_message() const;
  Ranks living() const;
  Leader& lead_term(std::int64_t next_round);
  void close_if_all_have(Time now);
  void all_closed();
  void to_leader(Message message);
  void post(Rank to, Message message);
  Actions drain(Time now);

  const Setup setup_;
  Gate gate_;
  State state_ = State::kRunning;
  Term term_;
  std::set<Rank> lost_, gone_;
  std::string why_lost_;
  Actions actions_;
  std::vector<Message> inbox_;
  Member member_;
  std::unique_ptr<Leader> lead_;
  std::unique_ptr<Desk> desk_;
  Wishes wishes_;
  Offer offer_;
  std::optional<Suspicion> suspicion_;
  std::optional<std::map<Rank, Status>> statuses_;
  Time fence_resend_at_ = 0;
};

}  // namespace spotspeed::cut
