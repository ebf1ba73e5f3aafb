#include "control.h"

#include <cerrno>
#include <cmath>
#include <csignal>
#include <system_error>

#include <poll.h>
#include <sys/eventfd.h>
#include <sys/resource.h>
#include <sys/syscall.h>

namespace spotspeed::control {
namespace {

constexpr double kIdleS = 60;
constexpr double kShortestGraceS = 0.2;
// With a lost rank the main thread is in a dead collective, or will be.
constexpr double kLossGraceS = 0.5;
// A goodbye that Python has begun may ask a store what is there.
constexpr double kGoodbyeS = 60;
// What Python has not heard so long after the deadline of a stop it will not hear in time.
constexpr double kOverdueS = 10;
constexpr int kNotDurable = 76;
constexpr int kNiceness = -10;
constexpr std::size_t kSignalBytes = 4096;

// All signals are for other threads: a handler here would not interrupt the main thread.
class SignalsBlocked {
 public:
  SignalsBlocked() {
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &found_);
  }
  ~SignalsBlocked() { pthread_sigmask(SIG_SETMASK, &found_, nullptr); }

 private:
  sigset_t found_{};
};

void append(cut::Actions& to, cut::Actions actions) {
  for (cut::Action& action : actions) to.push_back(std::move(action));
}

}  // namespace

Control::Control(std::unique_ptr<SocketTransport> transport, Setup setup)
    : setup_(std::move(setup)),
      transport_(std::move(transport)),
      post_(*transport_),
      wakeup_(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)),
      event_(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)),
      machine_(setup_.machine) {
  if (wakeup_.get() < 0 || event_.get() < 0) {
    throw std::system_error(errno, std::generic_category(), "eventfd");
  }
  const SignalsBlocked blocked;
  thread_ = std::thread([this] { run(); });
}

Control::~Control() { stop(0); }

// From any thread.

template <typename Call>
void Control::command(Call call) {
  {
    const std::lock_guard<std::mutex> guard(mutex_);
    append(outbox_, call(monotonic_s()));
  }
  wake();
}

bool Control::enter(std::int64_t position) {
  const std::lock_guard<std::mutex> guard(mutex_);
  const bool has_entered = machine_.enter(position, monotonic_s());
  ceiling_told_ = machine_.gate().ceiling();
  return has_entered;
}

void Control::completed(std::int64_t position) {
  {
    const std::lock_guard<std::mutex> guard(mutex_);
    machine_.gate().complete(position);
    if (machine_.gate().ceiling() == cut::kOpen) return;
    append(outbox_, machine_.completed(position, monotonic_s()));
    if (outbox_.empty()) return;
  }
  wake();
}

void Control::notice(cut::Wish wish, cut::OptionalTime seconds_left, const std::string& source) {
  command([&](double now) {
    if (wish == cut::Wish::kStop) tell(Noticed{source, seconds_left.value_or(0)});
    return machine_.notice(wish, seconds_left, source, now);
  });
}

void Control::staged(std::int64_t round) {
  command([&](double now) { return machine_.staged(round, now); });
}

void Control::durable(std::int64_t round, cut::OptionalText digest) {
  command([&](double now) { return machine_.durable(round, std::move(digest), now); });
}

void Control::failed(std::int64_t round, const std::string& why) {
  command([&](double now) { return machine_.failed(round, why, now); });
}

void Control::delivered(std::int64_t round) {
  command([&](double now) { return machine_.delivered(round, now); });
}

void Control::gather(std::string label, cut::Blob value) {
  command([&](double now) {
    return machine_.gather(std::move(label), std::move(value), now).second;
  });
}

cut::Ranks Control::missing() const {
  const std::lock_guard<std::mutex> guard(mutex_);
  return machine_.missing();
}

bool Control::has_lost() const {
  const std::lock_guard<std::mutex> guard(mutex_);
  return !machine_.lost().empty();
}

bool Control::is_ending() const {
  const std::lock_guard<std::mutex> guard(mutex_);
  if (!machine_.lost().empty()) return true;
  for (const auto& [round, held] : machine_.member().rounds()) {
    if (held.cut.stop) return true;
  }
  return false;
}

