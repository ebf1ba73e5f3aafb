#include "sockets.h"

#include <cerrno>
#include <cmath>
#include <ctime>
#include <limits>
#include <system_error>

#include <poll.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>

#include "at_work.h"

namespace spotspeed::control {
namespace {

constexpr double kNever = std::numeric_limits<double>::infinity();

void check_system(bool is_good, const char* what) {
  if (!is_good) throw std::system_error(errno, std::generic_category(), what);
}

void watch(int epoll, int fd, unsigned mask) {
  epoll_event event{};
  event.events = mask;
  event.data.fd = fd;
  check_system(epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event) == 0, "epoll_ctl");
}

template <typename T>
bool contains(const std::vector<T>& values, const T& value) {
  return std::find(values.begin(), values.end(), value) != values.end();
}

}  // namespace

double monotonic_s() {
  timespec now{};
  clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

SocketTransport::SocketTransport(Setup setup, Descriptor listener)
    : setup_(std::move(setup)),
      heartbeat_s_(std::min(setup_.peer_timeout_s / 5, 1.0)),
      tick_s_(heartbeat_s_ / 2),
      epoll_(epoll_create1(EPOLL_CLOEXEC)),
      wakeup_(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)),
      listener_(std::move(listener)),
      worked_s_(monotonic_s()),
      next_tick_s_(worked_s_),
      listen_again_s_(kNever) {
  check_system(epoll_.get() >= 0 && wakeup_.get() >= 0, "epoll or eventfd");
  if (setup_.rank < 0 || setup_.rank >= world_size()) {
    throw std::invalid_argument("a rank outside of the job");
  }
  watch(epoll_.get(), wakeup_.get(), EPOLLIN);
  if (listener_.get() >= 0) watch(epoll_.get(), listener_.get(), EPOLLIN);
}

SocketTransport::~SocketTransport() { close(0); }

double SocketTransport::wait_s() const {
  return events_.empty() ? std::max(0.0, due_s() - monotonic_s()) : 0.0;
}

void SocketTransport::check(Rank to, std::size_t size) const {
  if (to < 0 || to >= world_size()) {
    throw std::invalid_argument("rank " + std::to_string(to) +
                                " does not exist: the job has ranks 0 to " +
                                std::to_string(world_size() - 1));
  }
  if (size > kMaxMessageBytes) {
    throw std::invalid_argument("a message of " + std::to_string(size) + " bytes for rank " +
                                std::to_string(to) + ": the limit is " +
                                std::to_string(kMaxMessageBytes));
  }
}

void SocketTransport::connect(Rank to) {
  check(to, 0);
  const AtWork guard;
  connect_to(to);
}

void SocketTransport::connect_to(Rank to) {
  Peer& peer = peers_[to];
  if (setup_.routes[static_cast<std::size_t>(to)].hosts.empty() && to != setup_.rank) {
    return down(to, "has no address", false);
  }
  const bool is_busy = peer.is_down || !peer.links.empty() || peer.dial;
  if (to == setup_.rank || is_busy || is_closed_) return;
  const double now_s = monotonic_s();
  peer.dial.emplace(setup_.routes[static_cast<std::size_t>(to)].hosts, now_s,
                    setup_.peer_timeout_s);
  attempt(to, peer, now_s);
}

void SocketTransport::send(Rank to, std::string_view payload) {
  check(to, payload.size());
  if (is_closed_) return;
  const AtWork guard;
  if (to == setup_.rank) return report(Received{to, std::string(payload)});
  connect_to(to);
  Peer& peer = peers_[to];
  if (peer.is_down) return;
  std::size_t queued = 0;
  if (peer.sending == nullptr) {
    peer.waiting.emplace_back(payload);
    queued = peer.waiting_bytes += payload.size();
  } else {
    peer.sending->session.queue(FrameKind::kMessage, payload);
    peer.sending->flush(monotonic_s());
    queued = peer.sending->session.outgoing.size();
  }
  if (queued > kQueueBytesMax) {
    down(to, "does not read: " + std::to_string(queued) + " bytes are queued for it", false);
  }
}

std::vector<TransportEvent> SocketTransport::handle() {
  if (!is_closed_) work(monotonic_s());
  return std::exchange(events_, {});
}

std::vector<Rank> SocketTransport::establish_some(double wait_s) {
  if (setup_.rank != 0) connect(0);
  std::vector<Rank> missing;
  const Rank last = setup_.rank == 0 ? world_size() - 1 : 0;
  for (Rank rank = setup_.rank == 0 ? 1 : 0; rank <= last; ++rank) {
    if (peers_[rank].links.empty()) missing.push_back(rank);
  }
  for (const TransportEvent& event : events_) {
    const auto* gone = std::get_if<PeerDown>(&event);
    if (gone != nullptr && contains(missing, gone->rank)) {
      throw std::runtime_error("rank " + std::to_string(gone->rank) + " is gone: " + gone->why);
    }
  }
  if (!missing.empty() && wait_s > 0) {
    wait(wait_s);
    work(monotonic_s());
  }
  return missing;
}

void SocketTransport::wake_if_heard() {
  if (!events_.empty()) wake();
}

void SocketTransport::close(double drain_s) {
  if (is_closed_) return;
  is_closing_ = true;
  const double now_s = monotonic_s(), deadline_s = now_s + drain_s;
  {
    const AtWork guard;
    for (auto& [rank, peer] : peers_) {
      if (peer.sending != nullptr) {
        peer.sending->leave(now_s);
      } else if (peer.waiting.empty()) {
        disconnect(peer);
      }
    }
  }
  const auto is_draining = [this] {
    return std::any_of(peers_.begin(), peers_.end(),
                       [](const auto& each) { return !each.second.is_down; });
  };
  while (is_draining()) {
    const double left_s = deadline_s - monotonic_s();
    if (left_s <= 0) break;
    wait(left_s);
    work(monotonic_s());
  }
  const AtWork guard;
  is_closed_ = true;
  for (auto& [rank, peer] : peers_) disconnect(peer);
  strangers_.clear();
  links_.clear();
  epoll_.reset();
  listener_.reset();
  wakeup_.reset();
}

void SocketTransport::abandon() {
  if (is_closed_) return;
  is_closed_ = true;
  for (auto& [fd, link] : links_) link->abandon();
  epoll_.reset();
  listener_.reset();
  wakeup_.reset();
}

Session SocketTransport::session(std::optional<Rank> target) const {
  return {setup_.secret, setup_.rank, world_size(), target};
}

void SocketTransport::wake() {
  if (wakeup_.get() >= 0) eventfd_write(wakeup_.get(), 1);
}

void SocketTransport::report(TransportEvent event) {
  events_.push_back(std::move(event));
  if (!is_working_) wake();
}

double SocketTransport::due_s() const {
  double first = std::min(next_tick_s_, listen_again_s_);
  for (const auto& [rank, peer] : peers_) {
    if (peer.dial && peer.attempt == nullptr) first = std::min(first, peer.dial->due_s);
  }
  return first;
}

void SocketTransport::wait(double left_s) const {
  pollfd waiting{epoll_.get(), POLLIN, 0};
  const double wait_s = std::max(0.0, std::min(left_s, due_s() - monotonic_s()));
  poll(&waiting, 1, static_cast<int>(std::ceil(1000 * std::min(wait_s, 60.0))));
}

}  // namespace spotspeed::control
