// The control thread of a rank, without Python: it owns transport and cut machine, sleeps in
// poll() on sockets, signals and commands, and tells Python only what Python has to do.
//
// The readable reference is coordinator/control.py. What it does here without waiting for Python:
// hear signals, lock the gate, answer, agree, beat, lose peers, and, where the main thread holds
// Python for too long after all ranks may leave, end the process.
//
// Lifetime: the thread runs from construction to stop() or destruction. A forked child, in which
//   it does not run, calls abandon() and must then leak the object.
// Threads: all public methods may be called from any thread but for take(), which belongs to one.
// Alignment: none required.
#pragma once

#include <atomic>
#include <mutex>
#include <thread>

#include "cut.h"
#include "post.h"

namespace spotspeed::control {

// What Python is told, in order; `at_s` is when it happened, on the monotonic clock.
struct Noticed {
  std::string source;
  double seconds_left = 0;
  SPOTSPEED_FIELDS(source, seconds_left)
};
// The main thread has not come to the gate in time: end the process.
struct MustLeave {
  std::string why;
  SPOTSPEED_FIELDS(why)
};
// The thread has ended; by an error where `why` is not empty.
struct Ended {
  std::string why;
  SPOTSPEED_FIELDS(why)
};
using News = std::variant<cut::Decided, cut::Capture, cut::Settled, cut::Departed, cut::PeerLost,
                          cut::AllClosed, cut::Exchanged, Noticed, MustLeave, Ended>;
struct Told {
  double at_s = 0;
  News news;
};

class Control {
 public:
  struct Signals {
    // Read end of the process's wakeup pipe, and where its bytes go on to; -1: no signals.
    int read_fd = -1, forward_fd = -1;
    std::map<int, std::string> names;
    double seconds_left = 0;
  };
  struct Setup {
    cut::Machine::Setup machine;
    Signals signals;
    // How long the main thread may take to the gate once all ranks may leave.
    double grace_s = 1.5;
    // How long Python may take to hear of it before the process ends without Python.
    double stuck_s = 5;
    // Exit code when the last save is known durable; 76 otherwise.
    int durable_code = 75;
  };

  Control(std::unique_ptr<SocketTransport> transport, Setup setup);
  ~Control();
  Control(const Control&) = delete;
  Control& operator=(const Control&) = delete;

  // The fast way through the gate: true when update `position` may begin; it has then begun.
  bool pass(std::int64_t position) {
    const std::lock_guard<std::mutex> guard(mutex_);
    cut::Gate& gate = machine_.gate();
    return position <= gate.ceiling() && gate.enter(position);
  }
  // The same for one who waits; look again whenever event_fd() was readable.
  bool enter(std::int64_t position);
  void completed(std::int64_t position);
  void notice(cut::Wish wish, cut::OptionalTime seconds_left, const std::string& source);
  void staged(std::int64_t round);
  void durable(std::int64_t round, cut::OptionalText digest);
  void failed(std::int64_t round, const std::string& why);
  void delivered(std::int64_t round);
  void gather(std::string label, cut::Blob value);
  cut::Ranks missing() const;
  bool has_lost() const;
  // Whether a rank is lost or a stop is decided.
  bool is_ending() const;

  // Polls readable while take() has something, or whoever waits at the gate is to look again.
  int event_fd() const { return event_.get(); }
  std::vector<Told> take();
  // The main thread knows that it is to leave.
  void reached() { has_reached_ = true; }
  // The newest good checkpoint in words, for when the process ends without Python.
  void remember_newest(std::string words);
  void wake();
  // Ends the thread and closes the transport; idempotent.
  void stop(double drain_s);
  void abandon();

 private:
  template <typename Call>
  void command(Call call);
  void run();
  void turn();
  int wait_ms();
  void hear_signals();
  void receive(const TransportEvent& event);
  void perform_all();
  void perform(cut::Action action);
  void tell(News news);
  void watch_leaving(double now_s);
  // How long the oldest news waits for Python.
  double unheard_for_s(double now_s) const;
  void end_process(const char* why);

  const Setup setup_;
  std::unique_ptr<SocketTransport> transport_;
  Post post_;
  Descriptor wakeup_, event_;
  mutable std::mutex mutex_;
  // Guarded by mutex_.
  cut::Machine machine_;
  cut::Actions outbox_;
  std::vector<Told> told_;
  std::string newest_ = "unknown";
  std::int64_t ceiling_told_ = cut::kOpen;
  // Of the thread.
  std::optional<cut::Departed> departed_;
  std::optional<double> leave_at_, leave_told_at_, look_at_;
  std::atomic<bool> is_running_{true}, has_reached_{false};
  std::atomic<double> drain_s_{0};
  std::mutex stop_mutex_;
  std::thread thread_;
};

}  // namespace spotspeed::control
