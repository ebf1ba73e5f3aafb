#include "cut_member.h"

#include <cstdio>

namespace spotspeed::cut {
namespace {

constexpr std::size_t kRememberedRounds = 8;

// The cut of a round with what is left until its deadline.
Cut cut_at(const Held& held, Time now) {
  Cut cut = held.cut;
  if (held.deadline) cut.seconds_left = *held.deadline - now;
  return cut;
}

std::string seconds(double value) {
  char text[32];
  std::snprintf(text, sizeof text, "%g", value);
  return text;
}

}  // namespace

Held* Member::find(std::int64_t round) {
  const auto at = rounds_.find(round);
  return at == rounds_.end() ? nullptr : &at->second;
}

void Member::prepare(const Prepare& message) {
  if (message.round <= top_decided_) return answer(message.round);
  top_round_ = std::max(top_round_, message.round);
  say_(Report{message.round, Phase::kLocked, gate_.lock(), std::nullopt, ""});
}

void Member::decide(const Decide& message, Time now) {
  const Cut& cut = message.cut;
  if (cut.round <= top_decided_) {
    if (cut.stop && find(cut.round) != nullptr) gate_.allow(cut.step);
    return answer(cut.round);
  }
  top_decided_ = cut.round;
  top_round_ = std::max(top_round_, cut.round);
  OptionalTime deadline;
  if (cut.seconds_left) deadline = now + *cut.seconds_left;
  Held fresh;
  fresh.cut = cut;
  fresh.deadline = deadline;
  fresh.decided_at = now;
  Held& held = rounds_[cut.round] = std::move(fresh);
  actions_.push_back(Decided{cut});
  forget_old();
  gate_.hold(cut.round, cut.step);
  if (cut.stop) {
    gate_.allow(cut.step);
  } else {
    unlock(false);
  }
  if (gate_.started() > cut.step) {
    advance(held, Phase::kFailed,
            "step " + std::to_string(gate_.started()) + " has begun already");
  } else {
    say_(Report{cut.round, Phase::kDecided, 0, std::nullopt, ""});
  }
  look(now);
}

void Member::look(Time now) {
  for (auto& [round, held] : rounds_) {
    if (held.phase != Phase::kDecided || held.is_settled) continue;
    if (gate_.rests_at(held.cut.step)) {
      held.phase = Phase::kResting;
      actions_.push_back(Capture{cut_at(held, now)});
      // Only after a loss does the leader ask who is stuck.
      if (is_fenced_) answer(round);
    }
  }
}

void Member::staged(std::int64_t round) {
  Held* held = find(round);
  if (held == nullptr || held->phase >= Phase::kCaptured || held->is_settled) return;
  gate_.drop(round);
  advance(*held, Phase::kCaptured, "");
}

void Member::durable(std::int64_t round, OptionalText digest) {
  Held* held = find(round);
  if (held == nullptr || held->phase >= Phase::kDurable || held->is_settled) return;
  gate_.drop(round);
  held->digest = std::move(digest);
  advance(*held, Phase::kDurable, "");
}

void Member::failed(std::int64_t round, const std::string& why) {
  Held* held = find(round);
  if (held != nullptr && held->phase < Phase::kFailed && !held->is_settled) {
    advance(*held, Phase::kFailed, why);
  }
}

void Member::outcome(const Outcome& message, Time now) {
  Held* held = find(message.round);
  if (held == nullptr || held->phase == Phase::kKnown) {
    if (top_decided_ < message.round && message.round == top_round_) unlock(message.stop);
    top_decided_ = std::max(top_decided_, message.round);
    top_round_ = std::max(top_round_, message.round);
    answer(message.round);
  } else if (!held->is_settled) {
    settle(*held, message.digest, message.why, now);
  }
}

void Member::delivered(std::int64_t round, Time now) {
  Held* held = find(round);
  if (held == nullptr || !held->is_settled || held->phase == Phase::kKnown) return;
  gate_.drop(round);
  held->phase = Phase::kKnown;
  answer(round);
  if (held->cut.stop) resend_at_ = now + timing_.resend_s;
}

void Member::depart(const Leave& message, Time now) {
  for (auto& [round, held] : rounds_) {
    if (held.is_settled) continue;
    if (round == message.round) {
      settle(held, message.digest, message.why, now);
    } else {
      settle(held, std::nullopt, "left before the outcome was known", now);
    }
  }
  resend_at_.reset();
  OptionalText digest = message.digest;
  for (const auto& [round, held] : rounds_) {
    if (held.cut.stop && held.digest && !held.digest->empty()) digest = held.digest;
  }
  const bool is_sealed = digest && !digest->empty();
  actions_.push_back(Departed{message.round, digest, is_sealed ? "" : message.why});
}

void Member::tick(Time now) {
  if (is_over(resend_at_, now)) {
    resend_at_ = now + timing_.resend_s;
    for (const auto& [round, held] : rounds_) {
      if (held.cut.stop && held.phase == Phase::kKnown) answer(round);
    }
  }
  if (!is_over(hold_due(), now)) return;
  for (const std::int64_t round : holding()) {
    failed(round, "held a step for " + seconds(timing_.max_hold_s) + " s");
  }
}

OptionalTime Member::wake() const { return sooner(resend_at_, hold_due()); }

OptionalTime Member::deadline() const {
  OptionalTime first;
  for (const auto& [round, held] : rounds_) first = sooner(first, held.deadline);
  return first;
}

std::int64_t Member::fence() {
  is_fenced_ = true;
  return gate_.lock();
}

void Member::unlock(bool stop) {
  if (!stop && !is_fenced_) gate_.allow(kOpen);
}

std::vector<std::int64_t> Member::holding() const {
  std::vector<std::int64_t> found;
  for (const auto& [round, held] : rounds_) {
    if (held.is_settled) continue;
    if (held.cut.stop) return {};
    if (held.phase < Phase::kCaptured) found.push_back(round);
  }
  return found;
}

OptionalTime Member::hold_due() const {
  if (!waiting_since) return std::nullopt;
  OptionalTime first;
  for (const std::int64_t round : holding()) {
    first = sooner(first, std::max(*waiting_since, rounds_.at(round).decided_at));
  }
  return first ? OptionalTime(*first + timing_.max_hold_s) : std::nullopt;
}

void Member::advance(Held& held, Phase phase, std::string why) {
  held.phase = phase;
  held.why = std::move(why);
  answer(held.cut.round);
}

void Member::settle(Held& held, OptionalText digest, std::string why, Time now) {
  held.is_settled = true;
  held.digest = digest;
  held.why = why;
  actions_.push_back(Settled{cut_at(held, now), std::move(digest), std::move(why)});
}

void Member::answer(std::int64_t round) {
  const Held* held = find(round);
  if (held == nullptr) {
    say_(Report{round, Phase::kKnown, 0, std::nullopt, ""});
  } else {
    say_(Report{round, held->phase, 0, held->digest, held->why});
  }
}

void Member::forget_old() {
  std::size_t over = 0;
  for (const auto& [round, held] : rounds_) over += held.phase == Phase::kKnown;
  for (auto at = rounds_.begin(); at != rounds_.end() && over > kRememberedRounds;) {
    if (at->second.phase == Phase::kKnown) {
      at = rounds_.erase(at);
      --over;
    } else {
      ++at;
    }
  }
}

}  // namespace spotspeed::cut
