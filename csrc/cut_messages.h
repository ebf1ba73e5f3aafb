// What ranks say to each other while they agree on one step; the twin of core/cut_messages.py.
//
// Lifetime: plain values that own all they hold.
// Threads: values; encode and decode are pure functions.
// Alignment: none required.
#pragma once

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <variant>
#include <vector>

// The members that travel, in their order on the wire.
#define SPOTSPEED_FIELDS(...)                              \
  auto fields() { return std::tie(__VA_ARGS__); }          \
  auto fields() const { return std::tie(__VA_ARGS__); }

namespace spotspeed::cut {

constexpr std::size_t kMaxTextCodePoints = 4096;

using Rank = std::int64_t;
using Ranks = std::vector<Rank>;
// Seconds: a point on the driver's clock, or what is left.
using Time = double;
using OptionalTime = std::optional<Time>;
using OptionalText = std::optional<std::string>;

// Bytes that are not text.
struct Blob {
  std::string bytes;
};

enum class Wish : std::int64_t { kSnap = 1, kStop = 2, kClose = 3 };

// How far one rank is in one round; only ever grows.
enum class Phase : std::int64_t {
  kNone = 0, kLocked, kDecided, kResting, kCaptured, kDurable, kFailed, kKnown
};

// One leadership. A later one silences all earlier ones.
struct Term {
  std::int64_t counter = 0;
  Rank leader = 0;
  SPOTSPEED_FIELDS(counter, leader)
};
inline bool operator==(const Term& a, const Term& b) { return a.fields() == b.fields(); }
inline bool operator>(const Term& a, const Term& b) { return a.fields() > b.fields(); }

struct Cut {
  std::int64_t round = 0;
  std::int64_t step = 0;
  bool stop = false;
  std::string attempt;
  std::int64_t created_unix_s = 0;
  std::string source;
  OptionalTime seconds_left;
  Ranks lost;
  SPOTSPEED_FIELDS(round, step, stop, attempt, created_unix_s, source, seconds_left, lost)
};

struct RoundView {
  Cut cut;
  Phase phase = Phase::kNone;
  OptionalText digest;
  std::string why;
  SPOTSPEED_FIELDS(cut, phase, digest, why)
};

struct Notice {
  std::int64_t serial = 0;
  Wish wish = Wish::kSnap;
  OptionalTime seconds_left;
  std::string source;
  SPOTSPEED_FIELDS(serial, wish, seconds_left, source)
};

struct Heard {
  std::int64_t serial = 0;
  SPOTSPEED_FIELDS(serial)
};

struct Prepare {
  std::int64_t round = 0;
  SPOTSPEED_FIELDS(round)
};

struct Decide {
  Cut cut;
  SPOTSPEED_FIELDS(cut)
};

struct Report {
  std::int64_t round = 0;
  Phase phase = Phase::kNone;
  std::int64_t started = 0;
  OptionalText digest;
  std::string why;
  SPOTSPEED_FIELDS(round, phase, started, digest, why)
};

struct Outcome {
  std::int64_t round = 0;
  bool stop = false;
  OptionalText digest;
  std::string why;
  SPOTSPEED_FIELDS(round, stop, digest, why)
};

struct Leave {
  std::int64_t round = 0;
  OptionalText digest;
  std::string why;
  SPOTSPEED_FIELDS(round, digest, why)
};

struct Suspect {
  Ranks lost;
  std::string why;
  SPOTSPEED_FIELDS(lost, why)
};

struct Fence {
  Ranks lost;
  std::string why;
  SPOTSPEED_FIELDS(lost, why)
};

struct Status {
  std::int64_t started = 0;
  std::int64_t top_round = 0;
  OptionalTime seconds_left;
  std::vector<RoundView> rounds;
  SPOTSPEED_FIELDS(started, top_round, seconds_left, rounds)
};

struct Closed {
  SPOTSPEED_FIELDS()
};

struct ClosedHeard {
  SPOTSPEED_FIELDS()
};

struct Gather {
  std::int64_t serial = 0;
  std::string label;
  Blob value;
  SPOTSPEED_FIELDS(serial, label, value)
};

struct Gathered {
  std::int64_t serial = 0;
  std::vector<Blob> values;
  std::string why;
  Ranks missing;
  SPOTSPEED_FIELDS(serial, values, why, missing)
};

// In the order of their codes on the wire, which begin at 1.
using Message = std::variant<Notice, Heard, Prepare, Decide, Report, Outcome, Leave, Suspect, Fence,
                             Status, Closed, ClosedHeard, Gather, Gathered>;

// What was received is no message; what() says why.
class FormatError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// The same bytes as core/cut_messages.encode; text is cut to kMaxTextCodePoints.
std::string encode(const Term& term, const Message& message);

// Accepts exactly what core/cut_messages.decode accepts. Throws FormatError.
std::pair<Term, Message> decode(std::string_view data);

}  // namespace spotspeed::cut
