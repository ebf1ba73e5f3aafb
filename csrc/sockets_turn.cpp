// What a transport does in one turn: accept, read, write, dial, beat.
#include <cerrno>
#include <cstdio>
#include <limits>
#include <system_error>

#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>

#include "at_work.h"
#include "sockets.h"

namespace spotspeed::control {
namespace {

constexpr std::size_t kStrangersMax = 128;
constexpr int kAcceptsPerTurn = 16;
constexpr double kRestS = 0.2;
constexpr double kNever = std::numeric_limits<double>::infinity();

template <typename T>
bool contains(const std::vector<T>& values, const T& value) {
  return std::find(values.begin(), values.end(), value) != values.end();
}

template <typename T>
void remove(std::vector<T>& values, const T& value) {
  values.erase(std::remove(values.begin(), values.end(), value), values.end());
}

void watch(int epoll, int fd, unsigned mask) {
  epoll_event event{};
  event.events = mask;
  event.data.fd = fd;
  if (epoll_ctl(epoll, EPOLL_CTL_MOD, fd, &event) != 0) {
    throw std::system_error(errno, std::generic_category(), "epoll_ctl");
  }
}

}  // namespace

void SocketTransport::work(double now_s) {
  const AtWork guard;
  is_working_ = true;
  forgive_own_pause(now_s);
  std::vector<epoll_event> ready(links_.size() + 2);
  const int count = epoll_wait(epoll_.get(), ready.data(), static_cast<int>(ready.size()), 0);
  for (int i = 0; i < count; ++i) {
    const int fd = ready[static_cast<std::size_t>(i)].data.fd;
    if (fd == wakeup_.get()) {
      eventfd_t ignored = 0;
      eventfd_read(fd, &ignored);
    } else if (fd == listener_.get()) {
      accept_some(now_s);
    } else if (const auto found = links_.find(fd); found != links_.end()) {
      on_ready(LinkPtr(found->second), ready[static_cast<std::size_t>(i)].events, now_s);
    }
  }
  for (auto& [rank, peer] : peers_) {
    if (peer.dial && peer.attempt == nullptr && now_s >= peer.dial->due_s) {
      attempt(rank, peer, now_s);
    }
  }
  if (now_s >= std::min(next_tick_s_, listen_again_s_)) tick(now_s);
  is_working_ = false;
}

void SocketTransport::forgive_own_pause(double now_s) {
  const double pause_s = now_s - worked_s_ - tick_s_;
  worked_s_ = now_s;
  if (pause_s <= tick_s_) return;
  for (auto& [fd, link] : links_) {
    link->heard_s += pause_s;
    link->opened_s += pause_s;
  }
  for (auto& [rank, peer] : peers_) {
    if (peer.dial) peer.dial->shift(pause_s);
  }
}

void SocketTransport::tick(double now_s) {
  next_tick_s_ = now_s + tick_s_;
  if (now_s >= listen_again_s_) {
    watch(epoll_.get(), listener_.get(), EPOLLIN);
    listen_again_s_ = kNever;
  }
  for (const LinkPtr& link : std::vector<LinkPtr>(strangers_)) {
    if (link->opened_s < now_s - setup_.peer_timeout_s) close_link(link);
  }
  for (auto& [rank, peer] : peers_) {
    for (const LinkPtr& link : std::vector<LinkPtr>(peer.links)) {
      const double silence_s = now_s - link->heard_s;
      if (silence_s > setup_.peer_timeout_s) {
        char text[48];
        std::snprintf(text, sizeof text, "silent for %.1f s", silence_s);
        down(rank, text, false);
        break;
      }
      if (now_s - link->sent_s >= heartbeat_s_ - tick_s_ / 2) beat(*link, now_s);
    }
    if (peer.attempt != nullptr) check_attempt(rank, peer, now_s);
  }
}

void SocketTransport::beat(Link& link, double now_s) {
  if (link.session.outgoing.empty() && !link.is_leaving()) {
    link.session.queue(FrameKind::kHeartbeat);
  }
  link.flush(now_s);
}

void SocketTransport::check_attempt(Rank rank, Peer& peer, double now_s) {
  // Once we have proved ourselves the other side may count on this connection: only the dial's
  // own deadline may end it.
  const double share = peer.attempt->session.has_answered() ? 1.0 : 1.0 / 3;
  if (now_s - peer.attempt->opened_s > setup_.peer_timeout_s * share) {
    attempt_failed(rank, peer, LinkBroken("no answer"), now_s);
  }
}

void SocketTransport::attempt(Rank rank, Peer& peer, double now_s) {
  try {
    Descriptor socket = Link::dial(peer.dial->next_host(),
                                   setup_.routes[static_cast<std::size_t>(rank)].port);
    peer.attempt = std::make_shared<Link>(epoll_.get(), std::move(socket), session(rank), now_s);
    links_[peer.attempt->fd()] = peer.attempt;
  } catch (const LinkBroken& broken) {
    attempt_failed(rank, peer, broken, now_s);
  }
}

void SocketTransport::attempt_failed(Rank rank, Peer& peer, const LinkBroken& broken,
                                     double now_s) {
  if (peer.attempt != nullptr) {
    close_link(peer.attempt);
    peer.attempt.reset();
  }
  if (!peer.dial) return;
  peer.dial->failed(broken.what(), broken.is_refused, now_s);
  if (!peer.dial->is_given_up) return;
  const std::string why = "cannot be reached at " + peer.dial->why;
  peer.dial.reset();
  if (peer.links.empty()) down(rank, why, false);
}

void SocketTransport::accept_some(double now_s) {
  for (int i = 0; i < kAcceptsPerTurn; ++i) {
    Descriptor made(accept4(listener_.get(), nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC));
    if (made.get() < 0) {
      if (errno == EAGAIN || errno == EWOULDBLOCK || errno == ECONNABORTED || errno == EINTR) break;
      // Out of descriptors: polling the listener again at once would spin.
      watch(epoll_.get(), listener_.get(), 0);
      listen_again_s_ = now_s + kRestS;
      break;
    }
    auto link =
        std::make_shared<Link>(epoll_.get(), std::move(made), session(std::nullopt), now_s);
    links_[link->fd()] = link;
    strangers_.push_back(std::move(link));
  }
  // A rank answers in one round trip and so passes a flood of strangers: the oldest are closed.
  const std::size_t limit = kStrangersMax + static_cast<std::size_t>(world_size());
  std::size_t excess = strangers_.size() > limit ? strangers_.size() - limit : 0;
  if (listen_again_s_ != kNever) excess = std::max<std::size_t>(excess, 1);
  while (excess-- > 0 && !strangers_.empty()) close_link(LinkPtr(strangers_.front()));
}

void SocketTransport::on_ready(const LinkPtr& link, unsigned mask, double now_s) {
  const bool was_authenticated = link->session.is_authenticated();
  std::vector<Frame> frames;
  try {
    if (link->is_connecting()) link->finish_connecting();
    if ((mask & ~static_cast<unsigned>(EPOLLOUT)) != 0) frames = link->read(now_s);
  } catch (const LinkBroken& broken) {
    return on_broken(link, broken, now_s);
  }
  if (link->session.is_authenticated() && !was_authenticated) on_authenticated(link, now_s);
  const auto is_open = [&] {
    const auto found = links_.find(link->fd());
    return found != links_.end() && found->second == link;
  };
  for (Frame& frame : frames) {
    if (!is_open()) return;
    const Rank peer = *link->session.peer();
    if (frame.kind == FrameKind::kMessage) {
      report(Received{peer, std::move(frame.payload)});
    } else if (frame.kind == FrameKind::kGoodbye) {
      down(peer, "closed its transport", true);
    }
  }
  if (is_open()) link->flush(now_s);
}

void SocketTransport::on_authenticated(const LinkPtr& link, double now_s) {
  Peer& peer = peers_[*link->session.peer()];
  remove(strangers_, link);
  if (peer.attempt == link) {
    peer.attempt.reset();
    peer.dial.reset();
  } else if (peer.is_down || std::any_of(peer.links.begin(), peer.links.end(),
                                         [](const LinkPtr& each) { return each->is_inbound(); })) {
    return close_link(link);
  }
  peer.links.push_back(link);
  if (peer.sending != nullptr) return;
  peer.sending = link;
  for (const std::string& payload : peer.waiting) {
    link->session.queue(FrameKind::kMessage, payload);
  }
  peer.waiting.clear();
  peer.waiting_bytes = 0;
  if (is_closing_) link->leave(now_s);
}

void SocketTransport::on_broken(const LinkPtr& link, const LinkBroken& broken, double now_s) {
  const std::optional<Rank> rank = link->session.peer();
  const auto found = rank ? peers_.find(*rank) : peers_.end();
  if (found != peers_.end() && found->second.attempt == link) {
    attempt_failed(*rank, found->second, broken, now_s);
  } else if (found != peers_.end() && contains(found->second.links, link)) {
    down(*rank, broken.what(), false);
  } else {
    close_link(link);
  }
}

void SocketTransport::down(Rank rank, std::string why, bool is_orderly) {
  Peer& peer = peers_[rank];
  if (peer.is_down) return;
  disconnect(peer);
  report(PeerDown{rank, std::move(why), is_orderly});
}

void SocketTransport::disconnect(Peer& peer) {
  peer.is_down = true;
  for (const LinkPtr& link : std::exchange(peer.links, {})) close_link(link);
  if (const LinkPtr attempt = std::exchange(peer.attempt, nullptr)) close_link(attempt);
  peer.waiting.clear();
  peer.sending.reset();
  peer.dial.reset();
}

void SocketTransport::close_link(const LinkPtr& link) {
  const LinkPtr kept = link;
  remove(strangers_, kept);
  const auto found = links_.find(kept->fd());
  if (found != links_.end() && found->second == kept) links_.erase(found);
  // Whoever still holds the link finds it closed.
  kept->close();
}

}  // namespace spotspeed::control