std::vector<Told> Control::take() {
  eventfd_t ignored = 0;
  eventfd_read(event_.get(), &ignored);
  const std::lock_guard<std::mutex> guard(mutex_);
  return std::exchange(told_, {});
}

void Control::remember_newest(std::string words) {
  const std::lock_guard<std::mutex> guard(mutex_);
  newest_ = std::move(words);
}

void Control::wake() {
  if (wakeup_.get() >= 0) eventfd_write(wakeup_.get(), 1);
}

void Control::stop(double drain_s) {
  const std::lock_guard<std::mutex> guard(stop_mutex_);
  if (!thread_.joinable()) return;
  drain_s_ = drain_s;
  is_running_ = false;
  wake();
  thread_.join();
}

void Control::abandon() {
  transport_->abandon();
  wakeup_.reset();
  event_.reset();
}

// The thread.

void Control::run() {
  // A few microseconds now and then, which must not wait for threads that compute: where this
  // process may, before them. Where it may not, as everybody.
  setpriority(PRIO_PROCESS, static_cast<id_t>(syscall(SYS_gettid)), kNiceness);
  std::string why;
  try {
    while (is_running_) {
      pollfd waiting[3] = {{wakeup_.get(), POLLIN, 0},
                           {transport_->fileno(), POLLIN, 0},
                           {setup_.signals.read_fd, POLLIN, 0}};
      poll(waiting, 3, wait_ms());
      eventfd_t ignored = 0;
      eventfd_read(wakeup_.get(), &ignored);
      turn();
    }
    transport_->close(drain_s_);
  } catch (const std::exception& error) {
    why = error.what();
    transport_->close(0);
  }
  {
    const std::lock_guard<std::mutex> guard(mutex_);
    tell(Ended{why});
  }
  eventfd_write(event_.get(), 1);
}

void Control::turn() {
  hear_signals();
  for (const TransportEvent& event : transport_->handle()) receive(event);
  {
    const std::lock_guard<std::mutex> guard(mutex_);
    append(outbox_, machine_.tick(monotonic_s()));
  }
  perform_all();
  watch_leaving(monotonic_s());
  bool is_news = false;
  {
    const std::lock_guard<std::mutex> guard(mutex_);
    const bool is_waiting = machine_.member().waiting_since.has_value();
    is_news = !told_.empty() || (is_waiting && ceiling_told_ != machine_.gate().ceiling());
    ceiling_told_ = machine_.gate().ceiling();
  }
  if (is_news) eventfd_write(event_.get(), 1);
}

int Control::wait_ms() {
  const double now_s = monotonic_s();
  double wait_s = std::min(kIdleS, transport_->wait_s());
  const auto until = [&](std::optional<double> end) {
    if (end) wait_s = std::min(wait_s, *end - now_s);
  };
  until(leave_at_);
  until(look_at_);
  const std::lock_guard<std::mutex> guard(mutex_);
  until(machine_.wake());
  if (!outbox_.empty()) return 0;
  return static_cast<int>(std::ceil(1000 * std::max(0.0, wait_s)));
}

void Control::hear_signals() {
  const Signals& signals = setup_.signals;
  if (signals.read_fd < 0) return;
  char numbers[kSignalBytes];
  const ssize_t count = read(signals.read_fd, numbers, sizeof numbers);
  if (count <= 0) return;
  if (signals.forward_fd >= 0) {
    // Full or gone: Python then already knows, or no longer wants to.
    const ssize_t ignored = write(signals.forward_fd, numbers, static_cast<std::size_t>(count));
    static_cast<void>(ignored);
  }
  std::set<int> heard;
  for (ssize_t i = 0; i < count; ++i) {
    const int number = static_cast<unsigned char>(numbers[i]);
    const auto name = signals.names.find(number);
    if (name == signals.names.end() || !heard.insert(number).second) continue;
    const std::lock_guard<std::mutex> guard(mutex_);
    tell(Noticed{name->second, signals.seconds_left});
    append(outbox_, machine_.notice(cut::Wish::kStop, signals.seconds_left, name->second,
                                    monotonic_s()));
  }
}

