// What the cut machine asks its driver to do, and the times it works with; core/cut_actions.py.
//
// Lifetime: plain values that own all they hold.
// Threads: values.
// Alignment: none required.
#pragma once

#include <functional>
#include <variant>
#include <vector>

#include "cut_messages.h"

namespace spotspeed::cut {

// Intervals of the protocol, in seconds; explained in core/cut_actions.py.
struct Timing {
  double resend_s = 0.2;
  double poll_s = 3.0;
  double max_hold_s = 30.0;
  double settle_s = 15.0;
  double after_loss_s = 120.0;
  double linger_s = 1.0;
  double stuck_s = 0.5;
};

struct Send {
  Rank to = 0;
  Term term;
  Message message;
};

struct Decided {
  Cut cut;
  SPOTSPEED_FIELDS(cut)
};

struct Capture {
  Cut cut;
  SPOTSPEED_FIELDS(cut)
};

struct Settled {
  Cut cut;
  OptionalText digest;
  std::string why;
  SPOTSPEED_FIELDS(cut, digest, why)
};

struct Departed {
  std::int64_t round = 0;
  OptionalText digest;
  std::string why;
  SPOTSPEED_FIELDS(round, digest, why)
};

struct PeerLost {
  Rank rank = 0;
  std::string why;
  SPOTSPEED_FIELDS(rank, why)
};

struct AllClosed {
  SPOTSPEED_FIELDS()
};

struct Exchanged {
  std::int64_t serial = 0;
  std::optional<std::vector<Blob>> values;
  std::string why;
  SPOTSPEED_FIELDS(serial, values, why)
};

using Action =
    std::variant<Send, Decided, Capture, Settled, Departed, PeerLost, AllClosed, Exchanged>;
using Actions = std::vector<Action>;

// Sends to the leader.
using Say = std::function<void(Message)>;
// Sends to a rank.
using Post = std::function<void(Rank, Message)>;

// The sooner of two times, of which each may be missing.
inline OptionalTime sooner(OptionalTime one, OptionalTime other) {
  if (!one) return other;
  return other && *other < *one ? other : one;
}

inline bool is_over(OptionalTime end, Time now) { return end && now >= *end; }

}  // namespace spotspeed::cut
