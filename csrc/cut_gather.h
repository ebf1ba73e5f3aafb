// Exchange of small values between all ranks over the control plane; core/cut_gather.py.
//
// Lifetime: `say`, `post` and `actions` must outlive the objects.
// Threads: one mutex around them.
// Alignment: none required.
#pragma once

#include <map>

#include "cut_actions.h"

namespace spotspeed::cut {

// The label with which a rank takes its offer back; no exchange is called so.
inline constexpr char kWithdrawn[] = "withdrawn";

// One rank's side: its value, sent again, ever more slowly, until the result is there.
class Offer {
 public:
  Offer(double resend_s, Say say, Actions& actions)
      : resend_s_(resend_s), say_(std::move(say)), actions_(actions) {}

  // Offers `value`; the serial of this exchange. With the label kWithdrawn the exchange that runs
  // is given up, and `value` says why; it ends with that, unless all ranks had come before.
  std::int64_t begin(std::string label, Blob value, Time now);
  std::optional<std::int64_t> serial() const;
  const Ranks& known_missing() const { return known_missing_; }
  void answered(const Gathered& message);
  void fail(const std::string& why);
  void tick(Time now);
  OptionalTime wake() const;

 private:
  void end(std::optional<std::vector<Blob>> values, std::string why);

  double resend_s_;
  Say say_;
  Actions& actions_;
  Ranks known_missing_;
  std::int64_t serial_ = 0;
  std::optional<Gather> message_;
  Time resend_at_ = 0;
  double wait_s_ = 0;
};

// The leader's side: collects the values of one serial after the other.
class Desk {
 public:
  Desk(Ranks members, Post post) : members_(std::move(members)), post_(std::move(post)) {}

  // One rank's value; answers all when it was the last, or labels differ, or one gives up.
  void take(Rank sender, const Gather& message);
  // Ranks whose value has not come.
  Ranks missing(std::int64_t serial) const;

 private:
  using Offers = std::vector<std::pair<Rank, Gather>>;
  void finish(Gathered result, bool is_for_all = false);

  Ranks members_;
  Post post_;
  std::map<std::int64_t, Offers> offers_;
  std::map<std::int64_t, Gathered> results_;
  std::int64_t newest_ = 0;  // The last exchange that has ended; those before it have, too.
};

}  // namespace spotspeed::cut
