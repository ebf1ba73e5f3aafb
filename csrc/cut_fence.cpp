#include "cut_fence.h"

#include <algorithm>

#include "cut_actions.h"

namespace spotspeed::cut {

bool Plan::is_stopped() const {
  return adopted || std::any_of(ended.begin(), ended.end(),
                                [](const auto& each) { return each.second.stop; });
}

Plan plan_after_loss(const std::map<Rank, Status>& statuses, const std::string& why) {
  Plan plan;
  std::int64_t top_round = 0;
  std::map<std::int64_t, std::vector<const RoundView*>> views;
  for (const auto& [rank, status] : statuses) {
    plan.step = std::max(plan.step, status.started);
    top_round = std::max(top_round, status.top_round);
    plan.seconds_left = sooner(plan.seconds_left, status.seconds_left);
    for (const RoundView& view : status.rounds) views[view.cut.round].push_back(&view);
  }
  plan.next_round = top_round + 1;
  for (auto at = views.rbegin(); at != views.rend(); ++at) {
    const auto& [number, seen] = *at;
    const Cut& cut = seen.front()->cut;
    const auto is_known = [](const RoundView* view) { return view->phase == Phase::kKnown; };
    const auto known = std::find_if(seen.begin(), seen.end(), is_known);
    const auto count = static_cast<std::size_t>(std::count_if(seen.begin(), seen.end(), is_known));
    if (count == statuses.size() && !cut.stop) continue;
    if (known != seen.end()) {
      plan.ended.emplace_back(cut, Outcome{number, cut.stop, (*known)->digest, (*known)->why});
    } else if (cut.stop && cut.step == plan.step && !plan.adopted) {
      plan.adopted = cut;
    } else {
      plan.ended.emplace_back(cut, Outcome{number, false, std::nullopt, why});
    }
  }
  return plan;
}

}  // namespace spotspeed::cut
