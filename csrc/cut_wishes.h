// What one rank wants from the leader, said again until it is heard; core/cut_wishes.py.
//
// Lifetime: `say` must be callable for as long as the object is used.
// Threads: one mutex around it.
// Alignment: none required.
#pragma once

#include <map>

#include "cut_actions.h"

namespace spotspeed::cut {

class Wishes {
 public:
  Wishes(double resend_s, Say say) : resend_s_(resend_s), say_(std::move(say)) {}

  void add(Wish wish, OptionalTime seconds_left, std::string source, Time now);
  void heard(std::int64_t serial, Time now);
  void tick(Time now);
  OptionalTime wake() const;
  // The nearest end that a wish has named.
  OptionalTime deadline() const;

 private:
  struct Entry {
    Notice notice;
    OptionalTime deadline;
    Time resend_at = 0;
  };
  void say_if_due(Entry& entry, Time now);

  double resend_s_;
  Say say_;
  std::int64_t serial_ = 0;
  std::map<std::int64_t, Entry> open_;
};

}  // namespace spotspeed::cut
