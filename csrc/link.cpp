#include "link.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <memory>
#include <system_error>

#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/epoll.h>
#include <sys/socket.h>

namespace spotspeed::control {
namespace {

constexpr std::size_t kStrangerReadBytes = 4096;
constexpr std::size_t kPeerReadBytes = std::size_t{1} << 18;
constexpr std::size_t kWriteBytes = std::size_t{1} << 18;

std::string in_words(int error) { return std::generic_category().message(error); }

}  // namespace

Link::Link(int epoll, Descriptor socket, Session with, double now_s)
    : session(std::move(with)),
      opened_s(now_s),
      heard_s(now_s),
      sent_s(now_s),
      epoll_(epoll),
      socket_(std::move(socket)),
      is_connecting_(session.is_connector()),
      is_watching_write_(session.is_connector()) {
  const int one = 1;
  setsockopt(socket_.get(), IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
  epoll_event event{};
  event.events = EPOLLIN | (is_connecting_ ? static_cast<unsigned>(EPOLLOUT) : 0u);
  event.data.fd = socket_.get();
  if (epoll_ctl(epoll_, EPOLL_CTL_ADD, socket_.get(), &event) != 0) {
    throw std::system_error(errno, std::generic_category(), "epoll_ctl");
  }
}

Link::~Link() { close(); }

void Link::close() {
  if (fd() < 0) return;
  // A child may hold a copy of the socket: closing alone would leave it in the epoll.
  epoll_ctl(epoll_, EPOLL_CTL_DEL, fd(), nullptr);
  socket_.reset();
}

Descriptor Link::dial(const std::string& host, int port) {
  addrinfo hints{};
  hints.ai_flags = AI_NUMERICHOST | AI_NUMERICSERV;
  hints.ai_socktype = SOCK_STREAM;
  addrinfo* found = nullptr;
  const int failure = getaddrinfo(host.c_str(), std::to_string(port).c_str(), &hints, &found);
  if (failure != 0) throw LinkBroken(gai_strerror(failure));
  const std::unique_ptr<addrinfo, decltype(&freeaddrinfo)> address(found, &freeaddrinfo);
  Descriptor made(socket(address->ai_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
  if (made.get() < 0) throw LinkBroken("no socket: " + in_words(errno));
  if (connect(made.get(), address->ai_addr, address->ai_addrlen) != 0 && errno != EINPROGRESS) {
    throw LinkBroken(in_words(errno), errno == ECONNREFUSED);
  }
  return made;
}

void Link::finish_connecting() {
  int error = 0;
  socklen_t size = sizeof error;
  getsockopt(fd(), SOL_SOCKET, SO_ERROR, &error, &size);
  if (error != 0) throw LinkBroken(in_words(error), error == ECONNREFUSED);
  is_connecting_ = false;
}

std::vector<Frame> Link::read(double now_s) {
  std::string data(session.is_authenticated() ? kPeerReadBytes : kStrangerReadBytes, '\0');
  const ssize_t count = recv(fd(), data.data(), data.size(), 0);
  if (count < 0) {
    if (errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR) return {};
    throw LinkBroken("connection lost: " + in_words(errno));
  }
  if (count == 0) throw LinkBroken("connection closed by the other side");
  heard_s = now_s;
  try {
    return session.feed(std::string_view(data).substr(0, static_cast<std::size_t>(count)));
  } catch (const WireError& error) {
    throw LinkBroken(std::string("protocol violation: ") + error.what());
  }
}

void Link::flush(double now_s) {
  std::string& outgoing = session.outgoing;
  std::size_t done = 0;
  while (done < outgoing.size() && can_write_ && !is_connecting_) {
    const std::size_t size = std::min(kWriteBytes, outgoing.size() - done);
    const ssize_t count = send(fd(), outgoing.data() + done, size, MSG_NOSIGNAL);
    if (count < 0) {
      if (errno == EINTR) continue;
      can_write_ = errno == EAGAIN || errno == EWOULDBLOCK;
      break;
    }
    done += static_cast<std::size_t>(count);
    sent_s = now_s;
  }
  outgoing.erase(0, done);
  if (!can_write_) outgoing.clear();
  if (is_leaving_ && outgoing.empty()) shutdown(fd(), SHUT_WR);
  watch(!outgoing.empty() || is_connecting_);
}

void Link::leave(double now_s) {
  if (!is_leaving_) {
    session.queue(FrameKind::kGoodbye);
    is_leaving_ = true;
  }
  flush(now_s);
}

void Link::abandon() { socket_.reset(); }

void Link::watch(bool wants_write) {
  if (wants_write == is_watching_write_) return;
  epoll_event event{};
  event.events = EPOLLIN | (wants_write ? static_cast<unsigned>(EPOLLOUT) : 0u);
  event.data.fd = fd();
  epoll_ctl(epoll_, EPOLL_CTL_MOD, fd(), &event);
  is_watching_write_ = wants_write;
}

}  // namespace spotspeed::control