void Control::receive(const TransportEvent& event) {
  std::string why;
  Rank sender = 0;
  if (const auto* received = std::get_if<Received>(&event)) {
    sender = received->sender;
    try {
      const auto found = post_.receive(sender, received->payload);
      if (!found) return;
      const std::lock_guard<std::mutex> guard(mutex_);
      append(outbox_, machine_.receive(sender, found->first, found->second, monotonic_s()));
      return;
    } catch (const cut::FormatError& error) {
      why = "rank " + std::to_string(sender) + ": " + error.what();
    }
  } else {
    sender = std::get<PeerDown>(event).rank;
    why = std::get<PeerDown>(event).why;
  }
  const std::lock_guard<std::mutex> guard(mutex_);
  append(outbox_, machine_.peer_down(sender, why, monotonic_s()));
}

void Control::perform_all() {
  while (true) {
    cut::Actions actions;
    {
      const std::lock_guard<std::mutex> guard(mutex_);
      actions.swap(outbox_);
    }
    if (actions.empty()) return;
    for (cut::Action& action : actions) perform(std::move(action));
  }
}

void Control::perform(cut::Action action) {
  if (const auto* send = std::get_if<cut::Send>(&action)) {
    return post_.send(send->to, send->term, send->message);
  }
  const std::lock_guard<std::mutex> guard(mutex_);
  if (const auto* departed = std::get_if<cut::Departed>(&action)) {
    const double now_s = monotonic_s();
    departed_ = *departed;
    leave_at_ = now_s + (machine_.lost().empty() ? setup_.grace_s : kLossGraceS);
    if (const auto deadline = machine_.member().deadline()) {
      leave_at_ = std::min(*leave_at_, std::max(now_s + kShortestGraceS, *deadline));
    }
  }
  std::visit(
      [this](auto& body) {
        if constexpr (!std::is_same_v<std::decay_t<decltype(body)>, cut::Send>) {
          tell(std::move(body));
        }
      },
      action);
}

void Control::tell(News news) { told_.push_back({monotonic_s(), std::move(news)}); }

void Control::watch_leaving(double now_s) {
  if (has_reached_) {
    leave_at_.reset();
    look_at_.reset();
  } else if (leave_at_ && now_s >= *leave_at_) {
    leave_at_.reset();
    leave_told_at_ = now_s;
    look_at_ = now_s + setup_.stuck_s;
    const std::lock_guard<std::mutex> guard(mutex_);
    tell(MustLeave{departed_->why.empty() ? "all ranks leave" : departed_->why});
  } else if (look_at_ && now_s >= *look_at_) {
    look_at_ = now_s + 1;
    if (unheard_for_s(now_s) >= setup_.stuck_s) end_process("the main thread holds Python");
    if (now_s >= *leave_told_at_ + kGoodbyeS) end_process("Python does not end");
  } else if (!departed_ && unheard_for_s(now_s) >= kOverdueS) {
    std::optional<double> deadline;
    {
      const std::lock_guard<std::mutex> guard(mutex_);
      deadline = machine_.member().deadline();
    }
    if (deadline && now_s >= *deadline + kOverdueS) end_process("the main thread holds Python");
  }
}

double Control::unheard_for_s(double now_s) const {
  const std::lock_guard<std::mutex> guard(mutex_);
  return told_.empty() ? 0 : now_s - told_.front().at_s;
}

void Control::end_process(const char* why) {
  const bool is_durable = departed_ && departed_->digest.has_value();
  std::string words = "spotspeed: rank " + std::to_string(setup_.machine.rank) +
                      (is_durable ? ": interrupted, durable; newest good checkpoint: "
                                  : ": interrupted, not known durable; newest good checkpoint: ");
  {
    const std::lock_guard<std::mutex> guard(mutex_);
    words += newest_;
  }
  words += std::string(" (left without Python: ") + why + ")\n";
  const ssize_t ignored = write(STDERR_FILENO, words.data(), words.size());
  static_cast<void>(ignored);
  _exit(is_durable ? setup_.durable_code : kNotDurable);
}

}  // namespace spotspeed::control
