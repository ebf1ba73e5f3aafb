// The native cut machine: ranks that talk over the wire form, and bytes that are no message.
#include <deque>
#include <memory>
#include <random>

#include "../cut.h"
#include "check.h"

using namespace spotspeed::cut;

namespace {

// Ranks of one job and what is under way between them, in order.
struct Job {
  explicit Job(Rank size) {
    for (Rank rank = 0; rank < size; ++rank) {
      Machine::Setup setup;
      setup.rank = rank;
      setup.world_size = size;
      machines.push_back(std::make_unique<Machine>(setup));
    }
    captured.resize(machines.size(), -1);
    departed.resize(machines.size());
    closed.resize(machines.size());
  }

  void act(Rank rank, const Actions& actions) {
    Machine& machine = *machines[static_cast<std::size_t>(rank)];
    const auto index = static_cast<std::size_t>(rank);
    for (const Action& action : actions) {
      if (const auto* send = std::get_if<Send>(&action)) {
        mail.push_back({rank, send->to, encode(send->term, send->message)});
      } else if (const auto* capture = std::get_if<Capture>(&action)) {
        captured[index] = capture->cut.step;
        act(rank, machine.staged(capture->cut.round, now));
        act(rank, machine.durable(capture->cut.round, "seal", now));
      } else if (const auto* settled = std::get_if<Settled>(&action)) {
        act(rank, machine.delivered(settled->cut.round, now));
      } else if (const auto* left = std::get_if<Departed>(&action)) {
        departed[index] = *left;
      } else if (std::holds_alternative<AllClosed>(action)) {
        closed[index] = true;
      }
    }
  }

  void deliver() {
    while (!mail.empty()) {
      const auto [from, to, data] = mail.front();
      mail.pop_front();
      if (dead.count(to) != 0) continue;
      const auto [term, message] = decode(data);
      act(to, machines[static_cast<std::size_t>(to)]->receive(from, term, message, now));
    }
  }

  struct Letter {
    Rank from = 0, to = 0;
    std::string data;
  };
  Time now = 1.0;
  std::vector<std::unique_ptr<Machine>> machines;
  std::deque<Letter> mail;
  std::set<Rank> dead;
  std::vector<std::int64_t> captured;
  std::vector<std::optional<Departed>> departed;
  std::vector<char> closed;
};

}  // namespace

TEST(a_stop_saves_the_newest_begun_step_everywhere) {
  Job job(3);
  CHECK(job.machines[1]->enter(1, job.now));
  job.act(2, job.machines[2]->notice(Wish::kStop, 30.0, "SIGTERM", job.now));
  job.deliver();
  CHECK(!job.machines[1]->enter(2, job.now));
  for (const Rank rank : {0, 2}) CHECK(job.machines[static_cast<std::size_t>(rank)]->enter(1, 1));
  for (const Rank rank : {0, 1, 2}) {
    job.act(rank, job.machines[static_cast<std::size_t>(rank)]->completed(1, job.now));
  }
  job.deliver();
  for (std::size_t i = 0; i < 3; ++i) {
    CHECK(job.captured[i] == 1);
    CHECK(job.departed[i] && job.departed[i]->digest == "seal");
    CHECK(job.machines[i]->state() == State::kLeft);
  }
}

TEST(survivors_of_the_leader_stop_where_they_stand) {
  Job job(3);
  job.dead.insert(0);
  for (const Rank rank : {1, 2}) {
    job.act(rank, job.machines[static_cast<std::size_t>(rank)]->peer_down(0, "reset", job.now));
  }
  job.deliver();
  for (const std::size_t i : {1, 2}) {
    CHECK(job.captured[i] == 0);
    CHECK(job.departed[i] && job.machines[i]->term().leader == 1);
  }
}

TEST(all_close_together) {
  Job job(2);
  job.act(0, job.machines[0]->notice(Wish::kClose, std::nullopt, "close", job.now));
  job.deliver();
  CHECK(!job.closed[0]);
  job.act(1, job.machines[1]->notice(Wish::kClose, std::nullopt, "close", job.now));
  job.deliver();
  CHECK(job.closed[0] && job.closed[1] && !job.machines[0]->wake());
}

TEST(an_exchange_gives_everybody_everything) {
  Job job(3);
  for (const Rank rank : {0, 1, 2}) {
    const auto index = static_cast<std::size_t>(rank);
    auto [serial, actions] = job.machines[index]->gather("x", {std::to_string(rank)}, job.now);
    CHECK(serial == 1);
    job.act(rank, actions);
    job.deliver();
    CHECK(job.machines[0]->missing().size() == (rank == 2 ? 0 : 2 - index));
  }
}

TEST(noise_is_refused_and_touches_nothing) {
  std::mt19937 random(1);
  const std::string sound =
      encode({1, 0}, Status{1, 2, 3.0, {{Cut{1, 2, true, "c", 3, "s", 1.0, {1}}, Phase::kKnown,
                                         "digest", "why"}}});
  int refused = 0;
  for (int i = 0; i < 20'000; ++i) {
    std::string data = sound.substr(0, random() % (sound.size() + 1));
    for (int k = 0; k < 3 && !data.empty(); ++k) {
      data[random() % data.size()] = static_cast<char>(random());
    }
    try {
      const auto [term, message] = decode(data);
      decode(encode(term, message));
    } catch (const FormatError&) {
      ++refused;
    }
  }
  CHECK(refused > 10'000);
  CHECK(check::throws<FormatError>([] { decode("\xdd\xff\xff\xff\xff"); }));
}

TEST(long_text_is_cut_at_a_whole_character) {
  Report report;
  for (int i = 0; i < 5000; ++i) report.why += "\xc3\xbc";
  const auto message = decode(encode({0, 0}, report)).second;
  CHECK(std::get<Report>(message).why.size() == 2 * kMaxTextCodePoints);
}

TEST_MAIN
