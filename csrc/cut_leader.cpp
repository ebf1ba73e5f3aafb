#include "cut_leader.h"

#include <algorithm>
#include <cmath>

namespace spotspeed::cut {
namespace {

// Name of a round's save: unique over rounds and over leaders that do not know each other.
std::string attempt_name(std::int64_t number, const Term& term) {
  std::string digits = std::to_string(number);
  if (digits.size() < 4) digits.insert(0, 4 - digits.size(), '0');
  const std::string name = "c" + digits;
  if (term.counter == 0) return name;
  return name + "t" + std::to_string(term.counter) + "r" + std::to_string(term.leader);
}

}  // namespace

const Report* Leader::Round::report_of(Rank rank) const {
  for (const auto& [sender, report] : reports) {
    if (sender == rank) return &report;
  }
  return nullptr;
}

Phase Leader::Round::phase(Rank rank) const {
  const Report* report = report_of(rank);
  return report == nullptr ? Phase::kNone : report->phase;
}

void Leader::wish(Rank sender, const Notice& notice, Time now) {
  post_(sender, Heard{notice.serial});
  if (close_by || left) return;
  if (notice.wish == Wish::kClose) {
    closing_.insert(sender);
    return consider_close(now);
  }
  OptionalTime deadline;
  if (notice.seconds_left) deadline = now + *notice.seconds_left;
  if (notice.wish == Wish::kStop) {
    want_stop(deadline, notice.source, now);
  } else if (may_snap()) {
    begin(false, std::nullopt, notice.source, now);
  }
}

void Leader::report(Rank sender, const Report& report, Time now) {
  const auto entry = std::find_if(rounds_.begin(), rounds_.end(), [&report](const Round& round) {
    return round.number == report.round;
  });
  const Ranks& members = office_.members;
  const bool is_member = std::find(members.begin(), members.end(), sender) != members.end();
  if (entry == rounds_.end() || !is_member) {
    if (left && left->round == report.round) post_(sender, *left);
    return;
  }
  if (report.phase == Phase::kLocked) {
    if (entry->cut || entry->outcome) return;
    entry->started[sender] = report.started;
    if (entry->started.size() < members.size()) return;
    std::int64_t step = report.started;
    for (const auto& [rank, started] : entry->started) step = std::max(step, started);
    return decide(*entry, step, now);
  }
  if (report.phase <= entry->phase(sender)) return;
  auto known = std::find_if(entry->reports.begin(), entry->reports.end(),
                            [sender](const auto& each) { return each.first == sender; });
  if (known == entry->reports.end()) {
    entry->reports.emplace_back(sender, report);
  } else {
    known->second = report;
  }
  advance(*entry, now);
}

Leader::Round& Leader::place(std::int64_t number) {
  auto at = std::find_if(rounds_.begin(), rounds_.end(),
                         [number](const Round& round) { return round.number == number; });
  if (at == rounds_.end()) at = rounds_.emplace(at);
  *at = Round{};
  at->number = number;
  return *at;
}

void Leader::settle(std::int64_t step, OptionalTime deadline, Time now) {
  Round& entry = place(office_.next_round++);
  entry.stop = true;
  entry.source = "peer lost";
  entry.deadline = deadline;
  entry.resend_at = now;
  entry.capture_by = now + timing_.settle_s;
  decide(entry, step, now);
}

void Leader::adopt(const Cut& cut, std::optional<Outcome> outcome, OptionalTime deadline,
                   Time now) {
  Round& entry = place(cut.round);
  entry.stop = outcome ? outcome->stop : cut.stop;
  entry.source = cut.source;
  entry.deadline = deadline;
  entry.resend_at = now;
  entry.cut = cut;
  if (!outcome) entry.capture_by = now + timing_.settle_s;
  entry.outcome = std::move(outcome);
  resend(entry, now);
}

void Leader::tick(Time now) {
  for (Round& entry : rounds_) {
    if (!entry.outcome && is_over(entry.deadline, now)) {
      end(entry, std::nullopt, "the deadline has come", now);
    } else if (!entry.outcome && is_over(entry.capture_by, now)) {
      end(entry, std::nullopt, "the survivors did not reach one step", now);
    } else if (!entry.outcome && is_over(entry.rest_by, now)) {
      end(entry, std::nullopt, "a survivor is stuck in its update", now);
    }
    if (now >= entry.resend_at) resend(entry, now);
  }
  if (close_by && now >= resend_closed_at_) tell_closed(now);
}

OptionalTime Leader::wake() const {
  OptionalTime first;
  for (const Round& entry : rounds_) {
    first = sooner(first, entry.resend_at);
    if (entry.outcome) continue;
    first = sooner(sooner(sooner(first, entry.deadline), entry.capture_by), entry.rest_by);
  }
  return close_by ? sooner(first, resend_closed_at_) : first;
}

bool Leader::is_closed(Time now) const {
  if (!close_by) return false;
  return now >= *close_by ||
         std::all_of(office_.members.begin(), office_.members.end(),
                     [this](Rank rank) { return closed_heard.count(rank) != 0; });
}

void Leader::want_stop(OptionalTime deadline, const std::string& source, Time now) {
  const auto stopping =
      std::find_if(rounds_.begin(), rounds_.end(), [](const Round& entry) { return entry.stop; });
  const auto agreeing = std::find_if(rounds_.begin(), rounds_.end(),
                                     [this](const Round& entry) { return !is_decided(entry); });
  if (stopping != rounds_.end()) {
    stopping->deadline = sooner(stopping->deadline, deadline);
  } else if (agreeing != rounds_.end() && !agreeing->cut) {
    agreeing->stop = true;
    agreeing->source = source;
    agreeing->deadline = deadline;
  } else {
    if (!queued_) queued_ = {std::nullopt, source};
    queued_->first = sooner(queued_->first, deadline);
    begin_queued(now);
  }
}

bool Leader::all_decided() const {
  return std::all_of(rounds_.begin(), rounds_.end(),
                     [this](const Round& entry) { return is_decided(entry); });
}

bool Leader::may_snap() const {
  for (const Round& entry : rounds_) {
    if (entry.stop || !is_decided(entry)) return false;
    if (!entry.outcome && !is_captured(entry)) return false;
  }
  return true;
}

void Leader::begin_queued(Time now) {
  if (!queued_ || !all_decided()) return;
  auto [deadline, source] = std::move(*queued_);
  queued_.reset();
  begin(true, deadline, std::move(source), now);
}

void Leader::begin(bool stop, OptionalTime deadline, std::string source, Time now) {
  Round& entry = place(office_.next_round++);
  entry.stop = stop;
  entry.source = std::move(source);
  entry.deadline = deadline;
  entry.resend_at = now;
  resend(entry, now);
}

void Leader::decide(Round& entry, std::int64_t step, Time now) {
  const auto created_s = static_cast<std::int64_t>(std::trunc(now + office_.unix_offset_s));
  entry.cut = Cut{entry.number, step, entry.stop, attempt_name(entry.number, office_.term),
                  std::max<std::int64_t>(0, created_s), entry.source, std::nullopt, office_.lost};
  resend(entry, now);
  if (!entry.stop) return;
  for (Round& other : rounds_) {
    if (!other.outcome && other.cut && other.cut->step < step && !is_captured(other)) {
      end(other, std::nullopt,
          "superseded by the last save at step " + std::to_string(step), now);
    }
  }
}

void Leader::advance(Round& entry, Time now) {
  if (entry.outcome) {
    finish_if_known(entry, now);
    return begin_queued(now);
  }
  const auto failed = std::find_if(
      office_.members.begin(), office_.members.end(),
      [&entry](Rank rank) { return entry.phase(rank) == Phase::kFailed; });
  if (failed != office_.members.end() && office_.lost.empty()) {
    end(entry, std::nullopt,
        "rank " + std::to_string(*failed) + ": " + entry.report_of(*failed)->why, now);
  } else if (all_have(entry, Phase::kDurable)) {
    auto [digest, why] = verdict(entry);
    end(entry, std::move(digest), std::move(why), now);
  }
  if (is_captured(entry)) entry.capture_by.reset();
  watch_rest(entry, now);
  begin_queued(now);
}

void Leader::watch_rest(Round& entry, Time now) {
  if (!entry.capture_by || all_have(entry, Phase::kResting)) {
    entry.rest_by.reset();
  } else if (!entry.rest_by && is_decided(entry)) {
    entry.rest_by = now + timing_.stuck_s;
  }
}

std::pair<OptionalText, std::string> Leader::verdict(const Round& entry) const {
  std::set<std::string> digests;
  for (const auto& [rank, report] : entry.reports) {
    if (report.digest) digests.insert(*report.digest);
  }
  if (digests.size() == 1) return {*digests.begin(), ""};
  if (!digests.empty()) {
    std::string told;
    for (const std::string& digest : digests) told += (told.empty() ? "" : ", ") + digest;
    return {std::nullopt, "the ranks know different seals: " + told};
  }
  for (const auto& [rank, report] : entry.reports) {
    if (report.phase == Phase::kFailed) return {std::nullopt, report.why};
  }
  return {std::nullopt, "all parts were written, but nobody has seen the seal"};
}

void Leader::end(Round& entry, OptionalText digest, std::string why, Time now) {
  entry.outcome = Outcome{entry.number, entry.stop, std::move(digest), std::move(why)};
  resend(entry, now);
}

void Leader::finish_if_known(Round& entry, Time now) {
  if (!all_have(entry, Phase::kKnown)) return;
  const Outcome outcome = *entry.outcome;
  const bool stop = entry.stop;
  rounds_.remove_if([&entry](const Round& round) { return &round == &entry; });
  if (stop) {
    left = Leave{outcome.round, outcome.digest, outcome.why};
    for (const Rank rank : office_.members) post_(rank, *left);
  } else {
    begin_queued(now);
    consider_close(now);
  }
}

void Leader::resend(Round& entry, Time now) {
  double wait_s = timing_.resend_s;
  Message message = Prepare{entry.number};
  Ranks behind;
  const auto below = [&](Phase phase) {
    for (const Rank rank : office_.members) {
      if (entry.phase(rank) < phase) behind.push_back(rank);
    }
  };
  if (entry.outcome) {
    message = *entry.outcome;
    below(Phase::kKnown);
  } else if (entry.cut) {
    Cut cut = *entry.cut;
    cut.seconds_left.reset();
    if (entry.deadline) cut.seconds_left = *entry.deadline - now;
    message = Decide{std::move(cut)};
    below(Phase::kDecided);
    if (behind.empty()) {
      below(Phase::kDurable);
      wait_s = timing_.poll_s;
    }
  } else {
    for (const Rank rank : office_.members) {
      if (entry.started.count(rank) == 0) behind.push_back(rank);
    }
  }
  entry.resend_at = now + wait_s;
  for (const Rank rank : behind) post_(rank, message);
}

void Leader::consider_close(Time now) {
  const bool all = std::all_of(office_.members.begin(), office_.members.end(),
                               [this](Rank rank) { return closing_.count(rank) != 0; });
  if (!rounds_.empty() || !all) return;
  close_by = now + timing_.linger_s;
  closed_heard.insert(office_.rank);
  tell_closed(now);
}

void Leader::tell_closed(Time now) {
  resend_closed_at_ = now + timing_.resend_s;
  for (const Rank rank : office_.members) {
    if (closed_heard.count(rank) == 0) post_(rank, Closed{});
  }
}

bool Leader::all_have(const Round& entry, Phase phase) const {
  return std::all_of(office_.members.begin(), office_.members.end(),
                     [&](Rank rank) { return entry.phase(rank) >= phase; });
}

}  // namespace spotspeed::cut
