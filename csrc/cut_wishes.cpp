#include "cut_wishes.h"

namespace spotspeed::cut {

void Wishes::add(Wish wish, OptionalTime seconds_left, std::string source, Time now) {
  ++serial_;
  OptionalTime deadline;
  if (seconds_left) deadline = now + *seconds_left;
  Notice notice{serial_, wish, seconds_left, std::move(source)};
  say_if_due(open_[serial_] = Entry{std::move(notice), deadline, now}, now);
}

void Wishes::heard(std::int64_t serial, Time now) {
  if (open_.erase(serial) == 0 || open_.size() != 1) return;
  // A wish to close is said only when all others were heard: it would silence them.
  Entry& last = open_.begin()->second;
  if (last.notice.wish == Wish::kClose) {
    last.resend_at = now;
    say_if_due(last, now);
  }
}

void Wishes::tick(Time now) {
  for (auto& [serial, entry] : open_) say_if_due(entry, now);
}

OptionalTime Wishes::wake() const {
  OptionalTime first;
  for (const auto& [serial, entry] : open_) first = sooner(first, entry.resend_at);
  return first;
}

OptionalTime Wishes::deadline() const {
  OptionalTime first;
  for (const auto& [serial, entry] : open_) first = sooner(first, entry.deadline);
  return first;
}

void Wishes::say_if_due(Entry& entry, Time now) {
  if (now < entry.resend_at) return;
  entry.resend_at = now + resend_s_;
  if (entry.notice.wish == Wish::kClose && open_.size() > 1) return;
  Notice notice = entry.notice;
  notice.seconds_left.reset();
  if (entry.deadline) notice.seconds_left = *entry.deadline - now;
  say_(std::move(notice));
}

}  // namespace spotspeed::cut
