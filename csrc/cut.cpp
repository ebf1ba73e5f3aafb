#include "cut.h"

#include <algorithm>

namespace spotspeed::cut {

Machine::Machine(const Setup& setup)
    : setup_(setup),
      gate_(setup.position),
      member_(gate_, setup_.timing, [this](Message m) { to_leader(std::move(m)); }, actions_),
      wishes_(setup.timing.resend_s, [this](Message m) { to_leader(std::move(m)); }),
      offer_(setup.timing.resend_s, [this](Message m) { to_leader(std::move(m)); }, actions_) {
  if (setup.world_size < 1 || setup.rank < 0 || setup.rank >= setup.world_size) {
    throw std::invalid_argument("rank " + std::to_string(setup.rank) + " of " +
                                std::to_string(setup.world_size));
  }
  if (setup.rank == 0) lead_term(1);
}

// Local events.

Actions Machine::notice(Wish wish, OptionalTime seconds_left, std::string source, Time now) {
  if (state_ == State::kRunning) wishes_.add(wish, seconds_left, std::move(source), now);
  return drain(now);
}

bool Machine::enter(std::int64_t position, Time now) {
  if (gate_.enter(position)) {
    member_.waiting_since.reset();
    return true;
  }
  if (!member_.waiting_since) member_.waiting_since = now;
  return false;
}

Actions Machine::completed(std::int64_t position, Time now) {
  gate_.complete(position);
  if (state_ == State::kRunning) member_.look(now);
  return drain(now);
}

Actions Machine::staged(std::int64_t round, Time now) {
  member_.staged(round);
  return drain(now);
}

Actions Machine::durable(std::int64_t round, OptionalText digest, Time now) {
  member_.durable(round, std::move(digest));
  return drain(now);
}

Actions Machine::failed(std::int64_t round, const std::string& why, Time now) {
  member_.failed(round, why);
  return drain(now);
}

Actions Machine::delivered(std::int64_t round, Time now) {
  member_.delivered(round, now);
  return drain(now);
}

std::pair<std::int64_t, Actions> Machine::gather(std::string label, Blob value, Time now) {
  const std::int64_t serial = offer_.begin(std::move(label), std::move(value), now);
  if (!lost_.empty() || state_ != State::kRunning) {
    offer_.fail(why_lost_.empty() ? "this rank has left the protocol" : why_lost_);
  }
  return {serial, drain(now)};
}

Ranks Machine::missing() const {
  const auto serial = offer_.serial();
  if (desk_ && serial) return desk_->missing(*serial);
  return offer_.known_missing();
}

Actions Machine::peer_down(Rank rank, const std::string& why, Time now) {
  lose({rank}, why, now);
  return drain(now);
}

Actions Machine::tick(Time now) {
  if (state_ != State::kRunning) return drain(now);
  resend(now);
  member_.tick(now);
  if (lead_) {
    lead_->tick(now);
    close_if_all_have(now);
  }
  return drain(now);
}

OptionalTime Machine::wake() const {
  if (state_ != State::kRunning) return std::nullopt;
  OptionalTime first = sooner(sooner(member_.wake(), wishes_.wake()), offer_.wake());
  if (lead_) first = sooner(sooner(first, lead_->wake()), lead_->close_by);
  if (suspicion_) first = sooner(first, suspicion_->resend_at);
  if (statuses_) first = sooner(first, fence_resend_at_);
  return first;
}

// Messages.

Actions Machine::receive(Rank sender, const Term& term, const Message& message, Time now) {
  if (state_ != State::kRunning) {
    afterword(sender, message);
  } else if (const auto* fence = std::get_if<Fence>(&message)) {
    on_fence(sender, term, *fence, now);
  } else if (lost_.count(sender) != 0) {
    post(sender, fence_message());
  } else if (const auto* told = std::get_if<Suspect>(&message)) {
    lose({told->lost.begin(), told->lost.end()},
         "rank " + std::to_string(sender) + " says: " + told->why, now);
  } else if (term == term_) {
    dispatch(sender, message, now);
  }
  return drain(now);
}

void Machine::dispatch(Rank sender, const Message& message, Time now) {
  const bool is_leader = sender == term_.leader;
  if (is_leader && on_word(message, now)) return;
  if (const auto* status = std::get_if<Status>(&message)) {
    if (statuses_) {
      (*statuses_)[sender] = *status;
      conclude_fence(now);
    }
  } else if (lead_ && desk_) {
    if (const auto* notice = std::get_if<Notice>(&message)) {
      lead_->wish(sender, *notice, now);
    } else if (const auto* report = std::get_if<Report>(&message)) {
      lead_->report(sender, *report, now);
    } else if (std::holds_alternative<ClosedHeard>(message)) {
      lead_->closed_heard.insert(sender);
      close_if_all_have(now);
    } else if (const auto* gather = std::get_if<Gather>(&message)) {
      desk_->take(sender, *gather);
    }
  }
}

// The leader speaks; false where these are no words of a leader.
bool Machine::on_word(const Message& message, Time now) {
  if (const auto* prepare = std::get_if<Prepare>(&message)) {
    member_.prepare(*prepare);
  } else if (const auto* decide = std::get_if<Decide>(&message)) {
    member_.decide(*decide, now);
  } else if (const auto* outcome = std::get_if<Outcome>(&message)) {
    member_.outcome(*outcome, now);
  } else if (const auto* heard = std::get_if<Heard>(&message)) {
    wishes_.heard(heard->serial, now);
  } else if (const auto* leave = std::get_if<Leave>(&message)) {
    on_leave(*leave, now);
  } else if (std::holds_alternative<Closed>(message)) {
    to_leader(ClosedHeard{});
    all_closed();
  } else if (const auto* gathered = std::get_if<Gathered>(&message)) {
    offer_.answered(*gathered);
  } else {
    return false;
  }
  return true;
}

void Machine::on_leave(const Leave& message, Time now) {
  gate_.lock();
  member_.depart(message, now);
  offer_.fail("the job is leaving");
  state_ = State::kLeft;
}

// Helps those who have not heard the last word.
void Machine::afterword(Rank sender, const Message& message) {
  if (state_ == State::kClosed && std::holds_alternative<Closed>(message)) {
    post(sender, ClosedHeard{});
  } else if (lead_ && (std::holds_alternative<Report>(message) ||
                       std::holds_alternative<Notice>(message) ||
                       std::holds_alternative<Suspect>(message))) {
    if (state_ != State::kLeft) {
      post(sender, Closed{});
    } else if (lead_->left) {
      post(sender, *lead_->left);
    }
  }
}

// Loss of ranks.

void Machine::lose(const std::set<Rank>& ranks, const std::string& why, Time now) {
  std::set<Rank> fresh;
  for (const Rank rank : ranks) {
    if (gone_.count(rank) == 0 && rank != setup_.rank) fresh.insert(rank);
  }
  if (fresh.empty() || state_ != State::kRunning) return;
  if (lead_ && lead_->close_by) {
    lead_->closed_heard.insert(fresh.begin(), fresh.end());
    return close_if_all_have(now);
  }
  gone_.insert(fresh.begin(), fresh.end());
  const std::string told =
      !why_lost_.empty() ? why_lost_
                         : "rank " + std::to_string(*fresh.begin()) + " is lost: " + why;
  Rank first = 0;
  while (gone_.count(first) != 0) ++first;
  if (first != setup_.rank) suspect(first, {{gone_.begin(), gone_.end()}, told}, now);
  if (first == setup_.rank || first != term_.leader) give_up(std::set<Rank>(gone_), told);
  if (first == setup_.rank) begin_fence(now);
}

// The job is over: these ranks are lost. (A living leader may know that they have left.)
void Machine::give_up(const std::set<Rank>& ranks, const std::string& why) {
  Ranks fresh;
  for (const Rank rank : ranks) {
    if (lost_.count(rank) == 0) fresh.push_back(rank);
  }
  lost_.insert(ranks.begin(), ranks.end());
  gone_.insert(ranks.begin(), ranks.end());
  if (why_lost_.empty()) why_lost_ = why;
  member_.fence();
  for (const Rank rank : fresh) actions_.push_back(PeerLost{rank, why});
  offer_.fail(why_lost_);
}

void Machine::begin_fence(Time now) {
  term_ = Term{term_.counter + 1, setup_.rank};
  lead_.reset();
  desk_.reset();
  suspicion_.reset();
  statuses_.emplace();
  statuses_->emplace(setup_.rank, status(now));
  send_fence(now);
  conclude_fence(now);
}

void Machine::send_fence(Time now) {
  fence_resend_at_ = now + setup_.timing.resend_s;
  for (const Rank rank : living()) {
    if (statuses_->count(rank) == 0) post(rank, fence_message());
  }
}

void Machine::on_fence(Rank sender, const Term& term, const Fence& message, Time now) {
  const std::set<Rank> named(message.lost.begin(), message.lost.end());
  if (named.count(setup_.rank) != 0) {
    on_leave(Leave{0, std::nullopt,
                   "rank " + std::to_string(sender) + " gave this rank up: " + message.why},
             now);
  } else if (lost_.count(sender) != 0) {
    post(sender, fence_message());
  } else if (term == term_ && sender == term.leader) {
    post(sender, status(now));
  } else if (term > term_ && sender == term.leader) {
    term_ = term;
    lead_.reset();
    desk_.reset();
    suspicion_.reset();
    statuses_.reset();
    Suspect unknown;
    for (const Rank rank : gone_) {
      if (named.count(rank) == 0) unknown.lost.push_back(rank);
    }
    give_up(named, message.why);
    post(sender, status(now));
    if (!unknown.lost.empty()) {
      unknown.why = why_lost_;
      suspect(sender, std::move(unknown), now);
    }
  }
}

void Machine::suspect(Rank to, Suspect what, Time now) {
  suspicion_ = Suspicion{to, what, now + setup_.timing.resend_s};
  post(to, std::move(what));
}

Status Machine::status(Time now) {
  Status found;
  found.started = member_.fence();
  found.top_round = member_.top_round();
  const OptionalTime end = sooner(wishes_.deadline(), member_.deadline());
  if (end) found.seconds_left = *end - now;
  for (const auto& [round, held] : member_.rounds()) found.rounds.push_back(held.view());
  return found;
}

void Machine::conclude_fence(Time now) {
  if (!statuses_) return;
  for (const Rank rank : living()) {
    if (statuses_->count(rank) == 0) return;
  }
  const Plan plan = plan_after_loss(*statuses_, why_lost_);
  statuses_.reset();
  Leader& lead = lead_term(plan.next_round);
  const double longest_s = setup_.timing.after_loss_s;
  const Time deadline =
      now + (plan.seconds_left ? std::min(longest_s, *plan.seconds_left) : longest_s);
  for (const auto& [cut, outcome] : plan.ended) lead.adopt(cut, outcome, std::nullopt, now);
  if (plan.adopted) {
    lead.adopt(*plan.adopted, std::nullopt, deadline, now);
  } else if (!plan.is_stopped()) {
    lead.settle(plan.step, deadline, now);
  }
}

// Time.

void Machine::resend(Time now) {
  wishes_.tick(now);
  if (suspicion_ && now >= suspicion_->resend_at) {
    suspicion_->resend_at = now + setup_.timing.resend_s;
    post(suspicion_->to, suspicion_->suspect);
  }
  if (statuses_ && now >= fence_resend_at_) send_fence(now);
  offer_.tick(now);
}

Fence Machine::fence_message() const { return {{lost_.begin(), lost_.end()}, why_lost_}; }

Ranks Machine::living() const {
  Ranks found;
  for (Rank rank = 0; rank < setup_.world_size; ++rank) {
    if (lost_.count(rank) == 0) found.push_back(rank);
  }
  return found;
}

Leader& Machine::lead_term(std::int64_t next_round) {
  const Post say = [this](Rank to, Message message) { post(to, std::move(message)); };
  Ranks members = living();
  lead_ = std::make_unique<Leader>(
      Leader::Office{setup_.rank, term_, members, {lost_.begin(), lost_.end()},
                     setup_.unix_offset_s, next_round},
      setup_.timing, say);
  desk_ = std::make_unique<Desk>(std::move(members), say);
  return *lead_;
}

void Machine::close_if_all_have(Time now) {
  if (lead_ && lead_->is_closed(now)) all_closed();
}

void Machine::all_closed() {
  if (state_ != State::kRunning) return;
  state_ = State::kClosed;
  offer_.fail("all ranks have closed");
  actions_.push_back(AllClosed{});
}

void Machine::to_leader(Message message) { post(term_.leader, std::move(message)); }

void Machine::post(Rank to, Message message) {
  if (to == setup_.rank) {
    inbox_.push_back(std::move(message));
  } else if (lost_.count(to) == 0 || std::holds_alternative<Fence>(message)) {
    actions_.push_back(Send{to, term_, std::move(message)});
  }
}

// Handles what this rank says to itself, then hands out the actions.
Actions Machine::drain(Time now) {
  for (std::size_t next = 0; next < inbox_.size(); ++next) {
    const Message message = std::move(inbox_[next]);
    if (state_ == State::kRunning) dispatch(setup_.rank, message, now);
  }
  inbox_.clear();
  return std::exchange(actions_, {});
}

}  // namespace spotspeed::cut
