// What the survivors of a loss do next; the twin of core/cut_fence.py.
//
// Lifetime: plain values that own all they hold.
// Threads: a pure function.
// Alignment: none required.
#pragma once

#include <map>

#include "cut_messages.h"

namespace spotspeed::cut {

struct Plan {
  std::int64_t step = 0;
  std::int64_t next_round = 1;
  OptionalTime seconds_left;
  std::vector<std::pair<Cut, Outcome>> ended;
  std::optional<Cut> adopted;

  bool is_stopped() const;
};

// A known outcome is kept, a decided stop is gone on with where the survivors stand at it; else
// they stop at the newest step that one of them has begun. `statuses` is not empty.
Plan plan_after_loss(const std::map<Rank, Status>& statuses, const std::string& why);

}  // namespace spotspeed::cut
