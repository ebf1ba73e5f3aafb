// One TCP connection to a peer: a socket that never blocks, and its session; coordinator/links.py.
//
// Lifetime: registered in the owner's epoll from construction to destruction.
// Threads: one thread an object.
// Alignment: none required.
#pragma once

#include "descriptor.h"
#include "wire.h"

namespace spotspeed::control {

// The connection is over; what() says how.
class LinkBroken : public std::runtime_error {
 public:
  explicit LinkBroken(const std::string& why, bool is_refused = false)
      : std::runtime_error(why), is_refused(is_refused) {}
  const bool is_refused;
};

class Link {
 public:
  // `socket` is in non-blocking mode. Throws std::system_error.
  Link(int epoll, Descriptor socket, Session session, double now_s);
  ~Link();
  Link(const Link&) = delete;
  Link& operator=(const Link&) = delete;

  // Begins to connect to a numeric address. Throws LinkBroken where that fails at once.
  static Descriptor dial(const std::string& host, int port);

  // Looks at the outcome of the connect. Throws LinkBroken.
  void finish_connecting();
  // Frames that have arrived, of a bounded number of bytes. Throws LinkBroken.
  std::vector<Frame> read(double now_s);
  // Writes what the socket takes now; an error is left to read(), after what arrived before it.
  void flush(double now_s);
  // Says goodbye and ends this direction once all is written; read() then sees the end.
  void leave(double now_s);
  // Closes the socket; idempotent.
  void close();
  // Closes a forked child's copy; the parent's epoll, which is shared, is left alone.
  void abandon();

  int fd() const { return socket_.get(); }
  bool is_inbound() const { return !session.is_connector(); }
  bool is_connecting() const { return is_connecting_; }
  bool is_leaving() const { return is_leaving_; }

  Session session;
  // When bytes last came and went, on the owner's clock, in seconds.
  double opened_s, heard_s, sent_s;

 private:
  void watch(bool wants_write);

  const int epoll_;
  Descriptor socket_;
  bool is_connecting_, is_leaving_ = false, can_write_ = true, is_watching_write_;
};

}  // namespace spotspeed::control
