// Messages between the ranks of a job over TCP: a star around rank 0 that any other pair joins on
// demand; the twin of coordinator/sockets.py, whose contract is coordinator/transport.py.
//
// Lifetime: owns its listener and its connections. A forked child calls abandon() and forgets it.
// Threads: one thread an object. A fork() waits until no transport of the process is at work.
// Alignment: none required.
#pragma once

#include <deque>
#include <map>
#include <memory>
#include <variant>

#include "dial.h"
#include "link.h"

namespace spotspeed::control {

constexpr std::size_t kQueueBytesMax = std::size_t{16} << 20;

// The clock of all that is said here, in seconds; Python's time.monotonic().
double monotonic_s();

struct Received {
  Rank sender = 0;
  std::string payload;
};

struct PeerDown {
  Rank rank = 0;
  std::string why;
  bool is_orderly = false;
};

using TransportEvent = std::variant<Received, PeerDown>;

class SocketTransport {
 public:
  // How one rank is reached from here: numeric addresses, tried in order.
  struct Route {
    std::vector<std::string> hosts;
    int port = 0;
  };
  struct Setup {
    Rank rank = 0;
    std::string secret;
    std::vector<Route> routes;
    double peer_timeout_s = 15;
  };

  // `listener` is a non-blocking listening socket, or nothing where no other rank exists.
  SocketTransport(Setup setup, Descriptor listener);
  ~SocketTransport();
  SocketTransport(const SocketTransport&) = delete;
  SocketTransport& operator=(const SocketTransport&) = delete;

  Rank rank() const { return setup_.rank; }
  Rank world_size() const { return static_cast<Rank>(setup_.routes.size()); }
  int fileno() const { return epoll_.get(); }
  double wait_s() const;
  void connect(Rank to);
  void send(Rank to, std::string_view payload);
  std::vector<TransportEvent> handle();
  void close(double drain_s);
  void abandon();

  // One bounded wait and turn on the way to a complete star: the ranks that are still missing.
  // Throws std::runtime_error when one of them is gone.
  std::vector<Rank> establish_some(double wait_s);
  // Makes fileno() readable when there is something for handle(), at the end of establishing.
  void wake_if_heard();

 private:
  using LinkPtr = std::shared_ptr<Link>;
  struct Peer {
    std::vector<LinkPtr> links;
    LinkPtr sending;
    std::deque<std::string> waiting;
    std::size_t waiting_bytes = 0;
    std::optional<Dial> dial;
    LinkPtr attempt;
    bool is_down = false;
  };

  void check(Rank to, std::size_t size) const;
  void connect_to(Rank to);
  void report(TransportEvent event);
  double due_s() const;
  void wait(double left_s) const;
  void work(double now_s);
  void forgive_own_pause(double now_s);
  void tick(double now_s);
  void beat(Link& link, double now_s);
  void check_attempt(Rank rank, Peer& peer, double now_s);
  void attempt(Rank rank, Peer& peer, double now_s);
  void attempt_failed(Rank rank, Peer& peer, const LinkBroken& broken, double now_s);
  void accept_some(double now_s);
  void on_ready(const LinkPtr& link, unsigned mask, double now_s);
  void on_authenticated(const LinkPtr& link, double now_s);
  void on_broken(const LinkPtr& link, const LinkBroken& broken, double now_s);
  void down(Rank rank, std::string why, bool is_orderly);
  void disconnect(Peer& peer);
  void close_link(const LinkPtr& link);
  Session session(std::optional<Rank> target) const;
  void wake();

  const Setup setup_;
  const double heartbeat_s_, tick_s_;
  Descriptor epoll_, wakeup_, listener_;
  std::map<Rank, Peer> peers_;
  std::map<int, LinkPtr> links_;
  // Connections whose handshake is not finished, the oldest first.
  std::vector<LinkPtr> strangers_;
  std::vector<TransportEvent> events_;
  double worked_s_, next_tick_s_, listen_again_s_;
  bool is_working_ = false, is_closing_ = false, is_closed_ = false;
};

}  // namespace spotspeed::control
