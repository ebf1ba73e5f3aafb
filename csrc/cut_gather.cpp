#include "cut_gather.h"

#include <algorithm>

namespace spotspeed::cut {
namespace {

constexpr std::size_t kRememberedResults = 4;
constexpr double kSlowestResendS = 5.0;
constexpr std::size_t kNamedRanks = 8;

template <typename Offers>
auto find(Offers& offers, Rank rank) {
  return std::find_if(offers.begin(), offers.end(),
                      [rank](const auto& offer) { return offer.first == rank; });
}

// Which ranks exchange which label, in the order of the ranks.
std::string mismatch(std::vector<std::pair<Rank, Gather>> offers) {
  std::sort(offers.begin(), offers.end(),
            [](const auto& a, const auto& b) { return a.first < b.first; });
  std::vector<std::pair<std::string, Ranks>> labels;
  for (const auto& [rank, offer] : offers) {
    auto at = std::find_if(labels.begin(), labels.end(),
                           [&label = offer.label](const auto& l) { return l.first == label; });
    if (at == labels.end()) at = labels.insert(at, {offer.label, {}});
    at->second.push_back(rank);
  }
  std::string told;
  for (const auto& [label, ranks] : labels) {
    told += told.empty() ? "ranks [" : "; ranks [";
    for (std::size_t i = 0; i < std::min(ranks.size(), kNamedRanks); ++i) {
      told += (i == 0 ? "" : ", ") + std::to_string(ranks[i]);
    }
    told += "] exchange '" + label + "'";
  }
  return "the ranks are not at the same place of the program: " + told;
}

}  // namespace

std::int64_t Offer::begin(std::string label, Blob value, Time now) {
  const bool is_taken_back = label == kWithdrawn;
  if (is_taken_back && !message_) return serial_;
  serial_ += is_taken_back ? 0 : 1;
  message_ = Gather{serial_, std::move(label), std::move(value)};
  wait_s_ = resend_s_;
  resend_at_ = now + resend_s_;
  known_missing_.clear();
  say_(*message_);
  return serial_;
}

std::optional<std::int64_t> Offer::serial() const {
  return message_ ? std::optional(message_->serial) : std::nullopt;
}

void Offer::answered(const Gathered& message) {
  if (!message_ && message.serial == serial_ + 1) {
    // The others have given up an exchange that this rank never joined: it is passed over.
    ++serial_;
    actions_.push_back(Exchanged{serial_, std::nullopt, ""});
  }
  if (message.serial != serial()) return;
  if (!message.missing.empty()) {
    known_missing_ = message.missing;
  } else if (message.why.empty()) {
    end(message.values, message.why);
  } else {
    end(std::nullopt, message.why);
  }
}

void Offer::fail(const std::string& why) {
  if (message_) end(std::nullopt, why);
}

void Offer::tick(Time now) {
  if (!message_ || now < resend_at_) return;
  wait_s_ = std::min(2 * wait_s_, kSlowestResendS);
  resend_at_ = now + wait_s_;
  say_(*message_);
}

OptionalTime Offer::wake() const { return message_ ? OptionalTime(resend_at_) : std::nullopt; }

void Offer::end(std::optional<std::vector<Blob>> values, std::string why) {
  actions_.push_back(Exchanged{message_->serial, std::move(values), std::move(why)});
  message_.reset();
}

void Desk::take(Rank sender, const Gather& message) {
  const std::int64_t serial = message.serial;
  if (const auto known = results_.find(serial); known != results_.end()) {
    return post_(sender, known->second);
  }
  if (serial <= newest_) {
    return post_(sender,
                 Gathered{serial, {}, "the other ranks have ended it without this one", {}});
  }
  Offers& offers = offers_[serial];
  const auto found = find(offers, sender);
  const bool is_repeated = found != offers.end();
  if (is_repeated) {
    found->second = message;
  } else {
    offers.emplace_back(sender, message);
  }
  const std::string& label = offers.front().second.label;
  if (message.label == kWithdrawn) {
    finish({serial, {}, message.value.bytes, {}}, true);
  } else if (std::any_of(offers.begin(), offers.end(),
                  [&label](const auto& offer) { return offer.second.label != label; })) {
    finish({serial, {}, mismatch(offers), {}});
  } else if (offers.size() == members_.size()) {
    Gathered result{serial, {}, "", {}};
    for (const Rank rank : members_) {
      const auto offer = find(offers, rank);
      if (offer == offers.end()) throw std::logic_error("an offer of a rank that is no member");
      result.values.push_back(offer->second.value);
    }
    finish(std::move(result));
  } else if (is_repeated) {
    post_(sender, Gathered{serial, {}, "", missing(serial)});
  }
}

Ranks Desk::missing(std::int64_t serial) const {
  Ranks found;
  const auto at = offers_.find(serial);
  for (const Rank rank : members_) {
    if (at == offers_.end() || find(at->second, rank) == at->second.end()) found.push_back(rank);
  }
  return found;
}

void Desk::finish(Gathered result, bool is_for_all) {
  const std::int64_t serial = result.serial;
  const Offers offers = std::move(offers_[serial]);
  offers_.erase(serial);
  newest_ = std::max(newest_, serial);
  const Gathered& kept = results_[serial] = std::move(result);
  if (is_for_all) {
    for (const Rank rank : members_) post_(rank, kept);
  } else {
    for (const auto& [rank, offer] : offers) post_(rank, kept);
  }
  while (results_.size() > kRememberedResults) results_.erase(results_.begin());
}

}  // namespace spotspeed::cut
