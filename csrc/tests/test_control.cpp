// Control threads of several ranks in one process, over real sockets, with real signals and forks.
#include <algorithm>
#include <condition_variable>
#include <csignal>

#include <arpa/inet.h>
#include <fcntl.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/wait.h>

#include "../control.h"
#include "check.h"

using namespace spotspeed;
using namespace spotspeed::control;

namespace {

constexpr double kPatienceS = 60;

Descriptor listening(int* port) {
  Descriptor made(socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t size = sizeof address;
  CHECK(bind(made.get(), reinterpret_cast<sockaddr*>(&address), size) == 0);
  CHECK(listen(made.get(), 64) == 0);
  getsockname(made.get(), reinterpret_cast<sockaddr*>(&address), &size);
  *port = ntohs(address.sin_port);
  return made;
}

// The part of Python: saves at once, and keeps what it was told.
struct Rank_ {
  explicit Rank_(std::unique_ptr<Control> made) : control(std::move(made)) {}

  void look() {
    for (Told& told : control->take()) {
      if (auto* capture = std::get_if<cut::Capture>(&told.news)) {
        captured.push_back(capture->cut.step);
        control->staged(capture->cut.round);
        control->durable(capture->cut.round, "seal");
      } else if (auto* settled = std::get_if<cut::Settled>(&told.news)) {
        control->delivered(settled->cut.round);
      } else if (auto* departed = std::get_if<cut::Departed>(&told.news)) {
        left = *departed;
      } else if (auto* exchanged = std::get_if<cut::Exchanged>(&told.news)) {
        values = exchanged->values ? exchanged->values->size() : 0;
      } else if (std::holds_alternative<Noticed>(told.news)) {
        ++notices;
      }
    }
  }

  std::unique_ptr<Control> control;
  std::vector<std::int64_t> captured;
  std::optional<cut::Departed> left;
  std::size_t values = 0;
  int notices = 0;
};

std::vector<Rank_> job_of(std::size_t size, Control::Signals signals = {}) {
  std::vector<Descriptor> listeners;
  SocketTransport::Setup setup;
  setup.secret = "secret";
  setup.routes.resize(size);
  for (auto& route : setup.routes) {
    route.hosts = {"127.0.0.1"};
    listeners.push_back(listening(&route.port));
  }
  std::vector<Rank_> ranks;
  for (std::size_t i = 0; i < size; ++i) {
    setup.rank = static_cast<Rank>(i);
    auto transport = std::make_unique<SocketTransport>(setup, std::move(listeners[i]));
    if (i != 0) transport->connect(0);
    Control::Setup with;
    with.machine.rank = static_cast<Rank>(i);
    with.machine.world_size = static_cast<std::int64_t>(size);
    if (i == 0) with.signals = signals;
    ranks.emplace_back(std::make_unique<Control>(std::move(transport), with));
  }
  return ranks;
}

template <typename Condition>
void run_until(std::vector<Rank_>& ranks, Condition is_so) {
  const double end_s = monotonic_s() + kPatienceS;
  while (true) {
    std::vector<pollfd> waiting;
    for (Rank_& rank : ranks) {
      rank.look();
      waiting.push_back({rank.control->event_fd(), POLLIN, 0});
    }
    if (is_so()) return;
    CHECK(monotonic_s() < end_s);
    poll(waiting.data(), waiting.size(), 1000);
  }
}

bool all_left(const std::vector<Rank_>& ranks) {
  return std::all_of(ranks.begin(), ranks.end(), [](const Rank_& r) { return r.left.has_value(); });
}

}  // namespace

TEST(a_notice_stops_trainings_that_never_wait_for_each_other) {
  auto ranks = job_of(3);
  for (Rank_& rank : ranks) rank.control->gather("ready", {"x"});
  run_until(ranks, [&] {
    return std::all_of(ranks.begin(), ranks.end(), [](const Rank_& r) { return r.values == 3; });
  });
  std::atomic<std::int64_t> fewest{0};
  std::vector<std::thread> trainings;
  std::vector<std::int64_t> last(3, 0);
  std::atomic<bool> is_over{false};
  for (std::size_t i = 0; i < 3; ++i) {
    trainings.emplace_back([&, i] {
      while (!is_over) {
        if (ranks[i].control->enter(last[i] + 1)) ranks[i].control->completed(++last[i]);
        std::this_thread::yield();
      }
    });
  }
  ranks[2].control->notice(cut::Wish::kStop, 30.0, "test");
  run_until(ranks, [&] { return all_left(ranks); });
  is_over = true;
  for (std::thread& training : trainings) training.join();
  for (std::size_t i = 0; i < 3; ++i) {
    CHECK(ranks[i].captured.size() == 1 && ranks[i].captured[0] == last[0] && last[i] == last[0]);
    CHECK(ranks[i].left->digest == "seal");
  }
}

TEST(a_byte_of_the_wakeup_pipe_is_a_notice_and_goes_on) {
  int in[2], out[2];
  CHECK(pipe2(in, O_NONBLOCK | O_CLOEXEC) == 0 && pipe2(out, O_NONBLOCK | O_CLOEXEC) == 0);
  {
    auto ranks = job_of(2, {in[0], out[1], {{SIGTERM, "SIGTERM"}}, 30.0});
    const char numbers[] = {SIGCHLD, SIGTERM, SIGTERM};
    CHECK(write(in[1], numbers, sizeof numbers) == sizeof numbers);
    run_until(ranks, [&] { return all_left(ranks); });
    CHECK(ranks[0].notices == 1 && ranks[1].notices == 0);
    char passed[8];
    CHECK(read(out[0], passed, sizeof passed) == 3);
  }
  for (const int fd : {in[0], in[1], out[0], out[1]}) close(fd);
}

TEST(the_survivors_of_rank_0_leave_together) {
  auto ranks = job_of(3);
  for (Rank_& rank : ranks) rank.control->gather("ready", {"x"});
  run_until(ranks, [&] {
    return std::all_of(ranks.begin(), ranks.end(), [](const Rank_& r) { return r.values == 3; });
  });
  ranks.erase(ranks.begin());
  run_until(ranks, [&] { return all_left(ranks); });
  CHECK(ranks[0].left->round == ranks[1].left->round);
}

TEST(a_forked_child_holds_no_connection) {
  auto ranks = job_of(2);
  for (Rank_& rank : ranks) rank.control->gather("ready", {"x"});
  run_until(ranks, [&] { return ranks[0].values == 2 && ranks[1].values == 2; });
  int hold[2];
  CHECK(pipe2(hold, O_CLOEXEC) == 0);
  const pid_t child = fork();
  if (child == 0) {
    for (Rank_& rank : ranks) {
      rank.control->abandon();
      static_cast<void>(rank.control.release());
    }
    close(hold[1]);
    char ignored = 0;
    _exit(read(hold[0], &ignored, 1) == 0 ? 0 : 1);
  }
  // With the child alive, the end of a rank is seen at once: nobody else holds its sockets.
  ranks.pop_back();
  const double began_s = monotonic_s();
  run_until(ranks, [&] { return ranks[0].control->has_lost(); });
  CHECK(monotonic_s() - began_s < 10);
  close(hold[0]);
  close(hold[1]);
  int status = -1;
  CHECK(waitpid(child, &status, 0) == child && status == 0);
}

TEST(python_that_is_held_does_not_keep_the_process) {
  int words[2];
  CHECK(pipe2(words, O_CLOEXEC) == 0);
  const pid_t child = fork();
  if (child == 0) {
    dup2(words[1], STDERR_FILENO);
    SocketTransport::Setup setup;
    setup.routes.resize(1);
    Control::Setup with;
    with.grace_s = with.stuck_s = 0.05;
    Control control(std::make_unique<SocketTransport>(setup, Descriptor()), with);
    control.remember_newest("that of step 3");
    control.notice(cut::Wish::kStop, 0.1, "test");
    pause();
  }
  close(words[1]);
  std::string told;
  char part[512];
  for (ssize_t count = 0; (count = read(words[0], part, sizeof part)) > 0;) {
    told.append(part, static_cast<std::size_t>(count));
  }
  int status = -1;
  CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 76);
  CHECK(told.find("newest good checkpoint: that of step 3") != std::string::npos);
  close(words[0]);
}

TEST_MAIN
